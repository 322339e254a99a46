"""The images of an evaluation: a random sample, or a shard of it."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from models.attacks.attack import LEVELS
from models.classifier import DefendedClassifier
from models.data import DataError, Dataset
from models.views import make_views


@dataclass(frozen=True)
class Subject:
    """An image to attack: view 0 of the original, uint8 [S, S, 3], its class, and its place in the
    sample."""

    image: NDArray[np.uint8]
    label: int
    place: int = 0

    @cached_property
    def name(self) -> str:
        """Identifies the image, whatever dataset it comes from."""
        return hashlib.sha256(self.image.tobytes() + str(self.label).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Shard:
    """Every `of`-th image of a sample, from the one at place `index` on."""

    index: int = 0
    of: int = 1


WHOLE = Shard()


def gather(
    classifier: DefendedClassifier,
    data: Dataset,
    limit: int | None,
    seed: int,
    shard: Shard = WHOLE,
) -> list[Subject]:
    """A shard of a random sample of labeled images, drawn by `seed`, as the model sees them.

    Raises:
        DataError: there are no images, or one has no label.
    """
    preprocessing, cpu = classifier.checkpoint.preprocessing, torch.device("cpu")
    subjects = []
    examples = data.examples(limit, seed, preprocessing, shard.index, shard.of)
    for number, example in enumerate(examples):
        if example.label < 0:
            raise DataError("an image without a label cannot be counted as right or wrong")
        view = make_views(example.pixels, 1, 0, preprocessing, cpu, example.view)[0]
        pixels = (view * LEVELS).round().byte().permute(1, 2, 0).contiguous().numpy()
        place = shard.index + number * shard.of
        subjects.append(Subject(pixels, example.label, place))
    if not subjects:
        raise DataError("there are no images to evaluate on")
    return subjects
