"""What the two towers learn: first the words, then the images, in OpenAI's text space.

The text tower learns the features of names: as published where they are, by `meaning` elsewhere.
Then it stays as it is (locked-text, the reverse of LiT, Zhai et al. 2022), and the image tower
learns to find the caption of an image's class among all classes and to rank the published nouns
as the class does. Images never move the words, so a name without images keeps its place among
those with images.

Published features lie in a narrow cone (mean cosine 0.74 among 1,378 nouns). Their common part
says nothing of a name, so it is taken off before they become targets.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from research.embedded.captions import Nouns, draw_caption, draw_synonym, read_nouns
from research.embedded.meaning import Kernel, Meaning, spread
from research.embedded.recipe import Recipe
from research.embedded.wordnet import WordNet
from research.embedded.zeroshot import image_features, text_features


@dataclass(frozen=True)
class Targets:
    """Names and the unit features, no common part, that their captions should have.

    published: [published names, projection]; classes: [classes, projection], the same for all
    synonyms of a class; meanings: [names, projection] of the `names` that are neither.
    """

    nouns: Nouns
    published: Tensor
    classes: Tensor
    names: list[str]
    meanings: Tensor

    @property
    def texts(self) -> list[str]:
        """Every name and template, for the tokenizer."""
        return [*self.nouns.texts, *self.names]

    @classmethod
    def derive(
        cls, nouns: Nouns, features: Tensor, wordnet: WordNet, device: torch.device
    ) -> "Targets":
        """From features as published: [published names, projection], any length.

        A class with a published synonym takes that feature (the mean of several).
        """
        published = center(features)
        kernel = Kernel(wordnet)
        known = [Meaning(name, wordnet.sense(name)) for name in nouns.published]
        asked = [
            Meaning(synonyms[0], offset if offset in wordnet.synsets else None)
            for synonyms, offset in zip(nouns.classes, nouns.offsets, strict=True)
        ]
        taken = {name.lower() for synonyms in nouns.classes for name in synonyms}
        taken |= {name.lower() for name in nouns.published}
        things = [Meaning(*found) for found in wordnet.things() if found[0].lower() not in taken]
        derived = spread(kernel, known, published, [*asked, *things])
        classes = derived[: len(asked)]
        for label in range(len(asked)):
            if same := nouns.published_of(label):
                classes[label] = F.normalize(published[same].mean(0), dim=-1)
        meanings = derived[len(asked) :]
        names = [meaning.name for meaning in things]
        return cls(nouns, published.to(device), classes.to(device), names, meanings.to(device))

    @classmethod
    def read(cls, data: Path, wordnet: Path, device: torch.device) -> "Targets":
        """From the lists of names and `clip_text_features.safetensors` in `data`."""
        stored = safetensors.torch.load_file(data / "clip_text_features.safetensors")
        return cls.derive(read_nouns(data), stored["features"], WordNet.read(wordnet), device)

    def draw(self, count: int, generator: random.Random) -> tuple[list[str], Tensor]:
        """`count` captions and their features [count, projection]: a quarter of published names,
        an eighth of classes, the rest of the others."""
        captions, features = [], []
        for _ in range(count):
            chance = generator.random()
            if chance < 0.125:
                i = generator.randrange(len(self.classes))
                name, feature = draw_synonym(self.nouns.classes[i], generator), self.classes[i]
            elif chance < 0.375 or not self.names:
                i = generator.randrange(len(self.published))
                name, feature = self.nouns.published[i], self.published[i]
            else:
                i = generator.randrange(len(self.names))
                name, feature = self.names[i], self.meanings[i]
            captions.append(draw_caption(name, generator))
            features.append(feature)
        # By length, so that a part of them is padded no further than it needs.
        order = sorted(range(count), key=lambda i: len(captions[i]))
        return [captions[i] for i in order], torch.stack([features[i] for i in order])


def center(features: Tensor) -> Tensor:
    """Unit features [names, projection] without what all of them share."""
    unit = F.normalize(features.float(), dim=-1)
    return F.normalize(unit - unit.mean(0), dim=-1)


def rank(features: Tensor, targets: Targets, recipe: Recipe) -> Tensor:
    """Logits [rows, published names] of unit features."""
    return recipe.noun_scale * features @ targets.published.T


def text_losses(
    model: Any, tokenizer: Any, targets: Targets, recipe: Recipe, generator: random.Random
) -> dict[str, Tensor]:
    """Captions against their features, by cosine and by how they rank the published nouns
    (relational distillation, Park et al. 2019)."""
    captions, lesson = targets.draw(recipe.lesson_batch, generator)
    part = -(-len(captions) // 4)
    with torch.autocast(model.device.type, torch.bfloat16):
        taught = torch.cat(
            [
                text_features(model, tokenizer, captions[i : i + part])
                for i in range(0, len(captions), part)
            ]
        )
    wanted = rank(lesson, targets, recipe).softmax(-1)
    return {
        "cosine": 1 - (taught * lesson).sum(-1).mean(),
        "relation": F.cross_entropy(rank(taught, targets, recipe), wanted),
    }


def image_losses(
    model: Any,
    tokenizer: Any,
    targets: Targets,
    images: Tensor,
    truth: Tensor,
    recipe: Recipe,
    generator: random.Random,
) -> dict[str, Tensor]:
    """images: normalized [batch, 3, s, s]; truth: [batch, classes], rows sum to 1.

    `image`: cross entropy over captions of the classes, one a class by a random synonym and
    template, without a gradient into the text tower. `noun`: cross entropy of an image's ranking
    of the published nouns against its class's.
    """
    captions = [
        draw_caption(draw_synonym(synonyms, generator), generator)
        for synonyms in targets.nouns.classes
    ]
    with torch.autocast(images.device.type, torch.bfloat16):
        with torch.no_grad():
            classes = text_features(model, tokenizer, captions)
        seen = image_features(model, images)
    smooth = (1 - recipe.smoothing) * truth + recipe.smoothing / len(classes)
    logits = model.logit_scale.exp().clamp(max=100) * seen @ classes.T
    wanted = truth @ rank(targets.classes, targets, recipe).softmax(-1)
    return {
        "image": F.cross_entropy(logits, smooth),
        "noun": recipe.noun_weight * F.cross_entropy(rank(seen, targets, recipe), wanted),
    }
