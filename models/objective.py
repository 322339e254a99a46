"""What an adaptation step minimizes, what its terms were, and its gradient at the prompts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.clip import PromptedCLIP
from models.labels import LabelBatch
from models.prompts import DefensePrompts
from models.statistics import TokenStatistics


@dataclass(frozen=True, slots=True)
class Objective:
    """What a step minimizes and how it moves; the defaults are the paper's.

    `reference` holds the token statistics, None for the entropy alone. `layers` is the L that the
    alignment's weight is divided by; its sum runs over the first L - 1 blocks. `of_mean` takes
    the entropy of the kept views' mean prediction, else the mean of their entropies (R-TPT).
    """

    reference: TokenStatistics | None = None
    layers: int = 0
    alignment_weight: float = 100.0
    gamma: float = 0.5
    entropy: bool = True
    of_mean: bool = True
    learning_rate: float = 5e-4
    weight_decay: float = 0.01


@dataclass(frozen=True, slots=True)
class Losses:
    """A step's loss terms, one value a request [B]; an absent term is 0."""

    entropy: Tensor
    align_adv: Tensor
    align_clean: Tensor


def prompt_gradients(
    clip: PromptedCLIP,
    labels: LabelBatch,
    text: Tensor,
    prompts: DefensePrompts,
    loss: Callable[[DefensePrompts, Tensor], Tensor],
) -> dict[str, Tensor]:
    """The gradient of a loss at the prompts, by name; a prompt it does not reach is left out.

    The text tower is passed backward in chunks of labels, which is exact: first to the features,
    then from them to the prompts.

    Args:
        text: the labels' features [R, D] at `prompts`.
        loss: maps prompts and label features to a scalar.
    """
    leaves = prompts.map({k: v.detach().requires_grad_() for k, v in prompts.tensors.items()})
    text = text.detach().requires_grad_()
    value = loss(leaves, text)
    if not value.requires_grad:
        return {}
    *found, pull = torch.autograd.grad(value, [*leaves.tensors.values(), text], allow_unused=True)
    reached = {k: g for k, g in zip(leaves.tensors, found, strict=True) if g is not None}
    if prompts.text is not None and pull is not None:
        through_text = clip.text_gradient(labels, prompts.text, pull)
        reached["text"] = reached["text"] + through_text if "text" in reached else through_text
    return reached
