"""A whole defense as a model that an attacker can differentiate.

The value is the defense's own answer; the gradient passes through its views and its readout. There
are two ways through the prompts that it adapts, of which the worse counts: hold the adapted prompts
constant (BPDA), or unroll the adaptation. The attacker knows everything but the seed of the views,
and draws new views at every call.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attacks.attack import LEVELS, Model
from models.attacks.unrolled import adapt_unrolled
from models.classifier import DefendedClassifier, ImageQuery
from models.defenses.catalog import DEFENSES
from models.defenses.defense import Adaptation
from models.label_encoder import Template
from models.readout import mean_log_prediction
from models.tapt import adapt, leaves_after
from models.views import round_levels


@dataclass(frozen=True)
class AttackableDefense:
    """A defense as a function from pixels [N, 3, S, S] in [0, 1] to log probabilities [N, C].

    Attributes:
        classifier: takes S x S images without resizing them.
        labels, template, steps, readout: as in `ImageQuery`.
        source: draws the seeds of every call.
        unrolled: differentiate through the adaptation's steps; else hold their result constant.
    """

    classifier: DefendedClassifier
    labels: tuple[str, ...]
    template: Template | None
    method: str
    views: int
    steps: int
    readout: str
    source: np.random.Generator
    unrolled: bool = False

    @property
    def random(self) -> bool:
        """Whether two calls may differ, so that gradients are worth averaging over draws."""
        return DEFENSES[self.method].random

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.answer(pixels, self.source.integers(2**48, size=len(pixels)).tolist())

    def hold(self, images: int, draws: int) -> Model:
        """The mean prediction over `draws` draws of views, which stay the same for all calls."""
        if not self.random:
            return self
        seeds = self.source.integers(2**48, size=(draws, images)).tolist()

        def held(pixels: Tensor) -> Tensor:
            answers = torch.stack([self.answer(pixels, each) for each in seeds])
            return answers.logsumexp(dim=0) - math.log(draws)

        return held

    def answer(self, pixels: Tensor, seeds: list[int]) -> Tensor:
        """Log probabilities [N, C] with these seeds, one per image."""
        images = round_levels(pixels * LEVELS)
        queries = [
            ImageQuery(image, self.labels, self.template, self.readout, seed, self.steps)
            for image, seed in zip(images, seeds, strict=True)
        ]
        (batch,) = self.classifier.prepare(queries, self.method)
        adaptation = Adaptation(
            leaves_after(batch.steps),
            adapt_unrolled if self.unrolled else adapt,
            all_logits=False,
        )
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if self.unrolled else nullcontext():
            outputs = list(self.classifier.defend(batch, self.views, adaptation))
        rows = [row for output in outputs for row in output.rows]
        answers = torch.cat(
            [mean_log_prediction(o.logits, o.weights, o.averages_logits) for o in outputs]
        )
        return answers[torch.tensor(rows, device=answers.device).argsort()]


def surrogates(
    classifier: DefendedClassifier,
    labels: tuple[str, ...],
    method: str,
    views: int,
    steps: int,
    readout: str,
    seed: int,
    template: Template | None = None,
) -> Mapping[str, AttackableDefense]:
    """A defense as models to attack by gradients, by the way taken through its adaptation.

    All give the same answers. `seed` draws the attacker's views.
    """
    held = AttackableDefense(
        classifier,
        labels,
        template,
        method,
        views,
        steps,
        readout,
        np.random.default_rng(seed),
    )
    if not (steps and DEFENSES[method].adapts_prompts):
        return {"direct": held}
    unrolled = replace(held, source=np.random.default_rng(seed), unrolled=True)
    return {"bpda": held, "unrolled": unrolled}
