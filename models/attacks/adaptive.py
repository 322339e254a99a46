"""A whole defense as a model that an attacker can differentiate.

The value is the defense's own answer; the gradient passes through its views and its readout. There
are three ways through the prompts that it adapts, of which the worst counts: hold the adapted
prompts constant (BPDA), unroll the adaptation, or leave it out of the gradient. The attacker knows
everything but the seed of the views, and draws new views at every call.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attacks.attack import LEVELS, Model
from models.attacks.threats import static, transfer
from models.attacks.unrolled import adapt_unrolled
from models.classifier import DefendedClassifier, ImageQuery
from models.defenses.catalog import DEFENSES
from models.defenses.defense import Adaptation, DefenseOutput
from models.label_encoder import Template
from models.readout import mean_log_prediction, mean_logits, suspicion
from models.tapt import adapt, leaves_after
from models.views import round_levels

Way = Literal["bpda", "unrolled", "stepless"]


@dataclass(frozen=True)
class AttackableDefense:
    """A defense as a function from pixels [N, 3, S, S] in [0, 1] to log probabilities [N, C].

    Attributes:
        classifier: takes S x S images without resizing them.
        labels, template, steps, readout: as in `ImageQuery`.
        sources: one for each of the N images, from which the seeds of every call are drawn.
        way: what a gradient does about the adaptation: hold its result constant (`bpda`), pass
            through its steps (`unrolled`), or be that of the defense without steps (`stepless`).
            Answers without a gradient are always the defense's own.
        of_logits: return the mean of the views' logits instead of their mean prediction.
    """

    classifier: DefendedClassifier
    labels: tuple[str, ...]
    template: Template | None
    method: str
    views: int
    steps: int
    readout: str
    sources: tuple[np.random.Generator, ...]
    way: Way = "bpda"
    of_logits: bool = False

    @property
    def random(self) -> bool:
        """Whether two calls may differ, so that gradients are worth averaging over draws."""
        return DEFENSES[self.method].random

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.answer(pixels, self.draw_seeds())

    def fix_draws(self, draws: int) -> Model:
        """The mean over `draws` draws of views, which stay the same for all calls."""
        if not self.random:
            return self
        seeds = [self.draw_seeds() for _ in range(draws)]

        def fixed(pixels: Tensor) -> Tensor:
            answers = torch.stack([self.answer(pixels, each) for each in seeds])
            if self.of_logits:
                return answers.mean(dim=0)
            return answers.logsumexp(dim=0) - math.log(draws)

        return fixed

    def select(self, rows: Sequence[int]) -> "AttackableDefense":
        """The defense for some of the images, which keep their sources."""
        return replace(self, sources=tuple(self.sources[row] for row in rows))

    def averaging_logits(self) -> "AttackableDefense":
        return replace(self, of_logits=True)

    def weaker(self, threat: str) -> Model:
        if threat == "stepless":
            return replace(self, way="stepless", of_logits=True)
        known = self.classifier.bundle and DEFENSES[self.method].prompts == "learned"
        make = static if threat == "static" and known else transfer
        return make(self.classifier, self.labels, self.template)

    def answer(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Log probabilities, or mean logits, [N, C] with these seeds, one per image."""
        return self._gather(self._defend(pixels, seeds), self._read)

    def observe(self, pixels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`answer`, and the suspicion [N] of the image, see `readout.suspicion`. Its gradient is
        that of the way `stepless`, where the views are looked at once."""
        outputs = self._defend(pixels, seeds)
        alone = self.weaker("transfer")(pixels).softmax(dim=1)

        def doubt(output: DefenseOutput) -> Tensor:
            views = output.logits if torch.is_grad_enabled() else output.initial
            return suspicion(alone[output.rows], views.softmax(dim=-1))

        return self._gather(outputs, self._read), self._gather(outputs, doubt)

    def _defend(self, pixels: Tensor, seeds: Sequence[int]) -> Sequence[DefenseOutput]:
        images = round_levels(pixels * LEVELS)
        skipped = self.way == "stepless" and torch.is_grad_enabled()
        steps = 0 if skipped else self.steps
        queries = [
            ImageQuery(image, self.labels, self.template, self.readout, seed, steps)
            for image, seed in zip(images, seeds, strict=True)
        ]
        (batch,) = self.classifier.prepare(queries, self.method)
        unrolled = self.way == "unrolled"
        adaptation = Adaptation(
            leaves_after(batch.steps), adapt_unrolled if unrolled else adapt, all_logits=False
        )
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if unrolled else nullcontext():
            return list(self.classifier.defend(batch, self.views, adaptation))

    def _read(self, output: DefenseOutput) -> Tensor:
        if self.of_logits:
            return mean_logits(output.logits, output.weights)
        return mean_log_prediction(output.logits, output.weights, output.averages_logits)

    @staticmethod
    def _gather(
        outputs: Sequence[DefenseOutput], read: Callable[[DefenseOutput], Tensor]
    ) -> Tensor:
        """What is read from each output, in the order of the images."""
        rows = [row for output in outputs for row in output.rows]
        values = torch.cat([read(output) for output in outputs])
        return values[torch.tensor(rows, device=values.device).argsort()]

    def draw_seeds(self) -> list[int]:
        return [int(source.integers(2**48)) for source in self.sources]


def surrogates(
    classifier: DefendedClassifier,
    labels: tuple[str, ...],
    method: str,
    views: int,
    steps: int,
    readout: str,
    seeds: Sequence[int],
    template: Template | None = None,
) -> Mapping[str, AttackableDefense]:
    """A defense as models to attack by gradients, by the way taken through its adaptation; the only
    way is `direct` where it adapts no prompts.

    All give the same answers. `seeds` draw the attacker's views, one for each image of a batch.
    """

    def make(way: Way) -> AttackableDefense:
        sources = tuple(np.random.default_rng(seed) for seed in seeds)
        return AttackableDefense(
            classifier, labels, template, method, views, steps, readout, sources, way
        )

    if not (steps and DEFENSES[method].adapts_prompts):
        return {"direct": make("bpda")}
    return {way: make(way) for way in get_args(Way)}
