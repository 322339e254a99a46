"""Fuzz the image decoder with damaged files, and a running service with expensive ones.

python -m benchmarks.fuzz --seconds 60            # for each format; writes docs/reliability.md

First, damaged files go to the decoder in this process: each must be decoded or refused with a typed
error. A file that causes anything else is left in `runs/fuzz/FORMAT`, even if the decoder crashes
the process. Then the files of `bombs`, whole, cut short and damaged, go to a running service, and
`bombing.py` watches what they cost.
"""

import io
import random
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from benchmarks.bombing import MAX_ANSWER, MAX_GROWTH, MAX_LIVEZ, Effect, Summary, Target
from benchmarks.bombs import bombs, variants
from benchmarks.harness.machine import machine
from benchmarks.harness.report import make_parser, write_section
from benchmarks.harness.server import Server
from models.images.decode import FORMATS
from models.images.preprocess import BICUBIC, Preprocessing
from service.errors import ServiceError
from service.intake.decode import decode
from service.telemetry import logs

MAX_PIXELS = 4_000_000
PREPROCESSING = Preprocessing(224, 224, None, BICUBIC, (0.5,) * 3, (0.5,) * 3)
MAX_SECONDS = 5.0  # of the processor, for one small file
REFUSALS = {400, 413, 415, 422}
COSTLY = 0.5  # seconds; a file that takes longer is sent several times at once, too
COPIES = 4
LIMITS = (b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\1")


class Misbehaved(AssertionError):
    """A file that is neither decoded nor refused, or takes too long."""


def seeds(kind: str) -> list[bytes]:
    """Sound files of one format, in the variants whose code differs."""
    photo = Image.fromarray(data.chelsea()).resize((48, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a cat"
    plain, grey, palette = photo, photo.convert("L"), photo.quantize(16)
    frames: dict[str, object] = {"save_all": True, "append_images": [photo.rotate(90)]}
    packed: list[dict[str, object]] = [
        {"compression": name} for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")
    ]
    variants: dict[str, list[tuple[Image.Image, dict[str, object]]]] = {
        "JPEG": [
            (plain, {"exif": exif, "icc_profile": b"x" * 200}),
            (grey, {}),
            (plain, {"progressive": True}),
            (plain.convert("CMYK"), {"restart_marker_rows": 1}),
        ],
        "PNG": [
            (plain, {"exif": exif}),
            (palette, {"transparency": 0}),
            (grey, {}),
            (plain, frames),
        ],
        "WEBP": [(plain, {"exif": exif}), (plain, {"lossless": True}), (plain, frames)],
        "GIF": [(palette, {"comment": b"a cat"}), (palette, frames), (grey, {"interlace": 1})],
        "BMP": [(plain, {}), (palette, {}), (grey, {})],
        "TIFF": [
            (plain, {"exif": exif}),
            *((plain, options) for options in packed),
            (photo.convert("1"), {"compression": "group4"}),
            (palette, {"compression": "packbits"}),
        ],
        "AVIF": [(plain, {"exif": exif}), (photo.convert("RGBA"), {}), (plain, frames)],
        "HEIF": [
            (plain, {"exif": exif}),
            (photo.convert("RGBA"), {}),
            (plain, frames),
            (plain, {"tile_size": 64}),
        ],
    }
    return [_encode(image, kind, options) for image, options in variants[kind]]


def mutate(file: bytes, draw: random.Random) -> bytes:
    """A file with up to a dozen damages: bytes changed, cut out, put in, moved, or numbers at the
    ends of their range. A PNG's check sums are mended half of the time, so that what lies behind
    them is reached."""
    damaged = bytearray(file)
    for _ in range(draw.randint(1, 12)):
        at = draw.randrange(len(damaged) or 1)
        match draw.randrange(7):
            case 0 | 1:
                damaged[at : at + 1] = bytes([draw.randrange(256)])
            case 2:
                damaged[at : at + 1] = bytes(
                    [damaged[at] ^ 1 << draw.randrange(8)] if damaged else b""
                )
            case 3:
                del damaged[at : at + draw.randint(1, 32)]
            case 4:
                damaged[at:at] = draw.randbytes(draw.randint(1, 16))
            case 5:
                end = at + draw.randint(1, 64)
                to = draw.randrange(len(damaged) or 1)
                damaged[to:to] = damaged[at:end]
            case 6:
                number = draw.choice(LIMITS)
                damaged[at : at + len(number)] = number
    return _mend_png(bytes(damaged)) if draw.random() < 0.5 else bytes(damaged)


def files(kind: str, seed: int) -> Iterator[bytes]:
    """Damaged files without end."""
    sound, draw = seeds(kind), random.Random(f"{kind} {seed}")
    while True:
        yield mutate(draw.choice(sound), draw)


def judge(file: bytes) -> str:
    """What became of a file: `decoded` or the name of the error. Raises Misbehaved."""
    began = time.process_time()
    try:
        pixels = decode(file, MAX_PIXELS, preprocessing=PREPROCESSING).pixels
    except ServiceError as error:
        outcome = type(error).__name__
        if error.status not in REFUSALS:
            raise Misbehaved(f"an error {error.status}: {error}") from error
    except BaseException as error:
        raise Misbehaved(f"{type(error).__name__}: {error}") from error
    else:
        outcome = "decoded"
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise Misbehaved(f"pixels of {pixels.dtype} {pixels.shape}")
    if time.process_time() - began > MAX_SECONDS:
        raise Misbehaved(f"{time.process_time() - began:.1f} s for {len(file)} bytes")
    return outcome


def fuzz(
    kind: str, seconds: float, seed: int, trace: Path | None = None, least: int = 100
) -> Counter[str]:
    """Judge damaged files of one format for some seconds (on a busy machine longer, until there
    were `least`), each left in `trace` meanwhile."""
    outcomes: Counter[str] = Counter()
    until = time.monotonic() + seconds
    with warnings.catch_warnings(), open(trace or "/dev/null", "wb", buffering=0) as left:
        warnings.simplefilter("ignore")  # Pillow warns of damage that it could repair
        for file in files(kind, seed):
            if trace:
                left.seek(0)
                left.truncate()
                left.write(file)
            outcomes[judge(file)] += 1
            if time.monotonic() > until and outcomes.total() >= least:
                return outcomes
    raise AssertionError("files() ends")


def bomb(target: Target, kind: str, seed: int) -> Summary:
    """Strike with every bomb of one format, with its variants, and with several at once of those
    that took long."""
    summary = Summary()

    def strike(name: str, file: bytes, copies: int = 1) -> Effect:
        effect = target.strike(name, file, copies)
        summary.add(effect)
        for sentence in effect.broken():
            print(sentence, flush=True)
        return effect

    for name, file in bombs(kind):
        for how, variant in (("whole", file), *variants(file, mutate, seed)):
            full_name = f"{kind} {name}, {how}"
            if strike(full_name, variant).answer > COSTLY:
                strike(f"{full_name}, {COPIES} at once", variant, COPIES)
    return summary


def tell_bombs(summaries: dict[str, Summary]) -> list[str]:
    lines = [
        "| format | expensive files | answers | slowest s | slowest /livez s | growth MB |",
        "|---|---|---|---|---|---|",
    ]
    for kind, summary in summaries.items():
        counts = sorted(summary.statuses.items())
        answers = ", ".join(f"{count} x {status}" for status, count in counts)
        worst = summary.worst
        lines.append(
            f"| {kind} | {summary.statuses.total()} | {answers} | {worst.answer:.2f} | "
            f"{worst.livez:.2f} | {worst.growth:.0f} |"
        )
    return lines


def main() -> int:
    parser = make_parser("benchmarks.fuzz", __doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--skip-damaged", action="store_true", help="only the expensive files")
    parser.add_argument("--dry", action="store_true", help="do not write docs/reliability.md")
    options = parser.parse_args()
    logs.configure("text")
    directory = Path("runs/fuzz")
    directory.mkdir(parents=True, exist_ok=True)
    lines = ["| format | files | decoded | refused | refusals by type |", "|---|---|---|---|---|"]
    for kind in options.formats if not options.skip_damaged else ():
        counts = fuzz(kind, options.seconds, options.seed, directory / kind)
        total, decoded = counts.total(), counts.pop("decoded", 0)
        types = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        lines.append(f"| {kind} | {total} | {decoded} | {counts.total()} | {types} |")
        print(lines[-1], flush=True)
    with Server() as service:
        target = Target(service.url, service.process.pid)
        summaries = {kind: bomb(target, kind, options.seed) for kind in options.formats}
    table = tell_bombs(summaries)
    print("\n".join(table))
    broken = [sentence for summary in summaries.values() for sentence in summary.broken]
    command = f"python -m benchmarks.fuzz --seconds {options.seconds:g} --seed {options.seed}"
    verdict = f"Broken: {'; '.join(broken)}." if broken else "Every promise above held."
    lines += [
        "",
        "No damaged file caused a crash, a hang or another error.",
        "",
        *table,
        "",
        f"Bounds: {MAX_ANSWER:g} s for the answer, {MAX_LIVEZ:g} s for `/livez` meanwhile, "
        f"{MAX_GROWTH:g} MB for all processes together. {verdict} "
        f"Written by `{command}`. {machine()}",
    ]
    if not (options.dry or options.skip_damaged):
        write_section("fuzz", "\n".join(lines))
    return 1 if broken else 0


def _encode(image: Image.Image, kind: str, options: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _mend_png(file: bytes) -> bytes:
    if not file.startswith(b"\x89PNG"):
        return file
    parts, at = [file[:8]], 8
    while at + 12 <= len(file):
        end = at + 8 + int.from_bytes(file[at : at + 4])
        parts += [file[at:end], struct.pack(">I", zlib.crc32(file[at + 4 : end]))]
        at = end + 4
    return b"".join(parts)


if __name__ == "__main__":
    sys.exit(main())
