"""One linear step on visual prompts: what it minimizes and how far it goes is learned.

The step is a plain gradient step, so an attack can differentiate it exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.learned_step.frozen import Frozen
from benchmarks.learned_step.learning import Answer, Values
from models.tapt import alignment_loss, entropies, token_moments, view_entropy

TERMS = (
    "entropy of the mean prediction",
    "mean of the entropies",
    "distance from the attacked statistics",
    "distance from the clean statistics",
)
LEARNING_RATES = {"vision": 1e-3, "weights": 3e-2, "rates": 4e-4}
FIRST_WEIGHTS = (1.0, 0.0, 0.1, 0.1)
FIRST_RATE = 2e-3


@dataclass(frozen=True, slots=True)
class LearnedStep:
    """What is learned.

    Attributes:
        vision: the prompts that every image starts from, [1, depth, tokens, width].
        weights: of the terms, [4], each in units of its typical gradient.
        rates: length of the step, [depth], one for each prompted layer.
        units: [4], 1 / root mean square of each term's gradient at the start. Not learned.
    """

    vision: Tensor
    weights: Tensor
    rates: Tensor
    units: Tensor

    def start(self, images: int) -> Tensor:
        """Copies of the prompts, [N, depth, tokens, width]."""
        return self.vision.expand(images, *self.vision.shape[1:])

    def __call__(self, frozen: Frozen, views: Tensor, through: bool = False) -> Tensor:
        """The prompts [N, depth, tokens, width] after the step on views [N, V, 3, S, S].

        Args:
            through: keep the graph, for an attack on the views or for learning.
        """
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the only one to differentiate
            here = self.start(len(views))
            here = here if here.requires_grad else here.detach().requires_grad_()
            loss = (self.weights * self.units) @ measure_terms(frozen, views, here).sum(dim=1)
            (gradient,) = torch.autograd.grad(loss, here, create_graph=through)
        moved = here - self.rates.view(-1, 1, 1) * gradient
        return moved if through else moved.detach()


def answer_after_step(frozen: Frozen, step: LearnedStep, views: int) -> Answer:
    """The views after the step on these same views; a gradient passes through the step."""

    def answer(pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        cut = frozen.cut(pixels, views, seeds)
        moved = step(frozen, cut, through=torch.is_grad_enabled())
        with sdpa_kernel(SDPBackend.MATH):
            return frozen.logits(cut, moved)

    return answer


def measure_terms(frozen: Frozen, views: Tensor, visual: Tensor) -> Tensor:
    """The terms of the loss, [4, N], in the order of `TERMS`, with prompts [N, ...]."""
    encoded = frozen.clip.encode_images(views, visual, frozen.layers)
    logits = frozen.clip.logit_scale * encoded.features @ frozen.text.T
    moments, known = token_moments(encoded.inputs), frozen.statistics
    return torch.stack(
        [
            view_entropy(logits),
            entropies(logits).mean(dim=1),
            alignment_loss(moments, known.adv_mean, known.adv_var),
            alignment_loss(moments, known.clean_mean, known.clean_var),
        ]
    )


def measure_units(frozen: Frozen, views: Tensor, vision: Tensor) -> Tensor:
    """1 / root mean square of each term's gradient at the prompts, [4], over some views."""
    here = vision.expand(len(views), *vision.shape[1:]).detach().requires_grad_()
    found = [
        torch.autograd.grad(term.sum(), here, retain_graph=True)[0]
        for term in measure_terms(frozen, views, here)
    ]
    return torch.stack([1 / gradient.square().mean().sqrt() for gradient in found]).detach()


def begin(frozen: Frozen, vision: Tensor, few: Tensor, views: int) -> Values:
    """The values of a `LearnedStep` before learning.

    Args:
        vision: prompts [1, depth, tokens, width].
        few: images [N, 3, S, S] that the terms' typical gradients are measured on.
    """
    return {
        "vision": vision.clone(),
        "weights": torch.tensor(FIRST_WEIGHTS),
        "rates": torch.full((vision.shape[1],), FIRST_RATE),
        "units": measure_units(frozen, frozen.cut(few, views, range(len(few))), vision),
    }
