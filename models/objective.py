"""What an adaptation step minimizes, what its terms were, and its gradient at the prompts."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from models.clip import PromptedCLIP
from models.labels import LabelBatch
from models.prompts import DefensePrompts
from models.statistics import TokenStatistics

Adapts = Literal["all", "vision", "text"]
ADAPTS: tuple[Adapts, ...] = get_args(Adapts)
VISION = frozenset({"vision", "projection.weight", "projection.bias"})
MOVING: Mapping[Adapts, frozenset[str]] = {
    "all": VISION | {"text"},
    "vision": VISION,
    "text": frozenset({"text"}),
}


@dataclass(frozen=True, slots=True)
class Objective:
    """What a step minimizes and how it moves; the defaults are the paper's.

    `reference` holds the token statistics, None for the entropy alone. `layers` is the L that the
    alignment's weight is divided by; its sum runs over the first L - 1 blocks. `of_mean` takes
    the entropy of the kept views' mean prediction, else the mean of their entropies (R-TPT).
    `adapts` says whose prompts move: both towers' as published, or one's; while those of the text
    stay, the labels' features do, too, and a step costs no pass of the text tower. `settled`: the
    nats below which a step's change of the entropy ends a request's loop; 0 never does.
    """

    reference: TokenStatistics | None = None
    layers: int = 0
    alignment_weight: float = 100.0
    gamma: float = 0.5
    entropy: bool = True
    of_mean: bool = True
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    adapts: Adapts = "all"
    settled: float = 0.0

    def moving(self, prompts: DefensePrompts) -> frozenset[str]:
        """The names of the prompts that a step may change: all, where there are none of those that
        `adapts` names, as without a bundle, where the template's words are all there is."""
        return (MOVING[self.adapts] & prompts.tensors.keys()) or frozenset(prompts.tensors)


@dataclass(frozen=True, slots=True)
class Losses:
    """A step's loss terms, one value a request [B]; an absent term is 0."""

    entropy: Tensor
    align_adv: Tensor
    align_clean: Tensor


class EarlyStopping:
    """Which requests a step no longer moves: `rows`, of those watched last."""

    def __init__(self, settled: float) -> None:
        self.rows: set[int] = set()
        self._settled, self._entropy = settled, dict[int, float]()

    def watch(self, rows: list[int], terms: Losses) -> None:
        """See the losses [n] of requests `rows` before a step."""
        if self._settled:
            before, now = self._entropy, dict(zip(rows, terms.entropy.tolist(), strict=True))
            moved = {row: abs(now[row] - before.get(row, math.inf)) for row in rows}
            self.rows = {row for row in rows if moved[row] < self._settled}
            self._entropy = now


def prompt_gradients(
    clip: PromptedCLIP,
    labels: LabelBatch,
    text: Tensor,
    prompts: DefensePrompts,
    loss: Callable[[DefensePrompts, Tensor], Tensor],
    moving: frozenset[str] = MOVING["all"],
) -> dict[str, Tensor]:
    """The gradient of a loss at the moving prompts, by name; one it does not reach is left out.

    The text tower is passed backward in chunks of labels, which is exact: first to the features,
    then from them to the prompts.

    Args:
        text: the labels' features [R, D] at `prompts`.
        loss: maps prompts and label features to a scalar.
    """
    values = {k: v.detach() for k, v in prompts.tensors.items()}
    leaves = {k: v.requires_grad_() for k, v in values.items() if k in moving}
    text = text.detach().requires_grad_("text" in leaves)
    value = loss(prompts.map(values), text)
    if not value.requires_grad:
        return {}
    inputs = [*leaves.values(), *([text] if text.requires_grad else [])]
    found = torch.autograd.grad(value, inputs, allow_unused=True)
    reached = {k: g for k, g in zip(leaves, found, strict=False) if g is not None}
    pull = found[-1] if text.requires_grad else None
    if prompts.text is not None and pull is not None:
        through_text = clip.text_gradient(labels, prompts.text, pull)
        reached["text"] = reached["text"] + through_text if "text" in reached else through_text
    return reached
