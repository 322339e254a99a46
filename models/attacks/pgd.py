"""Projected gradient descent (Madry et al., ICLR 2018), untargeted, L-infinity."""

from collections.abc import Callable

import torch
from torch import Tensor


def pgd(
    pixels: Tensor,
    loss: Callable[[Tensor], Tensor],
    epsilon: float,
    steps: int,
    step_size: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pixels [N, 3, S, S] in [0, 1], at most `epsilon` away, that raise the loss.

    Args:
        pixels: clean images in [0, 1]; `epsilon` and `step_size` are in the same scale.
        loss: maps pixels to a scalar, a sum over images so that they do not scale each other.
        generator: draws the random start within the ball; None starts at the clean image.
    """
    low, high = (pixels - epsilon).clamp(min=0), (pixels + epsilon).clamp(max=1)
    attacked = pixels
    if generator is not None:
        noise = torch.rand(pixels.shape, generator=generator).to(pixels.device)
        attacked = (pixels + (2 * noise - 1) * epsilon).clamp(0, 1)
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(attacked), attacked)
        attacked = (attacked + step_size * gradient.sign()).clamp(low, high)
    return attacked.detach()
