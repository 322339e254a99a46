"""Image files made to hurt: damaged at random, small ones that are expensive, and those that are
something else. `make fuzz` damages more of them."""

import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from benchmarks.bombs.build import encode
from benchmarks.bombs.containers import avif_items, heif_items, riff, tiff, webp
from benchmarks.bombs.streams import bmp, chunk, jpeg_frame, segment
from benchmarks.fuzz import Misbehaved, fuzz, judge, mutate, seeds
from models.errors import ImageError
from models.images.decode import FORMATS
from models.images.structure import (
    MAX_ENTRIES,
    MAX_ITEMS,
    MAX_PIECES,
    MAX_SCANS,
    MAX_SEGMENTS,
    MAX_STRIPS,
    check_structure,
)
from service.errors import (
    BadRequest,
    ImageTooCostly,
    ServiceError,
    TooLarge,
    UnsupportedImage,
)
from service.intake.decode import ERRORS, decode

PIXELS = 40_000_000
PATIENCE = 10.0  # seconds of one core; the worst that is let through takes about one
BODY = 8 * 2**20  # bytes that the larger bombs fill


PHOTO = Image.fromarray(
    np.kron(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), np.ones((16, 16, 1))).astype(np.uint8)
)
JPEG, PNG, GIF = (encode(PHOTO, kind) for kind in ("JPEG", "PNG", "GIF"))


@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_files_are_decoded_or_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, judged = int(time.time()), 0  # other files each time, which can be had again

    def count(file: bytes) -> str:
        nonlocal judged
        judged += 1
        return judge(file)

    monkeypatch.setattr("benchmarks.fuzz.judge", count)
    try:
        outcomes = fuzz(kind, seconds=0.5, seed=seed)
    except Misbehaved as error:
        pytest.fail(f"file {judged} of benchmarks.fuzz.files({kind!r}, {seed}): {error}")
    assert len(outcomes) > 1, (seed, outcomes)


def test_the_judge_tells_good_from_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(JPEG) == "decoded"
    assert judge(b"") == "BadRequest"
    for bad in (lambda *_: np.zeros((2, 2)), lambda *_: 1 / 0, lambda *_: exec("raise SystemExit")):
        monkeypatch.setattr("benchmarks.fuzz.decode", bad)
        with pytest.raises(Misbehaved):
            judge(JPEG)


def test_mutations_repeat_with_their_seed_and_reach_past_check_sums() -> None:
    import random

    png = seeds("PNG")[0]
    assert mutate(png, random.Random(1)) == mutate(png, random.Random(1))
    assert any(judge(mutate(png, random.Random(i))) == "decoded" for i in range(500))


# Bombs.


def png_with(*chunks: bytes) -> bytes:
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def jpeg_with(*segments: bytes, file: bytes = JPEG) -> bytes:
    return file[:2] + b"".join(segments) + file[2:]


def gif_with(*blocks: bytes) -> bytes:
    screen = 13 + (6 << (GIF[10] & 7))
    return GIF[:screen] + b"".join(blocks) + GIF[screen:]


def progressive(*scans: bytes) -> bytes:
    """A large progressive JPEG with further scans that say nothing."""
    file = encode(Image.new("RGB", (6000, 6000)), "JPEG", progressive=True)
    end = file.rindex(b"\xff\xd9")
    return file[:end] + b"".join(scans) + file[end:]


def strips(count: int) -> bytes:
    """A TIFF with so many strips of one byte."""
    places = [(273, 1, count, 8), (278, 4, 1, 1), (279, 1, count, 8 + count)]
    return tiff(64, places, b"\x08" * count + b"\1" * count, packing=1)


