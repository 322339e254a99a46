"""A defense's adaptation as a differentiable function of its views.

AdamW's first step is nearly a sign, whose derivative is zero almost everywhere: an attack that
took it as it is would see nothing, and the defense would look strong. Here the sign is smoothed.
"""

import torch
from torch import Tensor

from models import adamw, tapt
from models.attacks.attack import approximate
from models.clip import PromptedCLIP
from models.labels import LabelBatch
from models.objective import Objective
from models.prompts import DefensePrompts

SMOOTHING = 1.0  # of the sign, in root mean squares of a prompt's gradient


def unroll(
    clip: PromptedCLIP,
    views: Tensor,
    labels: LabelBatch,
    text: Tensor,
    prompts: DefensePrompts,
    objective: Objective,
    steps: int,
    adapted: DefensePrompts | None = None,
) -> DefensePrompts:
    """Prompts after `steps` steps on the kept views, with a gradient with respect to the views.

    Run it where attention has a second derivative: `sdpa_kernel(SDPBackend.MATH)`.

    Args:
        views, labels, text, prompts: as in `tapt.losses`; `prompts` are those before the steps.
        adapted: what the defense's own steps lead to; the values are then these, and only the
            gradient is that of the smoothed steps.
    """
    moving = objective.moving(prompts)
    values = {k: v.detach().requires_grad_(k in moving) for k, v in prompts.tensors.items()}
    moments = dict(adamw.begin(prompts.tensors))
    for step in range(1, steps + 1):
        here = prompts.map(values)
        if "text" in moving:
            text = clip.encode_labels(labels, here.text, graph=True)
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
    if adapted is not None:
        values = {k: approximate(adapted.tensors[k], value) for k, value in values.items()}
    return prompts.map(values)


def _advance(
    value: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    step: int,
    objective: Objective,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """As `adamw.advance`, with a softer denominator."""
    first = adamw.BETA1 * moments[0] + (1 - adamw.BETA1) * gradient
    second = adamw.BETA2 * moments[1] + (1 - adamw.BETA2) * gradient.square()
    spread = gradient.square().flatten(1).mean(dim=1).view(-1, *[1] * (gradient.dim() - 1))
    scale = (second / (1 - adamw.BETA2**step) + SMOOTHING**2 * spread + 1e-30).sqrt()
    rate = objective.learning_rate
    step_taken = rate / (1 - adamw.BETA1**step) * first / (scale + adamw.EPSILON)
    return value * (1 - rate * objective.weight_decay) - step_taken, (first, second)
