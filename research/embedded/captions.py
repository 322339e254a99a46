"""Captions of class names: synonyms, templates, and how one is drawn at random."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

TEMPLATE = "a photo of a {}."

# The first and plainest weigh half of all draws: they are what a user sends.
PLAIN = (TEMPLATE, "{}", "a photo of a {}", "a {}")
VARIED = (
    "a photo of the {}.",
    "a photo of an {}.",
    "the {}",
    "an {}",
    "a picture of a {}.",
    "an image of a {}.",
    "a photo of {}.",
    "a close-up photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a blurry photo of a {}.",
    "a cropped photo of a {}.",
    "a photo of one {}.",
    "a photo of many {}s.",
    "{}s",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a photo of a {} outdoors.",
    "a photo of a {} indoors.",
    "there is a {} in the photo.",
    "this is a {}.",
    "a {color} {}",
    "a photo of a {color} {}.",
    "a {quality} {}",
    "a photo of a {quality} {}.",
)
COLORS: tuple[str, ...] = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)
COLORS += ("gray", "grey", "golden", "silver", "colorful", "dark", "bright")
QUALITIES: tuple[str, ...] = (
    "small",
    "big",
    "large",
    "tiny",
    "huge",
    "old",
    "new",
    "young",
    "cute",
    "nice",
)
QUALITIES += ("clean", "dirty", "beautiful", "wild", "wooden", "metal", "plastic", "modern")
QUALITIES += ("antique", "vintage", "single", "fresh", "cool", "weird", "good", "happy")
QUALITIES += ("sleeping", "standing")


@dataclass(frozen=True)
class Nouns:
    """Names with photographs (`classes`: all synonyms of each) and `published` names without.

    offsets: of each class's synset in WordNet.
    """

    classes: list[list[str]]
    published: list[str]
    offsets: list[str]

    @property
    def texts(self) -> list[str]:
        """Every name and every template once, for the tokenizer to be trained on."""
        frames = [template.replace("{}", "").replace("{color}", "") for template in PLAIN + VARIED]
        synonyms = [name for names in self.classes for name in names]
        return [*frames, *COLORS, *QUALITIES, *synonyms, *self.published]

    def published_of(self, label: int) -> list[int]:
        """Indices of the published names that equal a synonym of the class, case ignored."""
        synonyms = {name.lower() for name in self.classes[label]}
        return [i for i, name in enumerate(self.published) if name.lower() in synonyms]


def read_nouns(directory: Path) -> Nouns:
    """Read `tiny_imagenet_classes.json` and `clip_text_names.json` of the data directory."""
    classes = json.loads((directory / "tiny_imagenet_classes.json").read_text())
    published = json.loads((directory / "clip_text_names.json").read_text())
    ordered = sorted(classes, key=lambda entry: int(entry["label"]))
    offsets = [entry["wnid"].removeprefix("n") for entry in ordered]
    return Nouns([entry["names"].split(", ") for entry in ordered], published, offsets)


def draw_caption(name: str, generator: random.Random) -> str:
    """One caption of a name by a random template."""
    template = generator.choice(PLAIN if generator.random() < 0.5 else VARIED)
    template = template.replace("{color}", generator.choice(COLORS))
    template = template.replace("{quality}", generator.choice(QUALITIES))
    return template.replace("{}", name)


def draw_synonym(names: list[str], generator: random.Random) -> str:
    """One name of a class; the first, which evaluations use, as often as all others together."""
    return names[0] if generator.random() < 0.5 else generator.choice(names)
