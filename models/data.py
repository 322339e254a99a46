"""Labeled images from disk: `ImageFolder` directories and Hugging Face style parquet, streamed.

Images are decoded on demand and parquet is read in parts, so that a dataset may be larger than
memory. A shuffled read of parquet holds at most `HELD` encoded images and one row group; it passes
over the files once for every `HELD` images.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from models.errors import ImageError, install_extra
from models.images.decode import SUFFIXES, DecodedImage, decode
from models.images.preprocess import Preprocessing

Pixels = npt.NDArray[np.uint8]
Row = tuple[str, bytes, int]
"""Where an image is from, its encoded bytes and its label."""

HELD = 8192  # encoded images of a shuffled read in memory: about 1 GB of ImageNet's


class DataError(Exception):
    """A dataset cannot be read; the message is one sentence with the path and the reason."""


@dataclass(frozen=True)
class Example:
    """One image and its class.

    `pixels` and `view` are those of a `DecodedImage`, as the service decodes it; `label` indexes
    the dataset's `names`, or is -1 if there is no label.
    """

    pixels: Pixels
    label: int
    view: Pixels | None = None


class Dataset(Protocol):
    """What `open_dataset` returns: a length, class names, and examples in a chosen order."""

    @property
    def names(self) -> list[str]:
        """Class names in the order of the labels; empty if the data has no labels."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Example]: ...

    def examples(
        self,
        limit: int | None = None,
        seed: int | None = None,
        preprocessing: Preprocessing | None = None,
        first: int = 0,
        every: int = 1,
    ) -> Iterator[Example]:
        """Yield at most `limit` examples, in stored order or shuffled by `seed`.

        The same seed gives the same examples; a limit with a seed is a random sample. Only those at
        the places `first`, `first + every` and so on are read. `preprocessing` is that of the
        checkpoint that the images are for; without it there are no views. Raises DataError at the
        first image that cannot be decoded.
        """


def open_dataset(path: str | Path, *more: str | Path) -> Dataset:
    """Open one or several parquet files, a directory of parquet shards, or a directory with one
    folder per class.

    A directory of images without folders is a dataset without labels. Raises DataError if the path
    is none of these.
    """
    path = Path(path)
    if more:
        return ParquetDataset([path, *map(Path, more)])
    if path.is_file():
        return ParquetDataset([path])
    if not path.is_dir():
        raise DataError(f"no data at {path}: there is no such file or directory")
    shards = sorted(path.glob("*.parquet"))
    return ParquetDataset(shards) if shards else FolderDataset(path)


class FolderDataset:
    """A directory with one folder per class, or of unlabeled images."""

    def __init__(self, root: Path) -> None:
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
        self._names = [folder.name for folder in folders]
        self._files = [
            (file, label) for label, folder in enumerate(folders) for file in _images(folder)
        ]
        if not folders:
            self._files = [(file, -1) for file in _images(root)]
        if not self._files:
            raise DataError(f"no images under {root}: expected parquet files or a folder a class")

    @property
    def names(self) -> list[str]:
        return self._names

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Example]:
        return self.examples()

    def examples(
        self,
        limit: int | None = None,
        seed: int | None = None,
        preprocessing: Preprocessing | None = None,
        first: int = 0,
        every: int = 1,
    ) -> Iterator[Example]:
        for index in order(len(self), limit, seed)[first::every]:
            file, label = self._files[index]
            image = decode_image(read_file(file), str(file), preprocessing)
            yield Example(image.pixels, label, image.view)