SCAN = bytes.fromhex("ffda 0008 01 0100 013f 00")
MEGABYTE = zlib.compress(bytes(2**20 - 1), 9)
DEFLATED = zlib.compress(bytes(100_000_000), 9)
HEX = zlib.compress(b"\n\n\n" + b"ff" * 400_000)
TILE = [(324, 4, 1, 8), (325, 4, 1, len(DEFLATED))]
FRAMES = [Image.new("P", (64, 64), i) for i in range(200)]
PROFILE = chunk(b"iCCP", b"x\0\0" + MEGABYTE)
ICC = segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(50_000))
OVERLAPPING = tiff(
    64,
    [(273, 4, 1, 8), (278, 4, 1, 64), (279, 4, 1, 4096)]
    + [(1000 + i, 1, 2**20, 8) for i in range(60_000)],
    bytes(2**20),
)
BOMBS = {
    "scans": (progressive(*[SCAN] * (MAX_SCANS + 1)), BadRequest),
    "scans behind a false end": (progressive(b"\xff\xfe\0\4\xff\xd9", *[SCAN] * 1000), BadRequest),
    "most scans that are let through": (progressive(*[SCAN] * (MAX_SCANS - 10)), None),
    "JPEG segments": (jpeg_with(*[segment(0xE5)] * (BODY // 4)), BadRequest),
    "JPEG segments behind an end": (
        jpeg_with(b"\xff\xd9", *[segment(0xFE)] * (BODY // 4)), BadRequest),
    "JPEG padding": (jpeg_with(b"\xff" * BODY), BadRequest),
    "JPEG resets": (jpeg_with(b"\xff\xd0" * (BODY // 2)), BadRequest),
    "JPEG junk": (jpeg_with(segment(0xFE), bytes(BODY)), BadRequest),
    "EXIF in many segments": (
        jpeg_with(*[segment(0xE1, b"Exif\0\0x")] * (BODY // 11)), BadRequest),
    "EXIF in the most segments": (
        jpeg_with(*[segment(0xE1, b"Exif\0\0" + bytes(16_000))] * (MAX_SEGMENTS - 20)), None),
    "ICC in JPEG": (jpeg_with(*[ICC] * (BODY // len(ICC))), None),
    "ICC in PNG, many": (png_with(*[PROFILE] * (BODY // len(PROFILE))), BadRequest),
    "ICC in PNG, once": (png_with(chunk(b"iCCP", b"x\0\0" + DEFLATED)), BadRequest),
    "compressed text": (png_with(*[chunk(b"zTXt", b"x\0\0" + MEGABYTE)] * 500), BadRequest),
    "compressed text, once": (png_with(chunk(b"zTXt", b"x\0\0" + DEFLATED)), BadRequest),
    "PNG chunks": (png_with(*[chunk(b"teXt")] * (BODY // 12)), BadRequest),
    "empty pixel chunks": (png_with(*[chunk(b"IDAT")] * (BODY // 12)), BadRequest),
    "chunks behind the pixels": (
        PNG[:-12] + chunk(b"tEXt", b"a\0b") * (BODY // 15) + PNG[-12:], BadRequest),
    "EXIF in PNG, overlapping": (png_with(chunk(b"eXIf", OVERLAPPING)), None),
    "EXIF in PNG text": (png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + HEX)), None),
    "JPEG, arithmetic coding": (jpeg_frame(0xC9, 1, b""), UnsupportedImage),
    "JPEG, progressive and arithmetic coding": (jpeg_frame(0xCA, 3, SCAN * 9), UnsupportedImage),
    "TIFF strips": (strips(MAX_STRIPS + 1), BadRequest),
    "most TIFF strips that are let through": (strips(MAX_STRIPS), None),
    "TIFF, big-endian": (
        b"MM\0*\0\0\0\x08" + struct.pack(">HHHII", 1, 273, 4, MAX_STRIPS + 1, 8), BadRequest),
    "BigTIFF strips": (
        struct.pack("<4sHHQ", b"II+\0", 8, 0, 16)
        + struct.pack("<QHHQQ", 1, 273, 16, MAX_STRIPS + 1, 16), BadRequest),
    "TIFF entries": (struct.pack("<4sIH", b"II*\0", 8, MAX_ENTRIES + 1), BadRequest),
    "TIFF entries that overlap": (
        tiff(64, [(1000 + i, 1, 2**16, 8) for i in range(100)], bytes(2**16)), BadRequest),
    "BMP, run-length encoded": (bmp(6324, 6324, 8, 1, bytes(9000)), ImageTooCostly),
    "BMP, run-length encoded, upside down": (bmp(6324, -6324, 4, 2, bytes(9000)), ImageTooCostly),
    "WebP canvas": (webp(riff(b"VP8X", bytes(4) + b"\xff" * 6)), TooLarge),
    "WebP chunks": (webp(riff(b"XXXX", b"") * (MAX_PIECES + 1)), BadRequest),
    **{f"AVIF {name}": (file, BadRequest) for name, file in avif_items(MAX_ITEMS + 4097)},
    **{f"HEIC {name}": (file, BadRequest) for name, file in heif_items(MAX_ITEMS + 4097)},
    "TIFF tags, overlapping": (OVERLAPPING, BadRequest),
    "TIFF tiles": (
        tiff(64, [(322, 4, 1, 10_000), (323, 4, 1, 10_000), *TILE], DEFLATED), TooLarge),
    "TIFF tiles, narrow": (
        tiff(6000, [(322, 4, 1, 16), (323, 4, 1, 2**24), *TILE], DEFLATED), TooLarge),
    "TIFF strip": (
        tiff(64, [(273, 4, 1, 8), (278, 4, 1, 2**31), (279, 4, 1, len(DEFLATED))], DEFLATED),
        BadRequest),
    "GIF comments": (gif_with(*[b"\x21\xfe\1c\0"] * (BODY // 5)), BadRequest),
    "GIF sub-blocks": (gif_with(b"\x21\xff", b"\1c" * (BODY // 2), b"\0"), BadRequest),
    "GIF behind an empty block": (
        gif_with(b"\x21\xff\0", b"\1," * (BODY // 2), b"\0"), BadRequest),
    "GIF junk": (gif_with(b"\x55" * BODY), BadRequest),
    "GIF frame beyond the screen": (
        gif_with(b"\x2c" + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\0"), TooLarge),
    "frames": (encode(PHOTO, "GIF", save_all=True, append_images=FRAMES), None),
}  # fmt: skip


@pytest.mark.parametrize(("file", "error"), BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_or_cheap(file: bytes, error: type[ServiceError] | None) -> None:
    began = time.process_time()  # of all threads: a decoder may have its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in service
        if error is None:
            decode(file, PIXELS)
        else:
            with pytest.raises(error):
                decode(file, PIXELS)
    assert time.process_time() - began < PATIENCE


SILENT = """
import sys, warnings
sys.path.insert(0, "")
from service.intake.decode import decode
from service.telemetry import logs
from service.errors import ServiceError
from benchmarks.fuzz import files
logs.configure("text")
damaged = files(sys.argv[1], 0)
for _ in range(300):
    try:
        decode(next(damaged), 10**6)
    except ServiceError:
        pass
print("done")
"""


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_write_nothing_into_the_log(kind: str) -> None:
    """A client that could fill the log with a small file could fill the disk with many."""
    command = [sys.executable, "-c", SILENT, kind]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("done\n", "")


def test_structures_are_bounded_before_any_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the header shows to be absurd costs milliseconds, and Pillow never sees it."""
    monkeypatch.setattr("models.images.decode.Image.open", None)
    for name in (
        "JPEG, arithmetic coding",
        "TIFF strips",
        "TIFF, big-endian",
        "BigTIFF strips",
        "TIFF entries",
        "TIFF entries that overlap",
        "BMP, run-length encoded",
        "BMP, run-length encoded, upside down",
        "WebP chunks",
        *(name for name in BOMBS if name.startswith("AVIF")),
    ):
        file, error = BOMBS[name]
        assert error, name
        began = time.process_time()
        with pytest.raises(ImageError) as caught:
            check_structure(file)
        assert ERRORS[type(caught.value)] is error, name
        assert time.process_time() - began < 1, name


@pytest.mark.parametrize("kind", FORMATS)
def test_honest_structures_pass(kind: str) -> None:
    for file in seeds(kind):
        check_structure(file)


# Files that are something else.

OTHERS = {
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
    "SVG with a declaration": b"<?xml version='1.0'?><!DOCTYPE svg [<!ENTITY a 'b'>]><svg/>",
    "PDF": b"%PDF-1.7\n%%EOF",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage",
    "ZIP": b"PK\3\4" + bytes(60),
    "ELF": b"\x7fELF" + bytes(60),
    "WebM": b"\x1a\x45\xdf\xa3" + bytes(60),
    "MP4": b"\0\0\0\x18ftypisom" + bytes(60),
    "PSD": b"8BPS\0\1" + bytes(60),
    "JPEG 2000": encode(PHOTO, "JPEG2000"),
    "ICNS": b"icns" + bytes(60),
    "PDF before a JPEG": b"%PDF-1.4\n1 0 obj\nstream\n" + JPEG,
    "HTML before a PNG": b"<html><!--" + PNG,
    "a byte before a PNG": b"\n" + PNG,
    "a ZIP before a GIF": b"PK\3\4" + GIF,
}


@pytest.mark.parametrize("file", OTHERS.values(), ids=OTHERS)
def test_other_files_are_refused_by_their_content(file: bytes) -> None:
    with pytest.raises(UnsupportedImage):
        decode(file, PIXELS)


def test_of_a_file_that_is_two_only_the_pixels_get_in() -> None:
    """What follows the pixels (a ZIP, a page, a film) is never looked at, kept, or sent on."""
    for file in (JPEG, PNG, GIF):
        for tail in (b"PK\5\6" + bytes(18), b"<script>alert(1)</script>", PNG, bytes(10_000)):
            pixels = decode(file + tail, PIXELS).pixels
            np.testing.assert_array_equal(pixels, decode(file, PIXELS).pixels)
