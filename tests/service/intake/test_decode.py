"""The door for images: what goes in, what is refused, and with which error."""

import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, features
from skimage import data

from models.images.decode import FORMATS, MAX_ASPECT, MAX_LONG_SIDE, MAX_PIXELS, MAX_SHORT_SIDE
from service.errors import BadRequest, ServiceError, TooLarge, Unprocessable, UnsupportedImage
from service.intake import decode as service_decode
from service.settings import Settings

PIXELS = 40_000_000
PHOTO = Image.fromarray(data.chelsea()).resize((96, 64))  # a photograph, wider than tall


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises more than it holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def decode(file: bytes, max_pixels: int) -> NDArray[np.uint8]:
    return service_decode.decode(file, max_pixels).pixels


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_pixels_that_pillow_sees(kind: str) -> None:
    file = encode(PHOTO, kind)
    array = decode(file, PIXELS)
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))
    assert np.abs(array.astype(int) - np.asarray(PHOTO)).mean() < 12


def test_avif_is_accepted_where_pillow_has_it() -> None:
    assert ("AVIF" in FORMATS) == features.check("avif")


WITHOUT_HEIC = """
import sys
sys.modules["pillow_heif"] = None
from models.errors import UnsupportedImage
from models.images.decode import FORMATS, decode
assert "HEIF" not in FORMATS
for brand in (b"heic", b"heix", b"mif1", b"hevc"):
    try:
        decode(b"\\0\\0\\0\\x18ftyp" + brand + bytes(100))
    except UnsupportedImage as error:
        print(error)
"""


def test_without_its_extra_a_heic_is_refused_by_name() -> None:
    lines = subprocess.check_output([sys.executable, "-c", WITHOUT_HEIC], text=True).splitlines()
    assert len(lines) == 4
    assert all("HEIC" in line and "tapt-serve[heic]" in line for line in lines)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_heic_is_upright_like_a_jpeg(orientation: int) -> None:
    """Encoders write the orientation twice: as a transformation, which counts, and as EXIF."""
    pytest.importorskip("pillow_heif", reason="NOT CHECKED: install the extra `heic`")
    exif = Image.Exif()
    exif[0x0112] = orientation
    tag = exif.tobytes()
    heic, jpeg = (decode(encode(PHOTO, kind, exif=tag), PIXELS) for kind in ("HEIF", "JPEG"))
    assert heic.shape == jpeg.shape
    assert np.abs(heic.astype(int) - jpeg).mean() < 12


