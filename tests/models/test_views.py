"""Views against Pillow, and what draws them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from models.images.preprocess import Preprocessing
from models.views import WEIGHTS_AT_ONCE, draw_crops, make_batch_views, make_views
from tests import tiny

MEAN = STD = (0.5, 0.5, 0.5)


def preprocess(size: int, resample: int = 3) -> Preprocessing:
    return Preprocessing(size, size, None, resample, MEAN, STD)


def to_bytes(view: torch.Tensor) -> np.ndarray:
    return (view.permute(1, 2, 0) * 255).round().numpy().astype(int)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float()


@pytest.mark.parametrize("resample", [1, 2, 3])
@pytest.mark.parametrize(("height", "width", "size"), [(120, 91, 32), (30, 50, 64), (64, 64, 64)])
def test_view_zero_is_pillows_resize_and_centre_crop(
    resample: int, height: int, width: int, size: int
) -> None:
    image = tiny.draw_image(0, height - height % 6, width - width % 7)
    preprocessing = preprocess(size, resample)
    view = to_bytes(make_views(image, 1, 0, preprocessing, tiny.CPU)[0])
    tall, wide = preprocessing.resized(*image.shape[:2])
    whole = np.asarray(Image.fromarray(image).resize((wide, tall), resample)).astype(int)
    top, left = (tall - size) // 2, (wide - size) // 2
    difference = np.abs(view - whole[top : top + size, left : left + size])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.005


def test_the_other_views_are_pillows_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    image = tiny.draw_image(1, 96, 119)
    views = make_views(image, 20, 5, preprocess(32), tiny.CPU)
    boxes, flips = draw_crops(19, 5, *image.shape[:2])
    assert flips.any()
    assert not flips.all()
    for view, (top, left, height, width), flip in zip(views[1:], boxes, flips, strict=True):
        crop = Image.fromarray(image[top : top + height, left : left + width])
        expected = np.asarray(crop.resize((32, 32), 2)).astype(int)
        expected = expected[:, ::-1] if flip else expected
        assert np.abs(to_bytes(view) - expected).max() <= 1


@pytest.mark.parametrize("at_once", [0, 2**25], ids=["one by one", "together"])
def test_views_of_a_batch_are_those_of_each_image(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WEIGHTS_AT_ONCE, "cpu", at_once)
    sides = [(48, 64), (40, 40), (48, 64), (96, 80), (40, 40)]
    arrays = [tiny.draw_image(number, *side) for number, side in enumerate(sides)]
    firsts = [None, arrays[1][:32, :32], None, None, None]
    images: list[np.ndarray | torch.Tensor] = [*arrays[:2], to_tensor(arrays[2]), *arrays[3:]]
    alone = [
        make_views(image, 6, seed, preprocess(32), tiny.CPU, first)
        for seed, (image, first) in enumerate(zip(images, firsts, strict=True))
    ]
    batch = make_batch_views(images, 6, range(5), preprocess(32), tiny.CPU, firsts)
    # Where a value lies between two levels, the order of a sum may choose.
    assert ((batch - torch.stack(alone)).abs() > 1e-6).double().mean() < 1e-4


def test_each_image_of_a_batch_gets_its_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WEIGHTS_AT_ONCE, "cpu", 2**25)
    images = [to_tensor(tiny.draw_image(number, 40, 48)).requires_grad_() for number in range(3)]
    factors = torch.rand(3, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = make_batch_views(images, 4, range(3), preprocess(32), tiny.CPU)
    together = torch.autograd.grad((batch * factors).sum(), images)
    for seed, (image, factor, gradient) in enumerate(zip(images, factors, together, strict=True)):
        alone = make_views(image, 4, seed, preprocess(32), tiny.CPU)
        torch.testing.assert_close(gradient, torch.autograd.grad((alone * factor).sum(), image)[0])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (4000, 1), (7, 3)])
def test_any_shape_gives_views(height: int, width: int) -> None:
    image = np.full((height, width, 3), 200, np.uint8)
    views = make_views(image, 6, 0, preprocess(32), tiny.CPU)
    torch.testing.assert_close(views, torch.full_like(views, 200 / 255))


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.2, 0.4)])
def test_crops_lie_inside_and_cover_the_stated_area(area: tuple[float, float]) -> None:
    boxes, _ = draw_crops(500, 3, 80, 120, area)
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 80).all()
    assert (left + width <= 120).all()
    share = height * width / (80 * 120)
    least, most = area
    assert 0.9 * least < share.min() < 1.2 * least
    assert 0.8 * most < share.max() < 1.1 * most


def test_views_show_the_share_that_the_preprocessing_names() -> None:
    """A white square in the middle of black fills most of a small crop or none of it."""
    image = np.zeros((60, 60, 3), np.uint8)
    image[20:40, 20:40] = 255
    small = replace(preprocess(32), area=(0.08, 0.1))
    whole = replace(preprocess(32), area=(0.9, 1.0))
    near, far = (make_views(image, 30, 0, p, tiny.CPU)[1:].mean((1, 2, 3)) for p in (small, whole))
    assert near.max() > 0.6
    assert far.max() < 0.2


def test_a_crop_out_of_the_picture_is_black() -> None:
    """A processor may crop more than it resized to; transformers pads with zeros."""
    image = np.full((40, 40, 3), 255, np.uint8)
    view = make_views(image, 1, 0, Preprocessing(32, 16, None, 3, MEAN, STD), tiny.CPU)[0]
    assert view[:, 8:24, 8:24].min() == 1
    assert view[:, :8].max() == 0


def test_as_many_views_are_made_as_asked_for() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    for count in (1, 2, 3):
        views = make_views(image, count, 7, preprocess(32), torch.device("cpu"))
        assert views.shape == (count, 3, 32, 32)
