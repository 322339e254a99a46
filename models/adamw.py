"""AdamW as a function of values, gradients and moments (Loshchilov and Hutter, ICLR 2019).

Elementwise and stateless, so that requests in one batch cannot affect each other.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

Values = Mapping[str, Tensor]
Moments = Mapping[str, tuple[Tensor, Tensor]]


def begin(values: Values) -> Moments:
    """The moments before the first step."""
    return {
        name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in values.items()
    }


def advance(
    values: Values, gradients: Values, moments: Moments, step: int, rate: float, decay: float
) -> tuple[Values, Moments]:
    """One step.

    Args:
        step: number of this step, from 1.
        rate, decay: learning rate and weight decay. A value without a gradient is not decayed.
    """
    moved, after = dict(values), dict(moments)
    for name, gradient in gradients.items():
        first, second = moments[name]
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient.square()
        scale = (second / (1 - BETA2**step)).sqrt() + EPSILON
        moved[name] = values[name] * (1 - rate * decay) - rate / (1 - BETA1**step) * first / scale
        after[name] = (first, second)
    return moved, after
