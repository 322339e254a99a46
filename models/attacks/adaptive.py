"""A whole defense as a model that an attacker can differentiate.

The value is what the defense answers, the gradient goes through its views and its readout. Through
what it adapts there are two ways, of which the worse counts: hold the adapted prompts of this very
step (BPDA), or unroll the adaptation. The attacker knows all but the seed of the views and draws
his own at every call.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import tapt
from models.attacks.attack import LEVELS, Model
from models.attacks.threats import encode
from models.attacks.unrolled import unroll
from models.classifier import DefendedClassifier, Picture
from models.defenses import DEFENSES, gate, rtpt, thrift, tpt, ttc
from models.label_encoder import EncodedLabels, join_encoded
from models.objective import Objective
from models.readout import view_weights
from models.views import cut_views, round_levels

Average = Callable[[Tensor, Tensor], Tensor]
SINGLE = {"plain", "apt", "ttc"}  # they look at the picture alone
STEADY = {"plain", "apt"}  # and draw nothing
TUNED = {"tapt", "tpt", "rtpt", "gate", "thrift"}  # they adapt prompts


@dataclass(frozen=True)
class Defended:
    """A guard's defense as a function from pixels [N, 3, S, S] in [0, 1] to log probabilities
    [N, C]; every call draws its views anew from `source`.

    `guard` takes S x S pictures without resizing them.
    """

    guard: DefendedClassifier
    names: tuple[str, ...]
    method: str
    views: int
    steps: int
    readout: str
    source: np.random.Generator
    unrolled: bool = False

    @property
    def random(self) -> bool:
        """Whether two calls may differ, so that gradients are worth averaging over draws."""
        return self.method not in STEADY

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.answer(pixels, self.source.integers(2**48, size=len(pixels)).tolist())

    def hold(self, images: int, draws: int) -> Model:
        """The mean prediction over draws of views that stay the same from call to call."""
        if not self.random:
            return self
        seeds = self.source.integers(2**48, size=(draws, images)).tolist()

        def held(pixels: Tensor) -> Tensor:
            answers = torch.stack([self.answer(pixels, each) for each in seeds])
            return answers.logsumexp(dim=0) - math.log(draws)

        return held

    def answer(self, pixels: Tensor, seeds: list[int]) -> Tensor:
        """Log probabilities with views of these seeds."""
        preprocessing = self.guard.checkpoint.preprocessing
        count = 1 if self.method in SINGLE else self.views
        levels = round_levels(pixels * LEVELS)
        views = torch.stack(
            [
                cut_views(each, count, seed, preprocessing)
                for each, seed in zip(levels, seeds, strict=True)
            ]
        )
        # Fused attention has no second derivative.
        plain = sdpa_kernel(SDPBackend.MATH) if self.unrolled else nullcontext()
        with plain:
            return self._read(views, seeds)

    def _read(self, views: Tensor, seeds: list[int]) -> Tensor:
        match self.method:
            case "plain" | "ensemble" | "apt" | "apt-ensemble":
                return self._averaged(views, self._encode(self.method))
            case "tapt":
                objective = self.guard.objective
                return self._tuned(views, self._encode("tapt"), objective, self.readout, mean)
            case "tpt":
                return self._tuned(views, self._encode("tpt"), tpt.OBJECTIVE, "single", mean)
            case "rtpt":
                labels = self._encode("rtpt")
                return self._tuned(views, labels, rtpt.OBJECTIVE, "weighted", mean_of_logits)
            case "ttc":
                return self._countered(views, seeds)
            case "gate":
                return self._gated(views, seeds)
            case "thrift":
                return self._spared(views, seeds)
            case _:
                raise ValueError(f"no way is known through the defense {self.method}")

    def _encode(self, method: str) -> EncodedLabels:
        return encode(self.guard, self.names, DEFENSES[method].prompting)

    def _averaged(self, views: Tensor, labels: EncodedLabels) -> Tensor:
        clip, (batch, text) = self.guard.checkpoint.clip, join_encoded([labels] * len(views))
        visual = labels.prompts.expand(len(views)).vision
        logits = clip.class_logits(clip.encode_images(views, visual).features, text, batch)
        return mean(torch.full(views.shape[:2], 1 / views.shape[1], device=views.device), logits)

    def _tuned(
        self,
        views: Tensor,
        labels: EncodedLabels,
        objective: Objective,
        readout: str,
        average: Average,
    ) -> Tensor:
        clip, (batch, text) = self.guard.checkpoint.clip, join_encoded([labels] * len(views))
        prompts, steps = labels.prompts.expand(len(views)), self._steps()
        # A readout by weights hangs on the first look's features, others only choose by it.
        with torch.set_grad_enabled(readout == "weighted" and torch.is_grad_enabled()):
            features = clip.encode_images(views, prompts.vision).features
            first = clip.class_logits(features, text, batch)
        kept = tapt.select_confident(first, self.guard.selection_ratio)
        chosen = gather(views, kept)
        if steps:
            with torch.enable_grad():
                (departure,) = tapt.adapt(
                    clip,
                    chosen.detach(),
                    batch,
                    text,
                    prompts,
                    objective,
                    lambda taken, rows: set(rows) if taken >= steps else set(),
                )
            adapted = departure.prompts
            if self.unrolled and torch.is_grad_enabled():
                adapted = unroll(clip, chosen, batch, text, prompts, objective, steps, adapted)
            prompts = adapted
            if "text" in objective.moving(prompts):
                text = clip.encode_labels(batch, prompts.text, graph=self.unrolled)
        weights = view_weights(readout, kept, features)
        if readout == "single":
            views, weights = views[:, :1], weights[:, :1]
        elif readout == "kept":
            views, weights = chosen, gather(weights, kept)
        seen = clip.encode_images(views, prompts.vision).features
        return average(weights, clip.class_logits(seen, text, batch))

    def _countered(self, views: Tensor, seeds: list[int]) -> Tensor:
        """The counterattack's noise and steps are held."""
        clip, pixels, steps = self.guard.checkpoint.clip, views[:, 0].detach(), self._steps()
        noise = ttc.draw_noise(pixels, seeds, ttc.PUBLISHED.eps)
        with torch.no_grad():
            both = clip.encode_images(torch.stack([pixels, pixels + noise], dim=1)).projected
        deltas = torch.zeros_like(pixels)
        with torch.enable_grad():
            for moved in ttc.counterattack(
                clip,
                pixels,
                noise,
                both,
                ttc.PUBLISHED,
                lambda taken, rows: set(rows) if taken >= steps else set(),
            ):
                deltas[moved.rows] = moved.deltas.detach()
        return self._averaged(views[:, :1] + deltas.unsqueeze(1), self._encode("plain"))

    def _gated(self, views: Tensor, seeds: list[int]) -> Tensor:
        """The gate's decision is held; the gradient goes the way that the picture goes."""
        doubtful = (gate.steadiness(self.guard.checkpoint.clip, views[:, 0].detach())).tolist()
        answers = []
        for row, steady in enumerate(doubtful):
            way = "tapt" if steady <= gate.THRESHOLD else "plain"
            seen = views[row : row + 1, : 1 if way == "plain" else None]
            answers.append(replace(self, method=way)._read(seen, seeds[row : row + 1]))
        return torch.cat(answers)

    def _spared(self, views: Tensor, seeds: list[int]) -> Tensor:
        """Whether the few views suffice is held, as in `_gated`."""
        few = thrift.few_views(views.shape[1])
        with torch.no_grad():
            sure = thrift.agree(self._averaged_views(views[:, :few])).tolist()
        answers = []
        for row, enough in enumerate(sure):
            way, count = ("apt-ensemble", few) if enough else ("tapt", None)
            seen = views[row : row + 1, :count]
            answers.append(replace(self, method=way)._read(seen, seeds[row : row + 1]))
        return torch.cat(answers)

    def _averaged_views(self, views: Tensor) -> Tensor:
        """Probabilities [B, V, C] of views at the learned prompts."""
        labels = self._encode("thrift")
        clip, (batch, text) = self.guard.checkpoint.clip, join_encoded([labels] * len(views))
        visual = labels.prompts.expand(len(views)).vision
        features = clip.encode_images(views, visual).features
        return clip.class_logits(features, text, batch).softmax(dim=-1)

    def _steps(self) -> int:
        picture = Picture(np.zeros((1, 1, 3), np.uint8), self.names, None, self.readout, 0)
        return self.steps if self.guard.adaptable(picture, self.method) else 0


