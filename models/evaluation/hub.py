"""Labeled images from a Hugging Face `datasets` id, if that package is installed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.data import DataError, Dataset, Example, decode_image, open_dataset, order, read_file
from models.errors import first_line
from models.images.preprocess import Preprocessing

IMAGES, LABELS = ("image", "img"), ("label", "labels", "fine_label")


def open_anywhere(name: str) -> Dataset:
    """Open a path as `open_dataset` does, or else a dataset id: `owner/name`, or `owner/name:split`
    if the split is not `test`.

    Raises:
        DataError: there is no such path, and no such data set or no package to load it with.
    """
    if Path(name).exists():
        return open_dataset(name)
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"no data at {name}: no such file or directory, and a data set's id needs the "
            "package `datasets`, which is not installed"
        ) from None
    path, _, split = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, split=split or "test")
        return HubDataset(loaded, datasets.Image(decode=False), name)
    except Exception as error:  # the package's readers may raise anything
        reason = first_line(error)
        raise DataError(f"{name} cannot be loaded as a data set: {reason}") from error


class HubDataset:
    """A loaded split with a column of images and one of classes.

    Args:
        files: the package's column type of images that are left as files.
    """

    def __init__(self, split: Any, files: Any, name: str) -> None:
        try:
            self._image = next(column for column in IMAGES if column in split.features)
            self._label = next(column for column in LABELS if column in split.features)
        except StopIteration:
            raise DataError(f"{name} has no columns of images and labels") from None
        self._name, self._split = name, split.cast_column(self._image, files)

    @property
    def names(self) -> list[str]:
        return [str(name) for name in getattr(self._split.features[self._label], "names", [])]

    def __len__(self) -> int:
        return len(self._split)

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
            row = self._split[int(index)]
            file = row[self._image]
            data = file["bytes"] or read_file(Path(file["path"]))
            image = decode_image(data, f"image {index} of {self._name}", preprocessing)
            yield Example(image.pixels, int(row[self._label]), image.view)
