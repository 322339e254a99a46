"""Features of names that nobody published, from WordNet and the names whose features are known.

A Gaussian process's mean (Rasmussen & Williams 2006, eq. 2.25): names are alike as far as their
meanings share an ancestor, their glosses share words and they share words themselves. That a
taxonomy carries a classifier to classes without pictures is Wang et al. 2018's finding.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from research.embedded.wordnet import WordNet

STOP = {
    "a",
    "an",
    "and",
    "as",
    "at",
    "by",
    "for",
    "from",
    "in",
    "is",
    "of",
    "on",
    "or",
    "that",
    "the",
    "to",
}
Bag = dict[Hashable, float]


@dataclass(frozen=True)
class Meaning:
    """A name and the offset of its synset, where it has one."""

    name: str
    offset: str | None


class Kernel:
    """Likeness of two meanings by (taxonomy, gloss, name), weighted.

    How well it foretells a name that it has not seen: `research.embedded.lexicon`.
    """

    def __init__(
        self,
        wordnet: WordNet,
        weights: tuple[float, float, float] = (0.5, 0.5, 0.5),
        power: float = 4.0,
        noise: float = 0.3,
    ) -> None:
        self.wordnet, self.weights, self.power, self.noise = wordnet, weights, power, noise
        self._frequency = Counter(
            word for offset in wordnet.synsets for word in self._gloss_words(offset)
        )

    def __call__(self, left: Sequence[Meaning], right: Sequence[Meaning]) -> Tensor:
        """[left, right]; a name and itself have the sum of the weights."""
        glosses = _cosine([*map(self._gloss, left)], [*map(self._gloss, right)])
        names = _cosine([*map(_name, left)], [*map(_name, right)])
        taxonomy, gloss, name = self.weights
        lin_similarity = self.lin_similarity(left, right) ** self.power
        return taxonomy * lin_similarity + gloss * glosses + name * names

    def lin_similarity(self, left: Sequence[Meaning], right: Sequence[Meaning]) -> Tensor:
        """Lin's similarity (1998) in the taxonomy, [left, right] in [0, 1]; 0 without a synset."""
        content = self.wordnet.information
        above, beside = _members(self.wordnet, left), _members(self.wordnet, right)
        shared = torch.zeros(len(left), len(right))
        # From the root downwards, so that the closest common ancestor is written last.
        for ancestor in sorted(above.keys() & beside.keys(), key=content.__getitem__):
            shared[above[ancestor][:, None], beside[ancestor]] = content[ancestor]

        def own(meanings: Sequence[Meaning]) -> Tensor:
            return torch.tensor([content[m.offset] if m.offset else 1.0 for m in meanings])

        return 2 * shared / (own(left)[:, None] + own(right)).clamp(min=1e-6)

    def _gloss(self, meaning: Meaning) -> Bag:
        if meaning.offset is None:
            return {}
        total = len(self.wordnet.synsets)
        words = self._gloss_words(meaning.offset)
        return {word: math.log(total / (1 + self._frequency[word])) for word in words}

    def _gloss_words(self, offset: str) -> set[str]:
        synset = self.wordnet.synsets[offset]
        words = set(re.findall(r"[a-z]+", synset.gloss.lower())) - STOP
        return words.union(*(name.lower().split() for name in synset.names))


def spread(
    kernel: Kernel, known: Sequence[Meaning], features: Tensor, asked: Sequence[Meaning]
) -> Tensor:
    """Unit features [asked, width] from those of the known names, [known, width]."""
    own = kernel(known, known) + kernel.noise * torch.eye(len(known))
    weights = torch.linalg.solve(own, features.cpu())
    chunks = [asked[i : i + 4096] for i in range(0, len(asked), 4096)]
    return F.normalize(torch.cat([kernel(chunk, known) @ weights for chunk in chunks]), dim=-1)


def predict_held_out(
    kernel: Kernel, known: Sequence[Meaning], features: Tensor, parts: int = 10
) -> Tensor:
    """Features [known, width] of every name from the names of the other parts alone.

    Names of one synset stay in one part, or a synonym would give the answer away.
    """
    groups = sorted({meaning.offset or meaning.name for meaning in known})
    part = {group: place % parts for place, group in enumerate(groups)}
    parts_of = torch.tensor([part[meaning.offset or meaning.name] for meaning in known])
    predicted = torch.empty_like(features)
    for held in range(parts):
        asked, told = ((parts_of == held).nonzero()[:, 0], (parts_of != held).nonzero()[:, 0])
        predicted[asked] = spread(
            kernel, [known[i] for i in told], features[told], [known[i] for i in asked]
        )
    return predicted


def _members(wordnet: WordNet, meanings: Sequence[Meaning]) -> dict[str, Tensor]:
    """For each ancestor the places of the meanings below it."""
    places: dict[str, list[int]] = {}
    for place, meaning in enumerate(meanings):
        for ancestor in wordnet.ancestors[meaning.offset] if meaning.offset else ():
            places.setdefault(ancestor, []).append(place)
    return {ancestor: torch.tensor(found) for ancestor, found in places.items()}


def _name(meaning: Meaning) -> Bag:
    """The whole name, its words, and its last word once more: a golf ball is a ball."""
    words = meaning.name.lower().split()
    return dict.fromkeys([("whole", *words), ("head", words[-1]), *words], 1.0)


def _cosine(left: list[Bag], right: list[Bag]) -> Tensor:
    """Cosine similarities [left, right] of bags of weighted words."""
    places: dict[Hashable, int] = {}
    for bag in right:
        for word in bag:
            places.setdefault(word, len(places))

    def dense(bags: list[Bag]) -> Tensor:
        rows = torch.zeros(len(bags), len(places))
        for row, bag in enumerate(bags):
            # Words that no bag on the right holds count in the length alone.
            length = math.sqrt(sum(weight * weight for weight in bag.values())) or 1.0
            for word, weight in bag.items():
                if word in places:
                    rows[row, places[word]] = weight / length
        return rows

    return dense(left) @ dense(right).T
