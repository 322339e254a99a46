"""Preprocessing as transformers does it: the same pixels, the same scores, or a refusal."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from transformers import AutoImageProcessor, CLIPModel, pipeline
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import get_image_size_for_max_height_width

from models.checkpoint import load_checkpoint
from models.classifier import DefendedClassifier, ImageQuery
from models.errors import LoadError
from models.export import write_checkpoint
from models.images import preprocess
from models.images.decode import MAX_SHORT_SIDE, decode
from models.images.preprocess import Preprocessing
from models.preprocessing import read_preprocessing
from models.shipped import EMBEDDED
from models.views import make_views
from tests import tiny

SIDE = 64  # pixels of the embedded model
LABELS = ("a cat", "an astronaut", "a rocket", "a cup of coffee")
PHOTOS = [data.chelsea(), data.astronaut()[:, 150:340]]
TINY = np.random.default_rng(0).integers(0, 256, (37, 21, 3), dtype=np.uint8)

RESIZES: dict[str, dict[str, Any]] = {
    "the shortest edge": {"size": {"shortest_edge": 64}},
    "the shortest edge to more than the crop": {"size": {"shortest_edge": 73}},
    "the shortest edge to less than the crop": {"size": {"shortest_edge": 41}},
    "the shortest edge, old style": {"size": 70},
    "the longest edge bounded": {"size": {"shortest_edge": 64, "longest_edge": 80}},
    "height and width": {"size": {"height": 64, "width": 64}},
    "height and width without a crop": {
        "size": {"height": 64, "width": 64},
        "do_center_crop": False,
    },
    "a list": {"size": [64, 64], "do_center_crop": False},
    "a list of three": {"size": [70, 90, 3]},
    "height and width, not square": {"size": {"height": 90, "width": 70}},
    "the longest edge, padded": {"size": {"max_height": 64, "max_width": 64}},
    "within a wide frame": {"size": {"max_height": 70, "max_width": 200}},
    "no resize": {"do_resize": False},
}
SCALES: dict[str, dict[str, Any]] = {
    "no normalization": {"do_normalize": False},
    "no rescale": {"do_rescale": False, "image_mean": [120, 115, 105], "image_std": [65, 66, 67]},
    "levels in [-1, 1]": {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
    "neither rescale nor normalization": {"do_rescale": False, "do_normalize": False},
    "one mean for all channels": {"image_mean": 0.5, "image_std": 0.5},
}
NULLS: dict[str, dict[str, Any]] = {
    name: {name: None}
    for name in (
        "do_resize",
        "do_rescale",
        "do_normalize",
        "do_convert_rgb",
        "image_processor_type",
    )
}
CASES: dict[str, dict[str, Any]] = {
    **RESIZES,
    **SCALES,
    **{f"{name}: null": values for name, values in NULLS.items()},
    **{f"filter {number}": {"resample": number} for number in range(6)},
    "filter 0, not square": {"resample": 0, "size": {"height": 100, "width": 80}},
    "filter 4, enlarged": {"resample": 4, "size": {"shortest_edge": 700}},
    "an old class name": {"feature_extractor_type": "CLIPFeatureExtractor"},
    "a fast class": {"image_processor_type": "CLIPImageProcessorFast"},
    "another class": {"image_processor_type": "ViTImageProcessor", "do_center_crop": True},
    "code of its own, beside a class of transformers": {
        "image_processor_type": None,
        "auto_map": {"AutoImageProcessor": "evil.Evil"},
    },
    "a padding that pads nothing": {"do_pad": True, "pad_size": {"height": 64, "width": 64}},
}
LARGE = [
    ("the shortest edge", "BMP"),
    ("the shortest edge", "JPEG"),
    ("height and width without a crop", "BMP"),
    ("the longest edge, padded", "BMP"),
    ("no resize", "BMP"),
]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another size": ({"crop_size": 32}, r"prepared as 32x32 pixels, but the model takes 64x64"),
    "no crop": ({"do_center_crop": False}, "keep their shape"),
    "not square": ({"do_center_crop": False, "size": {"height": 64, "width": 32}}, "64x32"),
    "size null": ({"size": None}, "`size`"),
    "the longest edge alone": ({"size": {"longest_edge": 64}}, "Size must contain"),
    "a list of one": ({"size": [64]}, "preprocessor_config.json: size: should be pixels"),
    "no size": ({"crop_size": {"height": None}}, "preprocessor_config.json: crop_size: should"),
    "an area": ({"size": {"min_pixels": 9, "max_pixels": 99}}, "min_pixels"),
    "a class that there is not": ({"image_processor_type": "Evil"}, "Unrecognized"),
    "mean null": ({"image_mean": None}, "`image_mean`"),
    "deviation null": ({"image_std": None}, "`image_std`"),
    "crop_size null": ({"crop_size": None}, "`crop_size`"),
    "crop null": ({"do_center_crop": None}, "keep their shape"),
    "filter null": ({"resample": None}, "`resample`"),
    "factor null": ({"rescale_factor": None}, "`rescale_factor`"),
    "no such key": ({"size": {"shortest": 64}}, "image preprocessing"),
    "no such filter": ({"resample": 9}, "image preprocessing: .*9"),
    "a huge padding": ({"do_pad": True, "pad_size": {"height": 10**6, "width": 10**6}}, "pad_size"),
    "padding beyond": (
        {"do_pad": True, "pad_size": {"height": 65, "width": 65}},
        r"shape \(3, 65, 65\)",
    ),
    "a huge size": ({"size": {"height": 10**6, "width": 10**6}}, "size.height"),
    "a mean of two channels": ({"image_mean": [0.5, 0.5]}, "image_mean"),
    "a scale of zero": ({"rescale_factor": 0}, "rescale_factor"),
    "padding": (
        {
            "size": {"height": 32, "width": 32},
            "crop_size": 32,
            "do_pad": True,
            "pad_size": {"height": 64, "width": 64},
        },
        "32x32",
    ),
    "a class that does otherwise": (
        {"image_processor_type": "ConvNextImageProcessor", "do_center_crop": True},
        "image preprocessing",
    ),
}


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    return CLIPModel.from_pretrained(EMBEDDED, dtype=torch.float32).eval()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    kept = ("config.json", "model.safetensors", "tokenizer*", "preprocessor_config.json")
    for pattern in kept:
        for file in EMBEDDED.glob(pattern):
            shutil.copy(file, tmp_path / file.name)
    return tmp_path


def change(directory: Path, values: dict[str, Any]) -> None:
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def prepare(
    preprocessing: Preprocessing, image: np.ndarray, view: np.ndarray | None = None
) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return (make_views(image, 1, 0, preprocessing, tiny.CPU, view)[0] - mean) / std


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_pixels_are_the_processors_and_scores_the_pipelines(
    directory: Path, model: CLIPModel, values: dict[str, Any]
) -> None:
    change(directory, values)
    checkpoint = load_checkpoint(str(directory), tiny.CPU)
    classifier = DefendedClassifier(checkpoint, None)
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    theirs = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=checkpoint.tokenizer,
        image_processor=processor,
    )
    for image in (*PHOTOS, TINY, PHOTOS[0][:SIDE, :SIDE]):
        picture = Image.fromarray(image)
        expected = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
        level = 1 / 255 / min(checkpoint.preprocessing.std)
        difference = (prepare(checkpoint.preprocessing, image) - expected).abs()
        assert (difference > 1.1 * level).float().mean() < 0.01  # rounding, or clipped overshoot
        # The service's decoder makes the same view in Pillow.
        view = preprocess.prepare(picture, picture.height, picture.width, checkpoint.preprocessing)
        given = prepare(checkpoint.preprocessing, image, view)
        torch.testing.assert_close(given, expected.float(), rtol=1e-5, atol=1e-5)
        (batch,) = classifier.prepare([ImageQuery(image, LABELS, view=view)], "plain")
        (found,) = classifier.classify(batch, 1)
        scores = theirs(picture, candidate_labels=LABELS, hypothesis_template="a photo of a {}.")
        pairs = {one["label"]: one["score"] for one in scores}
        ours = dict(zip(LABELS, found.probabilities.tolist(), strict=True))
        assert ours == pytest.approx(pairs, abs=1e-2)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph of 3300 x 2200 pixels with stripes and noise as fine as its pixels: a BMP, and a
    JPEG that lies on its side."""
    photo = Image.fromarray(data.astronaut()).resize((3300, 2200), Image.Resampling.BICUBIC)
    rows, columns = np.indices((2200, 3300))
    stripes = 30 * ((rows // 2 + columns) % 3 - 1) * (columns > 900)
    noise = np.random.default_rng(0).normal(0, 15, (2200, 3300))
    pixels = np.asarray(photo) + (stripes + noise)[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    folder = tmp_path_factory.mktemp("large")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "BMP", "BMP")
    image.save(folder / "JPEG", "JPEG", exif=exif, quality=90)
    return folder


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize(("shape", "kind"), LARGE, ids=repr)
def test_large_images_score_as_in_the_pipeline(
    directory: Path, model: CLIPModel, large: Path, shape: str, kind: str, resample: int
) -> None:
    change(directory, RESIZES[shape] | {"resample": resample})
    checkpoint = load_checkpoint(str(directory), tiny.CPU)
    theirs = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=checkpoint.tokenizer,
        image_processor=AutoImageProcessor.from_pretrained(directory, backend="pil"),
    )
    file = large / kind
    scores = theirs(str(file), candidate_labels=LABELS, hypothesis_template="a photo of a {}.")
    decoded = decode(file.read_bytes(), preprocessing=checkpoint.preprocessing)
    assert min(decoded.pixels.shape[:2]) == MAX_SHORT_SIDE
    query = ImageQuery(decoded.pixels, LABELS, view=decoded.view)
    classifier = DefendedClassifier(checkpoint, None)
    (batch,) = classifier.prepare([query], "plain")
    (found,) = classifier.classify(batch, 1)
    ours = dict(zip(LABELS, found.probabilities.tolist(), strict=True))
    exact = kind == "BMP" or resample in (0, 4)
    tolerance = 1e-4 if exact else 1e-2  # the other JPEGs are halved while they are decoded
    assert ours == pytest.approx({one["label"]: one["score"] for one in scores}, abs=tolerance)


def test_sizes_after_the_resize_are_those_of_transformers() -> None:
    draw = np.random.default_rng(0)
    plain = Preprocessing(64, None, None, 3, (0.0,) * 3, (1.0,) * 3)
    for height, width, short, more in draw.integers(1, 900, (5000, 4)).tolist():
        sides, long = (height, width), short + more
        pairs = {
            replace(plain, short_side=short): get_size_with_aspect_ratio(sides, short),
            replace(plain, short_side=short, long_side=long): get_size_with_aspect_ratio(
                sides, short, long
            ),
            replace(plain, within=(short, long)): get_image_size_for_max_height_width(
                sides, short, long
            ),
            replace(plain, size=(short, long)): (short, long),
            plain: sides,
        }
        for preprocessing, expected in pairs.items():
            found = preprocessing.resized(*sides)
            assert found == tuple(max(1, side) for side in expected), (preprocessing, sides)


@pytest.mark.parametrize(("values", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_in_a_sentence(
    directory: Path, values: dict[str, Any], reason: str
) -> None:
    change(directory, values)
    with pytest.raises(LoadError, match=reason) as caught:
        load_checkpoint(str(directory), tiny.CPU)
    assert "\n" not in str(caught.value)


ODD: list[Any] = [
    *(None, True, -1, 0, 1.5, "x", float("nan"), 1e30, 10**9),
    *([], [64], [64, 64], [64, 64, 64], [None, None], ["a", "b"]),
    *({}, {"x": 1}, {"height": 64}, {"shortest_edge": -3}, {"shortest_edge": None}),
]
NAMED = "transformers cannot use {file}|keep their shape|gray levels"
"""What is said where the field is not named."""


def refusal(directory: Path) -> str:
    """Why a directory's preprocessing is refused; empty if it is not."""
    try:
        read_preprocessing(directory, "name", 64)
    except LoadError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_odd_values_of_every_field_load_or_are_named(directory: Path, file: str) -> None:
    own = directory / "preprocessor_config.json"
    usual = json.loads(own.read_text())
    own.unlink()
    others = ("pad_size", "feature_extractor_type", "auto_map", "input_data_format", "to_dict")
    for field in (*usual, *others):
        for value in ODD:
            values = usual | {field: value}
            nested = values if file == own.name else {"image_processor": values}
            (directory / file).write_text(json.dumps(nested))
            said = refusal(directory)
            assert not said or re.search(rf"{field}|{NAMED.format(file=file)}", said), (
                field, value, said,
            )  # fmt: skip


@pytest.mark.parametrize("value", [None, [], "CLIPImageProcessor"])
def test_a_nested_processor_that_is_no_object_is_named(directory: Path, value: Any) -> None:
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": value}))
    with pytest.raises(LoadError, match=r"processor_config.json: image_processor"):
        read_preprocessing(directory, "name", 64)


def test_an_option_that_nobody_knows_is_found_by_comparing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(str(directory), tiny.CPU)
    processor = type(AutoImageProcessor.from_pretrained(directory, backend="pil"))
    resize = processor.resize
    monkeypatch.setattr(processor, "resize", lambda *a, **k: resize(*a, **k)[:, ::-1])
    with pytest.raises(LoadError, match=r"not supported: images differ by \d+\.\d gray"):
        load_checkpoint(str(directory), tiny.CPU)
    assert checkpoint.preprocessing.crop == SIDE


def test_a_processor_inside_the_other_file_is_read(directory: Path) -> None:
    own = directory / "preprocessor_config.json"
    values = json.loads(own.read_text()) | {"size": {"shortest_edge": 80}}
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    own.unlink()
    assert load_checkpoint(str(directory), tiny.CPU).preprocessing.short_side == 80


@pytest.mark.parametrize("shared", [None, {"processor_class": "CLIPProcessor"}])
def test_without_a_processor_the_settings_are_openais(
    directory: Path, shared: dict[str, Any] | None
) -> None:
    found = load_checkpoint(str(directory), tiny.CPU).preprocessing
    (directory / "preprocessor_config.json").unlink()
    if shared is not None:
        (directory / "processor_config.json").write_text(json.dumps(shared))
    assert load_checkpoint(str(directory), tiny.CPU).preprocessing == found


@pytest.mark.parametrize("values", [*RESIZES.values(), *SCALES.values(), {"resample": 0}])
def test_a_hardened_checkpoint_prepares_images_as_its_base(
    directory: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    change(directory, values)
    checkpoint = load_checkpoint(str(directory), tiny.CPU)
    write_checkpoint(
        checkpoint.clip.model, checkpoint.tokenizer, checkpoint.preprocessing, tmp_path / "out", {}
    )
    again = load_checkpoint(str(tmp_path / "out"), tiny.CPU).preprocessing
    for image in (PHOTOS[0], TINY):
        torch.testing.assert_close(
            prepare(again, image), prepare(checkpoint.preprocessing, image), rtol=1e-5, atol=1e-4
        )
