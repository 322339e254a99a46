"""A defended CLIP: checkpoint, bundle and objective together, from pictures and labels to verdicts.

Service, command line and evaluation all classify through here.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.bundle import DefenseBundle
from models.checkpoint import Checkpoint
from models.defenses import DEFENSES, plain
from models.defenses.defense import Images, LabelFeatures, Leaving, Verdict
from models.label_encoder import EncodedLabels, LabelEncoder, Prompting, join_encoded
from models.objective import Objective
from models.prompts import DefensePrompts
from models.suspicion import suspicion
from models.views import make_views

DEFAULT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True, slots=True)
class Picture:
    """What is asked of one image: uint8 RGB [height, width, 3] of any size and its labels.

    `template` None stands for the default: the bundle's own words behind the prompt slots, and
    the guard's template for undefended CLIP.
    """

    image: NDArray[np.uint8]
    labels: tuple[str, ...]
    template: str | None
    readout: str
    seed: int


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict and what undefended CLIP says of the same picture.

    `undefended` are probabilities [C], `doubt` the suspicion in [0, 1], `labels_truncated` the
    labels that did not fit the context, `seconds` the time to the end of adapting, from the start.
    """

    verdict: Verdict
    undefended: Tensor
    doubt: float
    labels_truncated: int
    seconds: float


class DefendedClassifier:
    """Classifies batches with a defense; holds nothing of a request but cached text features."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        bundle: DefenseBundle | None,
        objective: Objective | None = None,
        selection_ratio: float = 0.1,
        template: str = DEFAULT_TEMPLATE,
    ) -> None:
        self.checkpoint, self.bundle, self.template = checkpoint, bundle, template
        self.objective = objective or Objective()
        self.selection_ratio = selection_ratio
        self.encoder = LabelEncoder(checkpoint, bundle)

    @property
    def methods(self) -> list[str]:
        """The defenses that this model can run; some are nothing without a bundle."""
        return [name for name, m in DEFENSES.items() if self.bundle or not m.needs_bundle]

    def design(self, method: str) -> str:
        """The design of a defense's prompts: `text` for the template's own words, `none`."""
        prompting = self._prompting(method)
        if self.bundle is not None and prompting == "learned":
            return self.bundle.prompts.design
        return "none" if prompting == "none" else "text"

    def label_sets(self, method: str) -> int:
        """How many encodings of its labels a picture needs: learned prompts, and undefended CLIP
        beside them."""
        return 2 if self._prompting(method) == "learned" else 1

    def group(self, pictures: Sequence[Picture], method: str) -> list[list[int]]:
        """Which pictures can run together: those whose prompts have one shape. Where these are the
        template's leading words, that hangs on the template."""
        groups: dict[torch.Size | None, list[int]] = {}
        for place, picture in enumerate(pictures):
            text = self._encode(picture, self._prompting(method)).prompts.text
            groups.setdefault(None if text is None else text.shape, []).append(place)
        return list(groups.values())

    def classify(
        self, pictures: Sequence[Picture], method: str, views: int, leaving: Leaving
    ) -> Iterator[Finding]:
        """Yield each picture's finding as soon as it leaves the loop, in whatever order.

        Args:
            pictures: of one group.
            leaving: asked at each step boundary with the steps taken and the pictures still in;
                returns those that leave now.

        Raises:
            ValueError: the method needs a bundle and there is none.
        """
        if method not in self.methods:
            raise ValueError(f"{method} needs a defense bundle")
        start = time.perf_counter()
        checkpoint = self.checkpoint
        device, preprocessing = checkpoint.clip.device, checkpoint.preprocessing
        stacked = torch.stack(
            [make_views(p.image, views, p.seed, preprocessing, device) for p in pictures]
        )
        prompting = self._prompting(method)
        prompted = [self._encode(picture, prompting) for picture in pictures]
        # Nothing but learned prompts changes what a defense sees first.
        learned = prompting == "learned"
        unprompted = [self._encode(p, "none") for p in pictures] if learned else prompted
        images = Images(
            views=stacked,
            plain=LabelFeatures(*join_encoded(unprompted)),
            prompted=LabelFeatures(*join_encoded(prompted)),
            prompts=_stack([labels.prompts for labels in prompted]),
            objective=self.objective,
            selection_ratio=self.selection_ratio,
            readouts=[picture.readout for picture in pictures],
            seeds=[picture.seed for picture in pictures],
            leaving=leaving,
        )
        clip = checkpoint.clip
        undefended = [v.probabilities for v in plain.defend(clip, images)] if learned else None
        for verdict in DEFENSES[method].defend(clip, images):
            row = verdict.row
            alone = verdict.views[0] if undefended is None else undefended[row]
            yield Finding(
                verdict,
                alone,
                float(suspicion(alone, verdict.views)),
                prompted[row].batch.truncated[0],
                verdict.adapted - start,
            )

    def adaptable(self, picture: Picture, method: str) -> bool:
        """Whether there is anything to adapt: a template that begins with its label has no words
        to start from."""
        if not DEFENSES[method].adapts:
            return False
        prompting = self._prompting(method)
        prompts = self._encode(picture, prompting).prompts
        # TPT and R-TPT bring an objective of their own, which moves all prompts there are.
        own = DEFENSES[method].prompting == "learned"
        moving = (self.objective if own else Objective()).moving(prompts)
        return prompting == "none" or any(prompts.tensors[name].numel() for name in moving)

    def threshold(self, method: str, views: int) -> float | None:
        """The suspicion above which an answer counts as suspected; None where the bundle has none
        for views that are read in this way. One view has no doubts."""
        if self.bundle is None or views == 1:
            return None
        return self.bundle.suspicion.get(DEFENSES[method].prompting)

    def _prompting(self, method: str) -> Prompting:
        prompting = DEFENSES[method].prompting
        return "words" if self.bundle is None and prompting == "learned" else prompting

    def _encode(self, picture: Picture, prompting: Prompting) -> EncodedLabels:
        template = picture.template
        if template is None:
            learned = self.bundle if prompting == "learned" else None
            template = learned.template if learned else self.template
        return self.encoder.encode(picture.labels, template, prompting)


def _stack(sets: Sequence[DefensePrompts]) -> DefensePrompts:
    """The prompts of several requests, of one shape, as a batch [B, ...]."""
    names = sets[0].tensors
    return sets[0].map({name: torch.cat([one.tensors[name] for one in sets]) for name in names})
