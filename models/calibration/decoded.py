"""Training images, decoded once into a memory-mapped file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.data import DataError, Dataset
from models.images.preprocess import Preprocessing
from models.views import make_views

CPU = torch.device("cpu")


def decode_once(
    data: Dataset,
    source: str,
    preprocessing: Preprocessing,
    cache: Path,
    report: Callable[[int], None],
) -> tuple[NDArray[np.uint8], Tensor]:
    """View 0 of all images, uint8 [N, 3, S, S] and memory-mapped, and their labels [N].

    The files in `cache` are used again where they were made of the same source with the same
    preprocessing.

    Args:
        source: names the data, to tell one data set's files from another's.
        report: told how many images are done.

    Raises:
        DataError: an image cannot be decoded, or the disk has no room for all.
    """
    side = preprocessing.crop
    made = {"source": source, "pictures": len(data), "preprocessing": repr(preprocessing)}
    images, labels, facts = (cache / name for name in ("images.npy", "labels.npy", "decoded.json"))
    if not facts.exists() or json.loads(facts.read_text()) != made:
        facts.unlink(missing_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        size, free = len(data) * 3 * side**2, shutil.disk_usage(cache).free
        if size > free:
            raise DataError(
                f"decoded images take {size / 2**30:.1f} GiB, and {cache} has "
                f"{free / 2**30:.1f} GiB left"
            )
        written = np.lib.format.open_memmap(
            images, mode="w+", dtype=np.uint8, shape=(len(data), 3, side, side)
        )
        found = np.empty(len(data), np.int64)
        for row, example in enumerate(data.examples(preprocessing=preprocessing)):
            view = make_views(example.pixels, 1, 0, preprocessing, CPU, example.view)[0]
            written[row], found[row] = (view * 255).round().byte().numpy(), example.label
            report(row + 1)
        written.flush()
        np.save(labels, found)
        # Written last and in one move: its presence says that the other files are whole.
        scratch = facts.with_suffix(".tmp")
        scratch.write_text(json.dumps(made))
        os.replace(scratch, facts)
    return np.load(images, mmap_mode="r"), torch.from_numpy(np.load(labels))
