"""What the counterattacks of `ttc` and `mac` share: signed steps that move pixels within a small
ball, away from the features that an attack may have reached."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.clip import PromptedCLIP
from models.tapt import Leaving


@dataclass(frozen=True, slots=True)
class MovedPixels:
    """Requests that leave together: indices, what is added to their pixels, steps taken."""

    rows: list[int]
    deltas: Tensor
    steps: int


def draw_noise(pixels: Tensor, seeds: Sequence[int], eps: float) -> Tensor:
    """Uniform noise in [-eps, eps] that keeps pixels [B, ..., 3, S, S] in [0, 1], one seed per
    request; drawn on the host, so that device and batch do not change it."""
    shape = pixels.shape[1:]
    drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return _confine(eps * (2 * torch.stack(drawn).to(pixels.device) - 1), pixels, eps)


def drift_ratio(projected: Tensor) -> Tensor:
    """How far noise moves the features, [B], as a share of their length.

    Args:
        projected: unnormalized features [B, 2, D] of the image, and of the image with noise.
    """
    still, shaken = projected.unbind(dim=1)
    ratio: Tensor = (shaken - still).norm(dim=-1) / still.norm(dim=-1)
    return ratio


def climb(
    clip: PromptedCLIP,
    pixels: Tensor,
    start: Tensor,
    still: Tensor,
    eps: float,
    stride: float,
    rows: list[int],
    leaving: Leaving,
) -> Iterator[tuple[list[int], Tensor]]:
    """Move views up the squared distance of their features from the original ones.

    Args:
        pixels, start: views [B, V, 3, S, S] in [0, 1], and the deltas that the steps start from.
        still: the unnormalized features [B, V, D] to move away from.
        eps, stride: radius of the ball and length of a step, of [0, 1] pixels.
        rows: the requests to move, as indices into B.

    Yields:
        Requests as they leave, and their deltas [steps + 1, n, V, 3, S, S]: the start, and those
        after each step.
    """
    trail = [start]
    while rows:
        leave = leaving(len(trail) - 1, rows)
        if out := [row for row in rows if row in leave.done]:
            yield out, torch.stack([delta[out] for delta in trail])
        rows = [row for row in rows if row not in leave.done | leave.dropped]
        if rows:
            delta = trail[-1].clone()
            delta[rows] = _step(clip, pixels[rows], trail[-1][rows], still[rows], eps, stride)
            trail.append(delta)


@torch.enable_grad()
def _step(
    clip: PromptedCLIP, pixels: Tensor, delta: Tensor, still: Tensor, eps: float, stride: float
) -> Tensor:
    """The next deltas [n, V, 3, S, S]: one stride up the squared distance from `still`."""
    delta = delta.detach().requires_grad_()
    moved = clip.encode_images(pixels + delta).projected
    (gradient,) = torch.autograd.grad((moved - still).square().sum(), delta)
    return _confine(delta.detach() + stride * gradient.sign(), pixels, eps)


def _confine(delta: Tensor, pixels: Tensor, eps: float) -> Tensor:
    """Deltas within eps whose pixels stay in [0, 1]."""
    return delta.clamp(-eps, eps).clamp(-pixels, 1 - pixels)