def test_a_heic_that_is_larger_than_its_header_is_refused() -> None:
    pytest.importorskip("pillow_heif", reason="NOT CHECKED: install the extra `heic`")
    file = bytearray(encode(PHOTO, "HEIF"))
    at = file.index(b"ispe") + 8
    file[at : at + 8] = struct.pack(">II", 16, 16)
    with pytest.raises(BadRequest):
        decode(bytes(file), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_modes_equal_the_pipelines_conversion(mode: str) -> None:
    file = encode(PHOTO.convert(mode), "PNG")
    expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    np.testing.assert_array_equal(decode(file, PIXELS), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF", "GIF"])
def test_a_black_disc_on_transparent_ground_is_seen_on_white(kind: str) -> None:
    disc = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    ImageDraw.Draw(disc).ellipse((15, 15, 45, 45), fill=(0, 0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {}
    pixels = decode(encode(disc, kind, **options), PIXELS).astype(int)
    assert np.abs(pixels[30, 30]).max() < 4
    assert np.abs(pixels[2, 2] - 255).max() < 4


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "PA", "L", "RGB", "1"])
def test_transparency_is_composited_on_white(mode: str) -> None:
    if mode in ("LA", "RGBA"):
        image = PHOTO.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
        file = encode(image, "PNG")
    elif mode == "PA":
        image = PHOTO.quantize(16).convert("PA")
        image.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
        file = encode(image, "TIFF")
    elif mode == "P":
        file = encode(PHOTO.quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))
    else:
        image = PHOTO.convert(mode)
        file = encode(image, "PNG", transparency=image.getpixel((5, 5)))
    rgba = np.asarray(Image.open(io.BytesIO(file)).convert("RGBA")).astype(float)
    colors, alpha = rgba[..., :3], rgba[..., 3:] / 255
    assert 0 < alpha.mean() < 1
    expected = colors * alpha + 255 * (1 - alpha)
    assert np.abs(decode(file, PIXELS) - expected).max() <= 1


def test_colors_behind_full_transparency_do_not_show_after_a_resize() -> None:
    image = Image.new("RGBA", (1200, 1200), (255, 0, 0, 0))
    assert (decode(encode(image, "PNG"), PIXELS) == 255).all()


def test_an_opaque_palette_keeps_its_colors() -> None:
    palette = PHOTO.quantize(16)
    file = encode(palette, "PNG", transparency=bytes([255] * 16))
    np.testing.assert_array_equal(decode(file, PIXELS), np.asarray(palette.convert("RGB")))


def test_data_sets_and_the_service_accept_images_of_one_size() -> None:
    assert Settings().max_image_pixels == MAX_PIXELS


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    array = decode(encode(Image.fromarray(ramp), kind), PIXELS)
    np.testing.assert_array_equal(array[..., 0], np.rint(ramp / 257))
    np.testing.assert_array_equal(array[..., 0], array[..., 2])


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_samples_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(UnsupportedImage, match=mode):
        decode(encode(Image.new(mode, (8, 8)), "TIFF"), PIXELS)


def test_cmyk_jpeg() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(decode(encode(red, "JPEG"), PIXELS).astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_honored(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    plain = decode(encode(PHOTO, kind, **options), PIXELS)
    turned = decode(encode(PHOTO, kind, exif=exif, **options), PIXELS)
    undo = {  # what a viewer does with each value of the tag
        1: plain,
        2: plain[:, ::-1],
        3: plain[::-1, ::-1],
        4: plain[::-1],
        5: plain.swapaxes(0, 1),
        6: np.rot90(plain, -1),
        7: plain[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(plain),
    }
    np.testing.assert_array_equal(turned, undo[orientation])


def test_broken_exif_does_not_refuse_a_good_image() -> None:
    file = encode(PHOTO, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in service, where Pillow's warnings are no errors
        assert decode(file, PIXELS).shape == (64, 96, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((200, 0, 0), (0, 200, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(file, PIXELS) == (200, 0, 0)).all()


def test_images_within_the_door_are_untouched() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (MAX_SHORT_SIDE, 700, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(noise), "PNG"), PIXELS), noise)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((2048, 1024), (1024, 512)),
        ((1024, 2048), (512, 1024)),
        ((MAX_LONG_SIDE * 2, 400), (MAX_LONG_SIDE, 200)),
        ((513, 513), (512, 512)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_larger_images_are_scaled_to_the_door(
    kind: str, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    array = decode(encode(Image.new("RGB", size, (9, 99, 199)), kind), PIXELS)
    assert array.shape == (expected[1], expected[0], 3)
    assert np.abs(array.astype(int) - (9, 99, 199)).max() < 4


def test_scaling_is_antialiased() -> None:
    checkers = np.indices((2048, 2048)).sum(0) % 2 * np.uint8(255)
    array = decode(encode(Image.fromarray(checkers.astype(np.uint8)), "PNG"), PIXELS)
    assert np.abs(array.astype(int) - 127).max() <= 2


def test_one_pixel() -> None:
    assert decode(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), PIXELS).tolist() == [
        [[1, 2, 3]]
    ]


def test_absurd_sides_are_refused_clearly() -> None:
    assert decode(encode(Image.new("L", (MAX_ASPECT, 1)), "PNG"), PIXELS).shape == (1, 50, 3)
    with pytest.raises(Unprocessable, match="1x30000"):
        decode(encode(Image.new("L", (1, 30000)), "PNG"), PIXELS)


@pytest.mark.parametrize("size", [(8000, 8000), (60000, 60000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(TooLarge, match="pixels"):
        decode(png_header(*size), PIXELS)


def test_a_header_may_promise_more_pixels_than_there_are() -> None:
    with pytest.raises(BadRequest, match="damaged"):
        decode(png_header(3000, 3000), PIXELS)


def test_empty() -> None:
    with pytest.raises(BadRequest, match="empty"):
        decode(b"", PIXELS)


@pytest.mark.parametrize(
    "file",
    [
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        encode(PHOTO, "ICO"),
        encode(PHOTO, "PPM"),
        encode(PHOTO, "PCX"),
    ],
    ids=["text", "svg", "pdf", "ico", "ppm", "pcx"],
)
def test_other_files_are_no_images_here(file: bytes) -> None:
    with pytest.raises(UnsupportedImage, match="JPEG, PNG"):
        decode(file, PIXELS)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    file = encode(PHOTO, kind)
    with pytest.raises(BadRequest, match="damaged"):
        decode(file[: max(16, int(len(file) * share))], PIXELS)


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=40, deadline=None, database=None)
@given(random=st.randoms(use_true_random=False))
def test_a_damaged_file_never_raises_anything_else(kind: str, random: object) -> None:
    file = bytearray(encode(PHOTO, kind))
    for _ in range(random.randint(1, 30)):  # type: ignore[attr-defined]
        at = random.randrange(len(file))  # type: ignore[attr-defined]
        file[at] = random.randrange(256)  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of some damage and decodes all the same
        try:
            array = decode(bytes(file), 4_000_000)
        except ServiceError:
            return
    assert array.ndim == 3
    assert array.shape[2] == 3
