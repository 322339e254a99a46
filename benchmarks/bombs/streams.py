"""Expensive JPEG, PNG, GIF and BMP files."""

import struct
import zlib

from PIL import Image

from benchmarks.bombs.build import MAX_BYTES, SIDE, Bombs, encode, repeat
from benchmarks.bombs.containers import tiff

# JPEG: ITU-T T.81.


def segment(marker: int, body: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg_frame(marker: int, components: int, scans: bytes, precision: int = 8) -> bytes:
    """A JPEG whose frame is of this kind, with scans that hold no data."""
    ids = range(1, components + 1)
    frame = struct.pack(">BHHB", precision, SIDE, SIDE, components)
    frame += b"".join(bytes([number, 0x11, 0]) for number in ids)
    first = bytes([components, *(byte for number in ids for byte in (number, 0)), 0, 0, 0])
    tables = segment(0xDB, b"\0" + b"\1" * 64)
    return (
        b"\xff\xd8" + tables + segment(marker, frame) + segment(0xDA, first) + scans + b"\xff\xd9"
    )


def jpeg_bombs() -> Bombs:
    scan = segment(0xDA, bytes([1, 1, 0, 1, 63, 0]))
    refine = segment(0xDA, bytes([1, 1, 0, 1, 63, 0x10])) + bytes(64)
    blank = Image.new("RGB", (SIDE, SIDE), (9, 99, 199))
    progressive = encode(blank, "JPEG", progressive=True, subsampling=0)
    noise = Image.effect_noise((SIDE // 2, SIDE // 2), 80)
    end = progressive.rindex(b"\xff\xd9")
    # The decoder of an arithmetic-coded scan goes on at full cost after the data has ended.
    for marker in (0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF):
        yield f"arithmetic coding {marker:x}", jpeg_frame(marker, 1, scan * 60)
    for marker in (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7):
        yield f"frame {marker:x} without data", jpeg_frame(marker, 3, scan * 90)
        yield f"frame {marker:x} of 12 bits", jpeg_frame(marker, 1, scan * 90, precision=12)
    yield "90 scans", progressive[:end] + scan * 89 + progressive[end:]
    yield "80 scans of refinement", progressive[:end] + refine * 79 + progressive[end:]
    yield "a million scans", progressive[:end] + repeat(scan) + progressive[end:]
    yield "a hidden end", progressive[:end] + b"\xff\xfe\0\4\xff\xd9" + repeat(scan)
    yield "progressive, four components", encode(blank.convert("CMYK"), "JPEG", progressive=True)
    yield "progressive noise", encode(noise, "JPEG", progressive=True, quality=95)
    yield "restarts", encode(blank, "JPEG", restart_marker_blocks=1)[:MAX_BYTES]
    small = encode(Image.new("RGB", (64, 64)), "JPEG")
    for name, filler in {
        "segments": segment(0xE5),
        "padding": b"\xff",
        "resets": b"\xff\xd0",
        "comments": segment(0xFE, b"x"),
        "EXIF": segment(0xE1, b"Exif\0\0x"),
        "long EXIF": segment(0xE1, b"Exif\0\0" + bytes(65_000)),
        "color profiles": segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000)),
        "MPF": segment(0xE2, b"MPF\0II*\0\x08\0\0\0" + b"\xff" * 60_000),
        "Photoshop": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000),
        "Huffman tables": segment(0xC4, (b"\0" + b"\1" + bytes(16)) * 100),
    }.items():
        yield name, small[:2] + repeat(filler) + small[2:]


