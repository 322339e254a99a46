"""WordNet's nouns (Miller 1995), read from the database files that every distribution ships.

Of each set of synonyms the names, the hypernyms and the gloss; the rest is not needed here.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# The lexicographer files of things that can be photographed.
THINGS = {
    "05": "animal",
    "06": "artifact",
    "08": "body",
    "13": "food",
    "17": "object",
    "20": "plant",
}
# Names of genera and families are no names of things.
TAXONOMY = "taxonomic group"


@dataclass(frozen=True)
class Synset:
    """One meaning: its names, the offsets of its hypernyms, its definition."""

    names: tuple[str, ...]
    hypernyms: tuple[str, ...]
    gloss: str
    kind: str
    instance: bool


@dataclass(frozen=True)
class WordNet:
    """Synsets by offset, and for each name in lower case its offsets, most frequent first."""

    synsets: dict[str, Synset]
    senses: dict[str, tuple[str, ...]]
    plurals: dict[str, str]

    @classmethod
    def read(cls, directory: Path) -> "WordNet":
        """Read `data.noun`, `index.noun` and `noun.exc`. Raises OSError where one is missing."""
        synsets = dict(_parse(line) for line in _lines(directory / "data.noun"))
        senses = {}
        for line in _lines(directory / "index.noun"):
            name, _, count, *rest = line.split()
            senses[_spaced(name)] = tuple(rest[-int(count) :])
        plurals = dict(line.split()[:2] for line in _lines(directory / "noun.exc"))
        return cls(synsets, senses, {_spaced(many): _spaced(one) for many, one in plurals.items()})

    @cached_property
    def ancestors(self) -> dict[str, frozenset[str]]:
        """Each synset's ancestors and itself."""
        known: dict[str, frozenset[str]] = {}

        def climb(offset: str) -> frozenset[str]:
            if offset not in known:
                above = (climb(parent) for parent in self.synsets[offset].hypernyms)
                known[offset] = frozenset([offset]).union(*above)
            return known[offset]

        for offset in self.synsets:
            climb(offset)
        return known

    @cached_property
    def information(self) -> dict[str, float]:
        """Intrinsic information content (Seco et al. 2004): from 0 at the root to 1 at a leaf."""
        below = Counter(above for line in self.ancestors.values() for above in line)
        whole = math.log(max(2, len(self.synsets)))
        return {offset: 1 - math.log(below[offset]) / whole for offset in self.synsets}

    def sense(self, name: str) -> str | None:
        """The offset of what a name most often means, things before ideas; None where unknown."""
        for form in self._forms(name.lower().replace("_", " ").strip()):
            if found := self.senses.get(form):
                things = [offset for offset in found if self.synsets[offset].kind in THINGS]
                return (things or found)[0]
        return None

    def things(self, words: int = 3) -> Iterator[tuple[str, str]]:
        """(name, offset) of every thing that can be photographed, by its first meaning.

        Left out: single persons and places, taxonomic groups, Latin names where there is a common
        one, names of more than `words` words.
        """
        groups = {o for o, synset in self.synsets.items() if TAXONOMY in synset.names}
        for offset, synset in self.synsets.items():
            if synset.instance or synset.kind not in THINGS or self.ancestors[offset] & groups:
                continue
            common = [name for name in synset.names if name == name.lower()]
            for name in common or synset.names:
                if name.isascii() and len(name.split()) <= words and self.sense(name) == offset:
                    yield name, offset

    def _forms(self, name: str) -> Iterator[str]:
        """A name and what it may be a plural or another spelling of."""
        yield name
        if name in self.plurals:
            yield self.plurals[name]
        yield from (name.replace("-", " "), name.replace("-", ""), name.replace(" ", ""))
        for ending, single in (("ies", "y"), ("ves", "f"), ("es", ""), ("s", ""), ("men", "man")):
            if name.endswith(ending):
                yield name.removesuffix(ending) + single


def _lines(path: Path) -> Iterator[str]:
    """The lines of a database file without its license, which is indented."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):
            yield line


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _parse(line: str) -> tuple[str, Synset]:
    """One line of `data.noun`; its format is described in wndb(5WN)."""
    head, gloss = line.split(" | ", 1)
    offset, kind, _, count, *fields = head.split()
    names = tuple(_spaced(name) for name in fields[0 : 2 * int(count, 16) : 2])
    pointers = fields[2 * int(count, 16) + 1 :]
    above = [(pointers[i], pointers[i + 1]) for i in range(0, len(pointers) - 3, 4)]
    hypernyms = tuple(target for symbol, target in above if symbol in ("@", "@i"))
    instance = any(symbol == "@i" for symbol, _ in above)
    return offset, Synset(names, hypernyms, gloss.split('; "')[0].strip(), kind, instance)