def surrogates(
    guard: DefendedClassifier,
    names: tuple[str, ...],
    method: str,
    views: int,
    steps: int,
    readout: str,
    seed: int,
) -> Mapping[str, Defended]:
    """A defense as models to attack by gradients, by the way taken through its adaptation; all
    give the same answers. `seed` draws the attacker's views."""
    held = Defended(guard, names, method, views, steps, readout, np.random.default_rng(seed))
    if not steps or method not in TUNED:
        return {"direct": held}
    unrolled = replace(held, source=np.random.default_rng(seed), unrolled=True)
    return {"bpda": held, "unrolled": unrolled}


def mean(weights: Tensor, logits: Tensor) -> Tensor:
    """Log of the mean prediction [N, C] over views by weights [N, V], from logits [N, V, C]."""
    log_p: Tensor = logits.log_softmax(dim=-1) + weights.clamp(min=1e-30).log().unsqueeze(-1)
    return log_p.logsumexp(dim=1)


def mean_of_logits(weights: Tensor, logits: Tensor) -> Tensor:
    """The log prediction [N, C] of the logits' mean, which R-TPT reads."""
    return rtpt.mean_logits(weights, logits).log_softmax(dim=-1)


def gather(values: Tensor, index: Tensor) -> Tensor:
    """Values [N, V, ...] at views [N, k]."""
    return values[torch.arange(len(values), device=values.device).unsqueeze(1), index]
