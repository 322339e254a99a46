"""A defense's adaptation as a differentiable function of its views.

AdamW's first step is nearly a sign, whose derivative is zero almost everywhere: an attack through
the exact step would see no gradient, and the defense would look strong. Here the sign is smoothed.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from models import adamw, tapt
from models.attacks.attack import approximate
from models.clip import PromptedCLIP
from models.labels import LabelBatch
from models.prompts import DefensePrompts
from models.tapt import Departure, Leaving, Objective

SMOOTHING = 1.0  # of the sign, in root mean squares of a prompt's gradient


def adapt_unrolled(
    clip: PromptedCLIP,
    views: Tensor,
    labels: LabelBatch,
    text: Tensor,
    prompts: DefensePrompts,
    objective: Objective,
    leaving: Leaving,
    images: Tensor | None = None,
) -> Iterator[Departure]:
    """As `tapt.adapt`, with the same values; the gradient is that of the smoothed steps."""
    for departure in tapt.adapt(clip, views, labels, text, prompts, objective, leaving, images):
        if departure.steps and torch.is_grad_enabled():
            rows, steps = departure.rows, departure.steps
            own = views[rows], labels.select(rows), labels.take(text, rows), prompts.select(rows)
            smooth = unroll(clip, *own, objective, steps).tensors
            exact = departure.prompts.tensors
            values = {name: approximate(exact[name], smooth[name]) for name in exact}
            departure = replace(departure, prompts=prompts.map(values))
        yield departure


def unroll(
    clip: PromptedCLIP,
    views: Tensor,
    labels: LabelBatch,
    text: Tensor,
    prompts: DefensePrompts,
    objective: Objective,
    steps: int,
) -> DefensePrompts:
    """Prompts after `steps` smoothed steps on the kept views, with a gradient to the views.

    Run it where attention has a second derivative: `sdpa_kernel(SDPBackend.MATH)`.

    Args:
        views, labels, text, prompts: as in `tapt.losses`; `prompts` are those before the steps.
    """
    moving = objective.moving(prompts)
    values = {k: v.detach().requires_grad_(k in moving) for k, v in prompts.tensors.items()}
    moments = dict(adamw.begin(prompts.tensors))
    for step in range(1, steps + 1):
        here = prompts.map(values)
        if "text" in moving:
            text = clip.encode_labels(labels, here.text)
        _, loss = tapt.losses(clip, views, labels, text, here, objective)
        names = sorted(moving)
        inputs = [values[name] for name in names]
        found = torch.autograd.grad(loss.sum(), inputs, create_graph=True, allow_unused=True)
        values = dict(values)
        for name, gradient in zip(names, found, strict=True):
            if gradient is None:
                continue
            moved, moments[name] = _advance(values[name], gradient, moments[name], step, objective)
            values[name] = moved
    return prompts.map(values)


def _advance(
    value: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    step: int,
    objective: Objective,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """As `adamw.advance` for one tensor, with a larger denominator."""
    first = adamw.BETA1 * moments[0] + (1 - adamw.BETA1) * gradient
    second = adamw.BETA2 * moments[1] + (1 - adamw.BETA2) * gradient.square()
    spread = gradient.square().flatten(1).mean(dim=1).view(-1, *[1] * (gradient.dim() - 1))
    scale = (second / (1 - adamw.BETA2**step) + SMOOTHING**2 * spread + 1e-30).sqrt()
    rate = objective.learning_rate
    step_taken = rate / (1 - adamw.BETA1**step) * first / (scale + adamw.EPSILON)
    return value * (1 - rate * objective.weight_decay) - step_taken, (first, second)
