"""Augmentations stay images, treat each image by its own draw, and pass gradients."""

import numpy as np
import pytest
import torch

from models.defenses import augmentation
from models.defenses.augmentation import Draw, augment


def sources(*seeds: int) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in seeds]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def test_an_image_does_not_depend_on_its_company(images: torch.Tensor) -> None:
    together = augment(images, sources(1, 2, 3, 4))
    for row in range(4):
        alone = augment(images[row : row + 1], sources(row + 1))[0]
        torch.testing.assert_close(together[row], alone, atol=1e-6, rtol=0)
    assert 0 <= float(together.min()) <= float(together.max()) <= 1
    assert not torch.allclose(together, images, atol=0.05)


def test_a_source_goes_on(images: torch.Tensor) -> None:
    same = sources(1)
    first, second = (augment(images[:1], same) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "changed", ["affine", "brightness", "contrast", "saturation", "hue", "blur", "noise"]
)
def test_each_part_changes_something_and_none_changes_nothing(
    images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    still = {
        "affine": np.eye(2, 3, dtype=np.float32),
        "brightness": 1.0,
        "contrast": 1.0,
        "saturation": 1.0,
        "hue": 0.0,
        "blur": np.eye(5, dtype=np.float32)[2],
        "noise": np.zeros((3, 24, 24), np.float32),
    }
    moved = {
        "affine": np.array([[1, 0, 0.1], [0, 1, 0]], np.float32),
        "blur": np.full(5, 0.2, np.float32),
        "hue": 0.1,
        "noise": np.full((3, 24, 24), 0.01, np.float32),
    }
    gaps = []
    for parts in (still, still | {changed: moved.get(changed, 0.9)}):
        draw = Draw(**parts)
        monkeypatch.setattr(augmentation, "draw_augmentation", lambda *_, draw=draw: draw)
        gaps.append(float((augment(images, sources(1, 2, 3, 4)) - images).abs().max()))
    assert gaps[0] < 1e-5
    assert gaps[1] > 5e-3


def test_pixels_get_a_gradient(images: torch.Tensor) -> None:
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(augment(images, sources(1, 2, 3, 4)).sum(), images)
    assert float((gradient != 0).float().mean()) > 0.8
