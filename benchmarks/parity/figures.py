"""A file of figures: what the published code was given, and what it made of it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPModel

from models.clip import PromptedCLIP
from models.labels import LabelBatch, one_request

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
TOLERANCE, VALUE_TOLERANCE = 1e-4, 1e-6  # the second for what a step moves: prompts and pixels


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest absolute difference in a quantity, how much is allowed, and how many of its
    values were left out because arithmetic does not determine them."""

    quantity: str
    gap: float
    tolerance: float
    left_out: int = 0

    @property
    def beyond(self) -> bool:
        return not self.gap <= self.tolerance


@dataclass(frozen=True, slots=True)
class Figures:
    """`given` and `expected` tensors by name, and the run's settings as text."""

    name: str
    metadata: dict[str, str]
    given: dict[str, Tensor]
    expected: dict[str, Tensor]

    def difference(
        self,
        value: Tensor,
        quantity: str,
        tolerance: float = TOLERANCE,
        determined: Tensor | None = None,
        slack: float = 0.0,
    ) -> Difference:
        """Our value of a quantity against theirs. Where not all are within the tolerance, those
        that are not `determined` may differ by `slack`.

        Raises:
            ValueError: it has another shape.
        """
        theirs = self.expected[quantity]
        if value.shape != theirs.shape:
            raise ValueError(f"{self.name}: {quantity} is {list(theirs.shape)}")
        gaps = (value.double() - theirs.double()).abs().nan_to_num(float("inf"))
        if determined is None or gaps.max() <= tolerance:
            return Difference(quantity, float(gaps.max()), tolerance)
        left_out = int((~determined).sum())
        gaps = torch.where(determined, gaps, (gaps - slack).clamp(min=0))
        return Difference(quantity, float(gaps.max()), tolerance, left_out)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """What is given under a prefix, the prefix cut off."""
        found = ((k, v) for k, v in self.given.items() if k.startswith(prefix))
        return {name.removeprefix(prefix): value for name, value in found}

    def labels(self, clip: PromptedCLIP) -> LabelBatch:
        """The token rows, cut behind the longest end-of-text."""
        ids = self.given["input_ids"]
        end = clip.model.config.text_config.eos_token_id
        ends = ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)
        return one_request(ids[:, : int(ends.max()) + 1], ends)

    @property
    def views(self) -> Tensor:
        """[1, V, 3, S, S] in [0, 1]."""
        return self.given["views"][None].float() / 255


def read(path: Path) -> Figures:
    """One file; its tensors are copied, because how products round hangs on their alignment."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    expected = {k.removeprefix("expected."): v for k, v in tensors.items() if "expected." in k}
    given = {k: v for k, v in tensors.items() if "expected." not in k}
    return Figures(path.name, metadata, given, expected)


@cache
def load_checkpoint(directory: Path) -> PromptedCLIP:
    """A checkpoint of transformers', normalizing as OpenAI's."""
    model = CLIPModel.from_pretrained(directory, use_safetensors=True, dtype=torch.float32)
    return PromptedCLIP(model, CLIP_MEAN, CLIP_STD)
