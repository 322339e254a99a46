"""Expensive TIFF, WebP, AVIF and HEIC files."""

import struct
import zlib

from PIL import Image

from benchmarks.bombs.build import MAX_BYTES, SIDE, Bombs, encode, repeat

# TIFF 6.0.


def tiff(width: int, tags: list[tuple[int, int, int, int]], data: bytes, packing: int = 8) -> bytes:
    """Grey pixels; `data` lies at byte 8, `tags` are (tag, type, count, value)."""
    usual = {
        256: (4, 1, width),
        257: (4, 1, width),
        258: (3, 1, 8),
        259: (3, 1, packing),
        262: (3, 1, 1),
        277: (3, 1, 1),
    } | {tag: rest for tag, *rest in tags}
    directory = b"".join(struct.pack("<HHII", tag, *usual[tag]) for tag in sorted(usual))
    head = struct.pack("<4sI", b"II*\0", 8 + len(data))
    return head + data + struct.pack("<H", len(usual)) + directory + bytes(4)


def tiff_bombs() -> Bombs:
    deflated = zlib.compress(bytes(2**28), 9)
    tile = [(324, 4, 1, 8), (325, 4, 1, len(deflated))]
    for packing, name in ((1, "plain"), (5, "LZW"), (8, "deflated"), (32773, "packed")):
        for count in (2**16, MAX_BYTES // 4):
            strips = [(273, 1, count, 8), (278, 4, 1, 1), (279, 1, count, 8 + count)]
            data = b"\x08" * count + b"\1" * count
            yield f"{count} strips of a byte, {name}", tiff(64, strips, data, packing)
    many = [(322, 4, 1, 16), (323, 4, 1, 16), (324, 4, 2**20, 8), (325, 4, 2**20, 8)]
    yield "small tiles", tiff(SIDE, many, b"\x08\0\0\0" * 2**20)
    yield (
        "largest strip",
        tiff(SIDE, [(273, 4, 1, 8), (278, 4, 1, 2**31), (279, 4, 1, len(deflated))], deflated),
    )
    yield (
        "deflate",
        tiff(64, [(273, 4, 1, 8), (278, 4, 1, 2**31), (279, 4, 1, len(deflated))], deflated),
    )
    for width, length in ((10_000, 10_000), (16, 2**24), (2**24, 16), (6400, 6400)):
        sizes = [(322, 4, 1, width), (323, 4, 1, length)]
        yield f"tiles of {width} x {length}", tiff(64, [*sizes, *tile], deflated)
    overlapping = [(1000 + number, 1, 2**20, 8) for number in range(60_000)]
    yield "overlapping entries", tiff(64, overlapping, bytes(2**20))
    yield "overlapping entries, few", tiff(64, overlapping[:900], bytes(2**20))
    yield "samples", tiff(64, [(277, 3, 1, 65535), (258, 3, 65535, 8)], bytes(2**18))
    loop = [(34665, 4, 1, 8), (330, 4, 4096, 8)]
    yield "directories in a circle", tiff(64, loop, struct.pack("<HHHII", 1, 330, 4, 1, 8) * 4096)
    blank = Image.new("RGB", (SIDE, SIDE))
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield f"largest, {name}", encode(blank, "TIFF", compression=name)
    fax = Image.new("1", (SIDE, SIDE))
    for name in ("group3", "group4", "tiff_ccitt"):
        yield f"largest, {name}", encode(fax, "TIFF", compression=name)
    yield (
        "largest, 16 bits",
        encode(Image.new("I;16", (SIDE, SIDE)), "TIFF", compression="tiff_lzw"),
    )


# WebP: RFC 9649.


def riff(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def webp(*chunks: bytes) -> bytes:
    return riff(b"RIFF", b"WEBP" + b"".join(chunks))


def webp_bombs() -> Bombs:
    def three(number: int) -> bytes:
        return struct.pack("<I", number)[:3]

    def canvas(side: int, flags: int = 0) -> bytes:
        return riff(b"VP8X", struct.pack("<I", flags) + three(side - 1) * 2)

    bits = (SIDE - 1) | (SIDE - 1) << 14
    lossless = riff(b"VP8L", b"\x2f" + struct.pack("<I", bits) + bytes(3))
    lossy = riff(b"VP8 ", b"\x50\0\0\x9d\x01\x2a" + struct.pack("<HH", SIDE, SIDE) + bytes(10))
    blank = Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 4))
    small = [Image.new("RGB", (64, 64), (number % 256, 0, 0)) for number in range(300)]
    yield "46 bytes", webp(canvas(SIDE), lossless)
    yield "canvas only", webp(canvas(SIDE))
    yield "largest canvas", webp(canvas(2**24), lossless)
    yield "lossless without data", webp(lossless)
    yield "lossy without data", webp(lossy)
    yield "largest, lossless", encode(blank, "WEBP", lossless=True, method=0)
    yield "largest, lossy", encode(blank.convert("RGB"), "WEBP", method=0)
    yield "largest, transparent", encode(blank, "WEBP", method=0)
    yield "frames", encode(small[0], "WEBP", save_all=True, append_images=small[1:], method=0)
    frame = riff(b"ANMF", bytes(6) + three(SIDE - 1) * 2 + bytes(4) + lossless)
    animation = riff(b"ANIM", bytes(6))
    yield "frames without data", webp(canvas(SIDE, 2), animation, repeat(frame))
    yield "empty frames", webp(canvas(SIDE, 2), animation, repeat(riff(b"ANMF", bytes(16))))
    yield "chunks", webp(canvas(64), repeat(riff(b"XXXX", b"")), lossless)
    yield "EXIF", webp(canvas(64, 8), lossless, riff(b"EXIF", b"II*\0" + b"\xff" * 2**22))


