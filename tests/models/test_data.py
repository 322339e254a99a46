"""Pictures from folders and from parquet: names, labels, order, and errors in one sentence."""

import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

from models.data import (
    DataError,
    ParquetDataset,
    check_labels,
    class_names,
    decode_image,
    open_dataset,
    order,
)
from models.images.preprocess import BICUBIC, Preprocessing
from service.intake.decode import decode
from service.settings import Settings

COUNT = 7


def shade(label: int) -> Image.Image:
    return Image.new("RGB", (6, 4), (10 * label, 0, 0))


def png(label: int) -> bytes:
    buffer = io.BytesIO()
    shade(label).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, labels: list[int], names: list[str]) -> None:
    features = {"label": {"_type": "ClassLabel", "names": names}}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    images = [{"bytes": png(label), "path": None} for label in labels]
    table = pa.table({"image": images, "label": labels}).replace_schema_metadata(described)
    pq.write_table(table, path, row_group_size=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    for label, name in enumerate(["ant", "bee"]):
        (root / name).mkdir(parents=True)
        for i in range(2):
            shade(label).save(root / name / f"{i}.png")
    (root / "bee" / "notes.txt").write_text("not a picture")
    return root


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    root.mkdir()
    names = [f"class {i}" for i in range(COUNT)]
    write_parquet(root / "a.parquet", [0, 1, 2, 3], names)
    write_parquet(root / "b.parquet", [4, 5, 6], names)
    return root


def test_folder_names_its_classes_and_skips_what_is_no_picture(folder: Path) -> None:
    dataset = open_dataset(folder)
    assert dataset.names == ["ant", "bee"]
    assert [example.label for example in dataset] == [0, 0, 1, 1]
    assert len(dataset) == 4


def test_pictures_without_folders_have_no_labels(folder: Path) -> None:
    dataset = open_dataset(folder / "ant")
    assert dataset.names == []
    assert [example.label for example in dataset] == [-1, -1]


def test_shards_read_as_one_set(shards: Path) -> None:
    dataset = open_dataset(shards)
    assert dataset.names[6] == "class 6"
    examples = list(dataset)
    assert [example.label for example in examples] == list(range(COUNT))
    assert len(dataset) == COUNT
    assert examples[5].pixels.shape == (4, 6, 3)
    assert examples[5].pixels.dtype == np.uint8
    assert (examples[5].pixels[..., 0] == 50).all()


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_seed_gives_the_same_sample_of_the_whole(
    kind: str, request: pytest.FixtureRequest
) -> None:
    dataset = open_dataset(request.getfixturevalue(kind))

    def labels(limit: int | None, seed: int | None) -> list[int]:
        return [example.label for example in dataset.examples(limit, seed)]

    assert labels(3, 5) == labels(3, 5)
    assert len(labels(3, 5)) == 3
    assert sorted(labels(None, 1)) == sorted(labels(None, None))
    assert len({tuple(labels(3, seed)) for seed in range(8)}) > 1
    assert labels(2, None) == labels(None, None)[:2]


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("seed", [None, 3])
def test_every_nth_is_read_alone(
    kind: str, seed: int | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(request.getfixturevalue(kind))
    whole = [example.label for example in dataset.examples(5, seed)]
    decoded = Mock(wraps=decode_image)
    monkeypatch.setattr("models.data.decode_image", decoded)
    found = [example.label for example in dataset.examples(5, seed, first=1, every=2)]
    assert found == whole[1::2]
    assert decoded.call_count == len(found) == 2


def test_shuffled_pictures_keep_their_labels(shards: Path) -> None:
    for example in open_dataset(shards).examples(seed=3):
        assert (example.pixels[..., 0] == 10 * example.label).all()


@pytest.mark.parametrize("held", [1, 2, 3, 100])
def test_a_shuffled_read_holds_few_rows(
    shards: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """In the order that the seed draws, whatever is held."""
    expected = list(order(COUNT, None, 3))  # row n has label n
    row, read = ParquetDataset._row, []

    def note(*arguments: Any) -> Any:
        read.append(arguments[-1])
        return row(*arguments)

    monkeypatch.setattr("models.data.HELD", held)
    monkeypatch.setattr(ParquetDataset, "_row", note)
    for given, example in enumerate(open_dataset(shards).examples(seed=3)):
        assert example.label == expected[given]
        assert len(read) - given <= held
    assert sorted(read) == list(range(COUNT))


def test_class_names_fit_the_data(folder: Path) -> None:
    data, bare = open_dataset(folder), open_dataset(folder / "ant")
    assert class_names(data, "", folder) == ["ant", "bee"]
    assert class_names(data, "an ant,a bee,a cat", folder) == ["an ant", "a bee", "a cat"]
    assert class_names(bare, "ant,bee", folder) == ["ant", "bee"]
    for dataset, given, reason in (
        (data, "ant", "--labels names 1 of the 2 classes of"),
        (bare, "", "has no labels; name some with --labels"),
        (bare, "ant", "classification needs two"),
    ):
        with pytest.raises(DataError, match=reason):
            class_names(dataset, given, folder)


def test_labels_without_a_name_are_refused() -> None:
    check_labels([0, -1, 1], ["ant", "bee"], "data")
    with pytest.raises(DataError, match="names 2 classes, and data has a label 2"):
        check_labels([0, 2], ["ant", "bee"], "data")


def test_palette_pictures_come_as_rgb(tmp_path: Path) -> None:
    shade(3).convert("P").save(tmp_path / "palette.png")
    assert next(iter(open_dataset(tmp_path))).pixels.shape == (4, 6, 3)


def phone_picture() -> bytes:
    """A JPEG that lies on its side and says so."""
    image = Image.new("RGB", (60, 40), (220, 40, 30))
    image.paste((30, 60, 210), (0, 0, 30, 40))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return saved(image, "JPEG", exif=exif, quality=95)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PREPROCESSING = Preprocessing(64, 70, None, BICUBIC, (0.5,) * 3, (0.5,) * 3)
PICTURES = {
    "phone.jpg": phone_picture(),
    "gray.png": saved(
        Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)), "PNG"
    ),
    "clear.webp": saved(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "WEBP", lossless=True),
    "large.jpeg": saved(Image.effect_noise((1300, 900), 64).convert("RGB"), "JPEG"),
    "cmyk.tiff": saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"),
    "small.avif": saved(Image.new("RGB", (16, 16), (9, 99, 199)), "AVIF"),
    "old.bmp": saved(Image.new("RGB", (8, 8), (9, 99, 199)), "BMP"),
    "one.gif": saved(Image.new("P", (8, 8), 3), "GIF"),
}


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_decoded_as_the_service_decodes_them(
    tmp_path: Path, name: str, kind: str
) -> None:
    served = decode(PICTURES[name], Settings().max_image_pixels, preprocessing=PREPROCESSING)
    if kind == "folder":
        (tmp_path / name).write_bytes(PICTURES[name])
        data = open_dataset(tmp_path)
    else:
        rows = pa.array([{"bytes": PICTURES[name]}], pa.struct([("bytes", pa.binary())]))
        pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
        data = open_dataset(tmp_path / "a.parquet")
    (example,) = data.examples(preprocessing=PREPROCESSING)
    np.testing.assert_array_equal(example.pixels, served.pixels)
    assert served.view is not None
    np.testing.assert_array_equal(example.view, served.view)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "no images"),
        (lambda path: path.write_bytes(b"PAR1 but not really"), "not a readable parquet"),
        (lambda path: pq.write_table(pa.table({"text": ["a"]}), path), "no column image.bytes"),
    ],
)
def test_an_unreadable_path_is_one_sentence(tmp_path: Path, make: object, reason: str) -> None:
    path = tmp_path / "data"
    make(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=reason) as caught:
        open_dataset(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_picture_is_named(folder: Path) -> None:
    (folder / "ant" / "0.png").write_bytes(png(0)[:40])
    with pytest.raises(DataError, match=r"ant/0\.png"):
        list(open_dataset(folder))


def test_shards_of_other_classes_do_not_mix(shards: Path) -> None:
    write_parquet(shards / "c.parquet", [0], ["something else"])
    with pytest.raises(DataError, match="other classes"):
        open_dataset(shards)


def test_several_parquet_files_are_one_data_set(shards: Path) -> None:
    files = [shards / "b.parquet", shards / "a.parquet"]
    data = open_dataset(*files)
    assert len(data) == 7
    assert [example.label for example in data] == [4, 5, 6, 0, 1, 2, 3]


def test_parquet_without_pyarrow_says_what_to_install(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install .*-e .\.\[train\]"):
        ParquetDataset([shards / "a.parquet"])


def test_a_small_sample_passes_over_batches_without_any_of_it(tmp_path: Path) -> None:
    labels = [index % COUNT for index in range(600)]
    write_parquet(tmp_path / "many.parquet", labels, [f"class {i}" for i in range(COUNT)])
    assert len(list(open_dataset(tmp_path / "many.parquet").examples(1, seed=0))) == 1
