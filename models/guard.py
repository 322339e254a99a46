"""A defended CLIP: checkpoint, bundle and objective together, from pictures and labels to verdicts.

Service, command line and evaluation all classify through here.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.bundle import DefenseBundle
from models.checkpoint import Checkpoint
from models.defenses import DEFENSES, plain
from models.defenses.defense import Images, LabelFeatures, Verdict
from models.encoder import EncodedLabels, LabelEncoder, join_encoded
from models.prompts import DefensePrompts
from models.suspicion import suspicion
from models.tapt import Objective
from models.views import make_views

DEFAULT_TEMPLATE = "a photo of a {}."

Leaving = Callable[[int, list[int]], set[int]]


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


class Guard:
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
    def design(self) -> str:
        """The design of the prompts that adapt; `text` without a bundle."""
        return "text" if self.bundle is None else self.bundle.prompts.design

    def group(self, pictures: Sequence[Picture]) -> list[list[int]]:
        """Which pictures can run together: those whose prompts have one shape. Without a bundle
        that hangs on the template's leading words."""
        groups: dict[torch.Size | None, list[int]] = {}
        for place, picture in enumerate(pictures):
            prompts = self._encode(picture, prompted=True).prompts
            text = None if prompts is None else prompts.text
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
        """
        start = time.perf_counter()
        checkpoint = self.checkpoint
        device, preprocessing = checkpoint.clip.device, checkpoint.preprocessing
        stacked = torch.stack(
            [make_views(p.image, views, p.seed, preprocessing, device) for p in pictures]
        )
        unprompted = [self._encode(picture, prompted=False) for picture in pictures]
        prompted = [self._encode(picture, prompted=True) for picture in pictures]
        images = Images(
            views=stacked,
            plain=LabelFeatures(*join_encoded(unprompted)),
            prompted=LabelFeatures(*join_encoded(prompted)),
            prompts=_stack([labels.prompts for labels in prompted]),
            objective=self.objective,
            selection_ratio=self.selection_ratio,
            readouts=[picture.readout for picture in pictures],
            leaving=leaving,
        )
        undefended = [verdict.probabilities for verdict in plain.defend(checkpoint.clip, images)]
        for verdict in DEFENSES[method](checkpoint.clip, images):
            row = verdict.row
            yield Finding(
                verdict,
                undefended[row],
                float(suspicion(undefended[row], verdict.views)),
                prompted[row].batch.truncated[0],
                verdict.adapted - start,
            )

    def adaptable(self, picture: Picture) -> bool:
        """Whether there is a prompt to adapt: a template that begins with its label has none
        unless a bundle brings it."""
        prompts = self._encode(picture, prompted=True).prompts
        return prompts is not None and any(v.numel() for v in prompts.tensors.values())

    def _encode(self, picture: Picture, prompted: bool) -> EncodedLabels:
        template = picture.template
        if template is None:
            template = self.bundle.template if prompted and self.bundle else self.template
        return self.encoder.encode(picture.labels, template, prompted)


def _stack(prompts: Sequence[DefensePrompts | None]) -> DefensePrompts:
    """The learned prompts of several requests, of one shape, as a batch [B, ...]."""
    sets = [one for one in prompts if one is not None]
    names = sets[0].tensors
    return sets[0].map({name: torch.cat([one.tensors[name] for one in sets]) for name in names})