# AVIF: ISO/IEC 14496-12 and 23008-12.


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def full_box(kind: bytes, version: int, body: bytes) -> bytes:
    return box(kind, struct.pack(">I", version << 24) + body)


def avif_meta(*boxes: bytes) -> bytes:
    """A file whose metadata holds these."""
    handler = full_box(b"hdlr", 0, bytes(4) + b"pict" + bytes(13))
    primary = full_box(b"pitm", 0, struct.pack(">H", 1))
    meta = full_box(b"meta", 0, handler + primary + b"".join(boxes))
    return box(b"ftyp", b"avif" + bytes(4) + b"avifmif1miaf") + meta + box(b"mdat", bytes(16))


def avif_items(count: int) -> Bombs:
    ids = range(1, count + 1)
    places = b"".join(struct.pack(">IHHH", number, 0, 0, 0) for number in ids)
    yield "locations", avif_meta(full_box(b"iloc", 2, struct.pack(">BBI", 0, 0, count) + places))
    entries = b"".join(
        full_box(b"infe", 3, struct.pack(">IH", number, 0) + b"av01\0") for number in ids
    )
    yield "items", avif_meta(full_box(b"iinf", 1, struct.pack(">I", count) + entries))
    links = b"".join(box(b"dimg", struct.pack(">IHI", 2 * n, 1, 2 * n + 1)) for n in ids)
    yield "references", avif_meta(full_box(b"iref", 1, links))
    if count < 2**16:
        link = box(b"dimg", struct.pack(f">IH{count}I", 1, count, *ids))
        yield "references of one", avif_meta(full_box(b"iref", 1, link))
    size = full_box(b"ispe", 0, struct.pack(">II", 64, 64))
    pairs = struct.pack(">I", count) + b"".join(struct.pack(">IB", number, 0) for number in ids)
    yield "associations", avif_meta(box(b"iprp", box(b"ipco", size) + full_box(b"ipma", 1, pairs)))
    yield "properties", avif_meta(box(b"iprp", box(b"ipco", size * count)))
    yield "boxes", avif_meta(box(b"free", b"") * count)
    tables = b"".join(
        full_box(kind, 0, struct.pack(">II", 0, count) + bytes(8 * count))
        for kind in (b"stsz", b"stts", b"stco", b"stsc", b"stss")
    )
    media = box(b"mdia", box(b"minf", box(b"stbl", tables)))
    yield "samples", avif_meta() + box(b"moov", box(b"trak", media))


def avif_bombs() -> Bombs:
    for count in (4096, 100_000):
        for name, file in avif_items(count):
            yield f"{count} {name}", file
    yield (
        "extents",
        avif_meta(
            full_box(
                b"iloc",
                1,
                struct.pack(">BBH", 0, 0, 4096) + struct.pack(">4H", 1, 0, 0, 65535) * 4096,
            )
        ),
    )
    for name, options in {"4:2:0": {}, "4:4:4": {"subsampling": "4:4:4"}}.items():
        yield (
            f"largest, {name}",
            encode(Image.new("RGB", (SIDE, SIDE)), "AVIF", speed=10, **options),
        )
    yield "largest, transparent", encode(Image.new("RGBA", (SIDE, SIDE)), "AVIF", speed=10)
    for side in (SIDE, 12_000):
        frame = bytearray(encode(Image.new("L", (side, side)), "AVIF", speed=10))
        at = frame.index(b"ispe") + 8
        frame[at : at + 8] = struct.pack(">II", 64, 64)
        yield f"frame of {side} larger than its header", bytes(frame)


# HEIC: the same boxes with HEVC inside.


def heif_items(count: int) -> Bombs:
    for name, file in avif_items(count):
        yield name, file.replace(b"ftypavif", b"ftypheic").replace(b"av01", b"hvc1")


def heif_bombs() -> Bombs:
    for count in (4096, 100_000):
        for name, file in heif_items(count):
            yield f"{count} {name}", file
    blank = Image.new("RGB", (SIDE, SIDE))
    for name, options in {
        "4:2:0": {},
        "4:4:4": {"chroma": 444},
        "tiles": {"tile_size": 512},
    }.items():
        yield f"largest, {name}", encode(blank, "HEIF", **options)
    yield "largest, transparent", encode(Image.new("RGBA", (SIDE, SIDE)), "HEIF")
    for side in (SIDE, 11_900):  # x265 encodes no more
        frame = bytearray(encode(Image.new("L", (side, side)), "HEIF"))
        at = frame.index(b"ispe") + 8
        frame[at : at + 8] = struct.pack(">II", 64, 64)
        yield f"frame of {side} larger than its header", bytes(frame)
