"""Learn what answers an image: half of the images of a batch are attacked through all of it."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models import adamw
from models.attacks.pgd import ascend
from models.readout import mean_log_prediction

SAVE_SECONDS = 30.0

Values = dict[str, Tensor]
Answer = Callable[[Tensor, Sequence[int]], Tensor]
"""Pixels [N, 3, S, S] in [0, 1] and the seeds of their views to logits [N, V, C], with a
gradient."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the step is learned.

    `epsilon` is in [0, 1] pixels; `reach` is the total length of all attack steps, in epsilons.
    """

    steps: int = 120
    batch: int = 16
    views: int = 4
    epsilon: float = 2 / 255
    attack_steps: int = 1
    reach: float = 1.25
    seed: int = 0


Moments = dict[str, tuple[Tensor, Tensor]]


def learn(
    make: Callable[[Values], Answer],
    values: Values,
    rates: Mapping[str, float],
    pixels: Tensor,
    targets: Tensor,
    plan: Plan,
    state: Path,
    settings: dict[str, Any],
) -> Values:
    """Go through the images once, with AdamW at rates that fall to 0, and return the values.

    A run that was stopped goes on from the file `state`, if its settings are the same.

    Args:
        make: values to what answers with them.
        values: to begin with.
        rates: learning rates of the values that are learned; the others stay.
        pixels: view 0 of the images, uint8 [steps * batch, 3, S, S]; `targets` their classes.
    """
    settings = {**settings, "plan": asdict(plan)}
    first, moments = 0, dict(adamw.begin({name: values[name] for name in rates}))
    if (found := _resume(state, settings)) is not None:
        first, values, moments = found
    saved = time.monotonic()
    for number in range(first, plan.steps):
        own = slice(number * plan.batch, (number + 1) * plan.batch)
        batch = pixels[own].float() / 255
        loss, gradients = _gradients(make, values, list(rates), batch, targets[own], plan, number)
        for name, rate in rates.items():
            one, gradient = {name: values[name]}, {name: gradients[name]}
            rate *= 1 - number / plan.steps
            moved, after = adamw.advance(one, gradient, moments, number + 1, rate, 0.0)
            values, moments[name] = {**values, **moved}, after[name]
        print(f"{state.stem}: {number + 1} of {plan.steps}, loss {loss:.3f}", file=sys.stderr)
        if time.monotonic() > saved + SAVE_SECONDS or number + 1 == plan.steps:
            _save(state, settings, number + 1, values, moments)
            saved = time.monotonic()
    return values


def attack(
    answer: Answer,
    pixels: Tensor,
    targets: Tensor,
    epsilon: float,
    steps: int,
    reach: float,
    source: torch.Generator,
) -> Tensor:
    """Signed steps from a random start up the cross-entropy of the views' mean logits, with new
    views at each step.

    Args:
        epsilon: radius of the ball, of [0, 1] pixels.
        reach: length of all steps together, in epsilons.
    """

    def loss(attacked: Tensor) -> Tensor:
        seeds = torch.randint(2**31, (len(pixels),), generator=source).tolist()
        return F.cross_entropy(answer(attacked, seeds).mean(dim=1), targets, reduction="sum")

    return ascend(pixels, loss, epsilon, steps, reach * epsilon / steps, source)


def _gradients(
    make: Callable[[Values], Answer],
    values: Values,
    learned: Sequence[str],
    batch: Tensor,
    targets: Tensor,
    plan: Plan,
    number: int,
) -> tuple[float, Values]:
    """The loss of the mean prediction, and its gradients by name."""
    source = torch.Generator().manual_seed(plan.seed * 1_000_003 + number)
    hurt = len(batch) // 2
    attacked = attack(
        make(values),
        batch[:hurt],
        targets[:hurt],
        plan.epsilon,
        plan.attack_steps,
        plan.reach,
        source,
    )
    batch = torch.cat([(attacked * 255).round() / 255, batch[hurt:]])
    seeds = torch.randint(2**31, (len(batch),), generator=source).tolist()
    leaves = {name: values[name].detach().requires_grad_() for name in learned}
    logits = make(values | leaves)(batch, seeds)
    loss = F.nll_loss(mean_log_prediction(logits), targets)
    found = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), dict(zip(leaves, found, strict=True))


def _save(
    path: Path, settings: dict[str, Any], step: int, values: Values, moments: Moments
) -> None:
    tensors = {f"value.{name}": value for name, value in values.items()}
    for name, (one, two) in moments.items():
        tensors |= {f"first.{name}": one, f"second.{name}": two}
    scratch = path.with_suffix(".tmp")
    meta = {"step": str(step), "settings": json.dumps(settings)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, scratch, meta)
    scratch.replace(path)


def _resume(path: Path, settings: dict[str, Any]) -> tuple[int, Values, Moments] | None:
    """Steps done, values and moments of an earlier run with these settings, if there is one."""
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    if json.loads(meta["settings"]) != settings:
        return None

    def part(kind: str) -> Values:
        return {k[len(kind) :]: v for k, v in tensors.items() if k.startswith(kind)}

    second = part("second.")
    moments = {name: (one, second[name]) for name, one in part("first.").items()}
    return int(meta["step"]), part("value."), moments