class ParquetDataset:
    """Parquet files in the Hugging Face layout: `image.bytes`, and `label` if there is one."""

    def __init__(self, files: list[Path]) -> None:
        self._parquet = _import_parquet()
        self._files = files
        self._groups: list[list[int]] = []  # the number of rows of each row group, by file
        self._names: list[str] = []
        for file in files:
            opened = self._open(file)
            self._check(file, opened.schema_arrow)
            names = _class_names(opened.schema_arrow.metadata)
            if self._groups and names != self._names:
                raise DataError(f"{file} names other classes than {files[0]}")
            self._names = names
            parts = opened.metadata
            self._groups.append([parts.row_group(i).num_rows for i in range(parts.num_row_groups)])

    @property
    def names(self) -> list[str]:
        return self._names

    def __len__(self) -> int:
        return sum(map(sum, self._groups))

    def __iter__(self) -> Iterator[Example]:
        return self.examples()

    def examples(
        self,
        limit: int | None = None,
        seed: int | None = None,
        preprocessing: Preprocessing | None = None,
        first: int = 0,
        every: int = 1,
    ) -> Iterator[Example]:
        picked = order(len(self), limit, seed)[first::every]
        in_order = seed is None and every == 1 and first == 0
        rows = self._stream(len(picked)) if in_order else self._pick(picked)
        for where, data, label in rows:
            image = decode_image(data, where, preprocessing)
            yield Example(image.pixels, label, image.view)

    def _stream(self, count: int) -> Iterator[Row]:
        row = 0
        for file in self._files:
            opened = self._open(file)
            for batch in opened.iter_batches(batch_size=256, columns=self._columns(opened)):
                for record in batch.to_pylist():
                    if row == count:
                        return
                    yield self._row(file, record, row)
                    row += 1

    def _pick(self, order: Sequence[int]) -> Iterator[Row]:
        """The rows in this order, of which at most `HELD` are in memory."""
        for start in range(0, len(order), HELD):
            part = order[start : start + HELD]
            held = dict(self._find(set(part)))
            for index in part:
                yield held.pop(index)

    def _find(self, wanted: set[int]) -> Iterator[tuple[int, Row]]:
        """Some rows with their indices, in stored order, from the row groups that have any."""
        row = 0
        for file, groups in zip(self._files, self._groups, strict=True):
            opened = None
            for group, length in enumerate(groups):
                if wanted.isdisjoint(range(row, row + length)):
                    row += length
                    continue
                opened = opened or self._open(file)
                columns = self._columns(opened)
                for batch in opened.iter_batches(256, row_groups=[group], columns=columns):
                    chosen = [i for i in range(batch.num_rows) if row + i in wanted]
                    # An empty list has no type that arrow could take by.
                    records = batch.take(chosen).to_pylist() if chosen else []
                    for i, record in zip(chosen, records, strict=True):
                        yield row + i, self._row(file, record, row + i)
                    row += batch.num_rows

    def _row(self, file: Path, record: dict[str, Any], row: int) -> Row:
        data, label = record["image"]["bytes"], record.get("label")
        if data is None:
            raise DataError(f"{file} holds no bytes for image {row}")
        return f"image {row} of {file}", data, -1 if label is None else int(label)

    def _columns(self, opened: Any) -> list[str]:
        return [name for name in ("image", "label") if name in opened.schema_arrow.names]

    def _open(self, file: Path) -> Any:
        try:
            return self._parquet.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is not a readable parquet file") from error

    def _check(self, file: Path, schema: Any) -> None:
        image = schema.field("image").type if "image" in schema.names else None
        if image is None or image.num_fields == 0 or image.get_field_index("bytes") < 0:
            raise DataError(f"{file} has no column image.bytes, the Hugging Face image layout")


def class_names(data: Dataset, given: str, source: object) -> list[str]:
    """The class names to classify into: those of `--labels`, or else the data's own.

    Args:
        given: the value of `--labels`, separated by commas, or nothing.
        source: names the data, for errors.

    Raises:
        DataError: there are fewer than two, or fewer than the data has classes.
    """
    names = given.split(",") if given else data.names
    if not names:
        raise DataError(f"{source} has no labels; name some with --labels")
    if len(names) < len(data.names):
        raise DataError(f"--labels names {len(names)} of the {len(data.names)} classes of {source}")
    if len(names) < 2:
        where = "--labels names" if given else f"{source} has"
        raise DataError(f"{where} one class; classification needs two")
    return names


def check_labels(labels: Sequence[int], names: Sequence[str], source: object) -> None:
    """Raises DataError if a label is no index into the names, which parquet without class names
    does not tell beforehand; -1 is no label."""
    if (highest := max(labels, default=-1)) >= len(names):
        raise DataError(f"--labels names {len(names)} classes, and {source} has a label {highest}")


def _import_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"parquet needs pyarrow, which is not installed: {install_extra('train')}"
        ) from error
    return pyarrow.parquet


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str]:
    described = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    label = described.get("info", {}).get("features", {}).get("label", {})
    return [str(name) for name in label.get("names", [])]


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def order(count: int, limit: int | None, seed: int | None) -> range | list[int]:
    """Which of `count` examples come, and in which order: see `Dataset.examples`."""
    if limit is not None and limit < 0:
        raise ValueError(f"limit must not be negative, got {limit}")
    kept = count if limit is None else min(limit, count)
    if seed is None:
        return range(kept)
    return random.Random(seed).sample(range(count), kept)


def read_file(file: Path) -> bytes:
    """The bytes of a file. Raises DataError."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def decode_image(
    data: bytes, where: str, preprocessing: Preprocessing | None = None
) -> DecodedImage:
    """As `models.images.decode.decode`. Raises DataError, which names the image by `where`."""
    try:
        return decode(data, preprocessing=preprocessing)
    except ImageError as error:
        raise DataError(f"{where} is not an image that can be decoded: {error}") from error
