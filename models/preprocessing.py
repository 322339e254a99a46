"""Read a checkpoint's image preprocessing as transformers reads it.

`AutoImageProcessor` interprets the file: old and new spellings, defaults, nulls. What it says is
then expressed as a `Preprocessing`, which makes views on the device, and compared with the
processor on two test images, so that an option nobody thought of is refused rather than ignored.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging as transformers_logging

from models.errors import LoadError, first_line
from models.file_schemas import ImageProcessorConfig, ImageProcessorFile, check, read_json
from models.images.preprocess import BICUBIC, Preprocessing
from models.views import KNOWN_FILTERS, make_views

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_DIFFERENCE = 1.0
"""Gray levels between a processor's pixels and ours; rounding alone makes 0.3."""

# Middle grays: no filter overshoots black or white, where the order of its two passes would count.
IMAGES = [
    np.random.default_rng(0).integers(80, 176, (*shape, 3), dtype=np.uint8)
    for shape in ((61, 97), (97, 61))
]


def read_preprocessing(directory: Path, name: str, side: int) -> Preprocessing:
    """The preprocessing of a transformers checkpoint; OpenAI's where its directory names none.

    Args:
        name: the checkpoint, for errors.
        side: of the square images that the model takes, in pixels.

    Raises:
        LoadError: the settings are malformed, or ask for what `Preprocessing` cannot do.
    """
    try:
        file = _find_file(directory)
        if file is None:
            return Preprocessing(side, side, None, BICUBIC, OPENAI_MEAN, OPENAI_STD)
        with _naming(file):
            processor = _load_processor(directory)
        settings = _settings(processor)
        with _naming(file):
            prepared = [processor(images=[image], return_tensors="pt") for image in IMAGES]
        preprocessing = _express(settings, side)
        for image, theirs in zip(IMAGES, prepared, strict=True):
            _compare(image, theirs["pixel_values"][0], preprocessing)
        return preprocessing
    except Exception as error:
        raise LoadError(f"{name}: image preprocessing: {_reason(error)}") from error


@contextlib.contextmanager
def _naming(file: str) -> Iterator[None]:
    """Raise whatever a value in the file makes transformers trip over as ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"transformers cannot use {file}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of an error, cut: it may hold the whole configuration."""
    return first_line(error)[:300]


def _load_processor(directory: Path) -> BaseImageProcessor:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would advise to install torchvision
    try:
        return AutoImageProcessor.from_pretrained(
            directory, backend="pil", local_files_only=True, trust_remote_code=False
        )
    finally:
        transformers_logging.set_verbosity(verbosity)


def _find_file(directory: Path) -> str | None:
    """Which of the two files that may hold the settings does. Raises ValueError."""
    own, shared = directory / "preprocessor_config.json", directory / "processor_config.json"
    if own.is_file():
        check(ImageProcessorFile, read_json(own), own.name)
    values = read_json(shared) if shared.is_file() else {}
    if "image_processor" not in values:
        return own.name if own.is_file() else None
    if not isinstance(values["image_processor"], dict):
        raise ValueError(f"{shared.name}: image_processor: Input should be an object")
    check(ImageProcessorFile, values["image_processor"], shared.name)
    return shared.name


def _settings(processor: BaseImageProcessor) -> ImageProcessorConfig:
    """The attributes of a processor, within bounds. Raises ValueError."""
    values = {field: getattr(processor, field, None) for field in ImageProcessorConfig.model_fields}
    sizes = {field: dict(values[field] or {}) for field in ("size", "crop_size", "pad_size")}
    return check(ImageProcessorConfig, values | sizes, "the processor's settings")


def _express(settings: ImageProcessorConfig, side: int) -> Preprocessing:
    """The settings for a model that takes side x side pixels. Raises ValueError."""
    size, crop = settings.size, settings.crop_size
    resize: dict[str, Any] = {}
    if settings.do_resize:
        match size.named:
            case {"shortest_edge": short, **rest} if rest.keys() <= {"longest_edge"}:
                resize = {"short_side": short, "long_side": rest.get("longest_edge")}
            case {"height": height, "width": width, **rest} if not rest:
                resize = {"size": (height, width)}
            case {"max_height": height, "max_width": width, **rest} if not rest:
                resize = {"within": (height, width)}
            case other:
                raise ValueError(f"a size of {other} is not supported")
    if settings.do_center_crop:
        made = crop.height, crop.width
    elif settings.do_resize and size.height is not None:
        made = size.height, size.width
    else:
        raise ValueError(f"images keep their shape, but the model takes {side}x{side} pixels")
    if made != (side, side):
        raise ValueError(
            f"images are prepared as {made[0]}x{made[1]} pixels, but the model takes {side}x{side}"
        )
    if settings.resample not in KNOWN_FILTERS:
        raise ValueError(f"the filter {settings.resample} is unknown")
    # Views hold levels in [0, 1]. Any other scale is the same as another mean and deviation.
    scale = 255 * ((settings.do_rescale and settings.rescale_factor) or 1.0)
    mean = (settings.do_normalize and settings.image_mean) or (0.0, 0.0, 0.0)
    std = (settings.do_normalize and settings.image_std) or (1.0, 1.0, 1.0)
    return Preprocessing(
        crop=side,
        short_side=resize.pop("short_side", None),
        size=resize.pop("size", None),
        resample=settings.resample,
        mean=(mean[0] / scale, mean[1] / scale, mean[2] / scale),
        std=(std[0] / scale, std[1] / scale, std[2] / scale),
        **resize,
    )


def _compare(image: NDArray[np.uint8], theirs: Tensor, preprocessing: Preprocessing) -> None:
    """Raise ValueError unless an image is prepared as a processor prepared it."""
    ours = make_views(image, 1, 0, preprocessing, torch.device("cpu"))[0]
    if theirs.shape != ours.shape:
        raise ValueError(f"images are prepared as values of shape {tuple(theirs.shape)}")
    mean = torch.tensor(preprocessing.mean).view(3, 1, 1)
    std = torch.tensor(preprocessing.std).view(3, 1, 1)
    difference = 255 * float((theirs.float() * std + mean - ours).abs().mean())
    if not difference <= MEAN_DIFFERENCE:
        raise ValueError(
            "an option of the image processor is not supported: images differ by "
            f"{difference:.1f} gray levels"
        )