# PNG: ISO/IEC 15948.


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(bits: int, color: int, before: bytes = b"", interlace: int = 0, level: int = 9) -> bytes:
    """Zeros of the largest size."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    rows = bytes((SIDE * samples * bits // 8 + 1) * (SIDE + 8))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, bits, color, 0, 0, interlace))
    palette = chunk(b"PLTE", bytes(768)) if color == 3 else b""
    pixels = chunk(b"IDAT", zlib.compress(rows, level))
    return b"\x89PNG\r\n\x1a\n" + header + palette + before + pixels + chunk(b"IEND")


def png_bombs() -> Bombs:
    megabytes = zlib.compress(bytes(2**27), 9)
    for bits, color in ((1, 0), (8, 0), (16, 0), (8, 2), (16, 2), (8, 3), (16, 4), (8, 6), (16, 6)):
        yield f"{bits} bits of color {color}", png(bits, color)
    yield "palette with transparency", png(8, 3, chunk(b"tRNS", bytes(256)))
    yield "interlaced", png(16, 6, interlace=1)
    yield "color profile", png(8, 2, chunk(b"iCCP", b"x\0\0" + megabytes))
    yield "text", png(8, 2, chunk(b"zTXt", b"x\0\0" + megabytes))
    yield "texts", png(8, 2, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**20 - 1))) * 500)
    yield "international text", png(8, 2, chunk(b"iTXt", b"x\0\1\0\0\0" + megabytes))
    yield "chunks", png(1, 0, repeat(chunk(b"teXt")))
    yield "pixel chunks", png(1, 0, repeat(chunk(b"IDAT")))
    yield "frames", png(1, 0, repeat(chunk(b"fcTL", bytes(26)) + chunk(b"fdAT", bytes(4))))
    overlapping = tiff(64, [(1000 + number, 1, 2**20, 8) for number in range(60_000)], bytes(2**20))
    yield "EXIF", png(8, 2, chunk(b"eXIf", overlapping))
    raw = zlib.compress(b"\n\n\n" + b"ff" * 10**7)
    yield "EXIF in text", png(8, 2, chunk(b"zTXt", b"Raw profile type exif\0\0" + raw))


# GIF89a.


def gif(width: int, height: int, blocks: bytes, interlaced: bool = False) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0x40 * interlaced)
    return screen + blocks + frame + b"\2\2\x44\1\0\x3b"


def gif_bombs() -> Bombs:
    blank = Image.new("P", (SIDE, SIDE))
    small = [Image.new("P", (64, 64), number % 256) for number in range(2000)]
    yield "largest", encode(blank, "GIF")
    yield "interlaced", encode(blank, "GIF", interlace=1)
    yield "no pixels", gif(SIDE, SIDE, b"")
    yield "no pixels, interlaced", gif(SIDE, SIDE, b"", interlaced=True)
    yield "frames", encode(small[0], "GIF", save_all=True, append_images=small[1:])
    yield (
        "large frames",
        encode(blank, "GIF", save_all=True, append_images=[Image.new("P", (SIDE, SIDE), 1)] * 3),
    )
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\0"
    yield "frame beyond the screen", gif(64, 64, frame)
    for name, filler in {
        "comments": b"\x21\xfe\1c\0",
        "extensions": b"\x21\xf9\4\0\0\0\0\0",
        "applications": b"\x21\xff\x0bNETSCAPE2.0\3\1\0\0\0",
        "junk": b"\x55",
    }.items():
        yield name, gif(64, 64, repeat(filler))
    yield "sub-blocks", gif(64, 64, b"\x21\xff" + repeat(b"\1c") + b"\0")
    yield "one long comment", gif(64, 64, b"\x21\xfe" + repeat(b"\xff" + bytes(255)) + b"\0")


# BMP: [MS-WMF] 2.2.2.3, run-length encoding 3.1.6.


def bmp(width: int, height: int, bits: int, compression: int, pixels: bytes) -> bytes:
    palette = bytes(4 << bits) if bits <= 8 else b""
    info = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(pixels), 0, 0, 0, 0
    )
    head = struct.pack("<2sIHHI", b"BM", 54 + len(palette) + len(pixels), 0, 0, 54 + len(palette))
    return head + info + palette + pixels


def bmp_bombs() -> Bombs:
    for side in (1448, SIDE):  # below and above what is decoded in Python
        for bits, compression in ((8, 1), (4, 2)):
            for name, run in {
                "line ends": b"\0\0",
                "jumps": b"\0\2\xff\xff",
                "steps": b"\0\2\1\0",
                "short runs": b"\1\1",
                "long runs": b"\xff\1",
                "literals": b"\0\3abc\0",
            }.items():
                yield (
                    f"RLE{bits} {name} {side}",
                    bmp(side, side, bits, compression, repeat(run, 2 * side * side)[: 8 * 2**20]),
                )
            yield (
                f"RLE{bits} line ends, few {side}",
                bmp(side, side, bits, compression, bytes(9000)),
            )
    for bits in (1, 4, 8, 16, 24, 32):
        yield f"{bits} bits, cut short", bmp(SIDE, SIDE, bits, 0, bytes(2**20))
    yield "1 bit", bmp(SIDE, SIDE, 1, 0, bytes(SIDE * 800))
    yield "upside down", bmp(SIDE, -SIDE, 1, 0, bytes(SIDE * 800))
    yield "unknown compression", bmp(SIDE, SIDE, 8, 7, bytes(2**20))
