"""What the two towers learn: the class of an image, the nouns near it, and OpenAI's text space.

Published text features lie in a narrow cone (mean cosine 0.74 among 1,378 nouns). Their common
part says nothing of a name, so it is taken off before they become targets, and a plain cosine
then tells names apart.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from models.training.captions import Nouns, draw_caption, draw_synonym, read_nouns
from models.training.recipe import Recipe
from models.training.zeroshot import image_features, text_features


@dataclass(frozen=True)
class TextTargets:
    """Nouns and the features to be learned for the published ones.

    features: [names, projection], unit length, no common part. known: [classes, names], each row
    the average over the published synonyms of a class, or zero where there is none.
    """

    nouns: Nouns
    features: Tensor
    known: Tensor

    @classmethod
    def center(cls, nouns: Nouns, published: Tensor, device: torch.device) -> "TextTargets":
        """From features as published: [names, projection], any length."""
        unit = F.normalize(published.float(), dim=-1)
        known = torch.zeros(len(nouns.classes), len(nouns.published))
        for label in range(len(nouns.classes)):
            same = nouns.published_of(label)
            known[label, same] = 1 / max(1, len(same))
        centered = F.normalize(unit - unit.mean(0), dim=-1)
        return cls(nouns, centered.to(device), known.to(device))

    @classmethod
    def read(cls, directory: Path, device: torch.device) -> "TextTargets":
        """From `clip_text_features.safetensors` and the two lists of names beside it."""
        stored = safetensors.torch.load_file(directory / "clip_text_features.safetensors")
        return cls.center(read_nouns(directory), stored["features"], device)

    def anchors(self, classes: Tensor) -> Tensor:
        """The class features, detached, but the published feature where a synonym has one."""
        published = F.normalize(self.known @ self.features, dim=-1)
        return torch.where(self.known.any(-1, keepdim=True), published, classes.detach())


def losses(
    model: Any,
    tokenizer: Any,
    targets: TextTargets,
    images: Tensor,
    truth: Tensor,
    recipe: Recipe,
    generator: random.Random,
) -> dict[str, Tensor]:
    """The three losses of one step, to be summed.

    images: normalized [batch, 3, s, s]; truth: [batch, classes], rows sum to 1.
    `image`: cross entropy over captions of the classes, one a class by a random synonym and
    template. `noun`: cross entropy of an image's ranking of all published nouns against its
    class's own. `text`: captions of some published nouns against their features, by cosine and
    by their ranking of all nouns (relational distillation, Park et al. 2019).
    """
    nouns = targets.nouns
    chosen = generator.sample(range(len(nouns.published)), recipe.noun_batch)
    names = [draw_synonym(synonyms, generator) for synonyms in nouns.classes]
    names += [nouns.published[i] for i in chosen]
    captions = [draw_caption(name, generator) for name in names]
    with torch.autocast(images.device.type, torch.bfloat16):
        texts = text_features(model, tokenizer, captions)
        seen = image_features(model, images)
    classes, taught = texts[: len(nouns.classes)], texts[len(nouns.classes) :]
    smooth = (1 - recipe.smoothing) * truth + recipe.smoothing / len(classes)
    logits = model.logit_scale.exp().clamp(max=100) * seen @ classes.T

    def rank_nouns(features: Tensor) -> Tensor:
        return recipe.noun_scale * features @ targets.features.T

    wanted = truth @ rank_nouns(targets.anchors(classes)).softmax(-1)
    lesson = targets.features[chosen]
    cosine = 1 - (taught * lesson).sum(-1).mean()
    return {
        "image": F.cross_entropy(logits, smooth),
        "noun": recipe.noun_weight * F.cross_entropy(rank_nouns(seen), wanted),
        "text": cosine + F.cross_entropy(rank_nouns(taught), rank_nouns(lesson).softmax(-1)),
    }
