"""Defensive prompts as values.

Each request gets a copy of the learned prompts, as a batch dimension. The copy is adapted and
dropped with the answer; nothing writes into the learned tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DESIGNS: Mapping[str, frozenset[str]] = {
    "v": frozenset({"vision"}),
    "vli": frozenset({"vision", "text"}),
    "vlj": frozenset({"text", "projection.weight", "projection.bias"}),
    # Without a bundle: the template's own leading words.
    "text": frozenset({"text"}),
}


@dataclass(frozen=True, slots=True)
class DefensePrompts:
    """Prompts of one design for a batch of requests.

    `tensors` maps a name to fp32 values with the batch first:

    - `vision` [B, depth, tokens, vision width], designs V and VLI;
    - `text` [B, depth, tokens, text width], designs VLI, VLJ and text;
    - `projection.weight` [B, depth, vision width, text width] and `projection.bias`
      [B, depth, vision width], design VLJ: its visual prompts are a linear function of its
      text prompts, and that map adapts too.
    """

    design: str
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        if self.design not in DESIGNS:
            raise ValueError(f"unknown design {self.design!r}; known: {', '.join(DESIGNS)}")
        if self.tensors.keys() != DESIGNS[self.design]:
            raise ValueError(
                f"design {self.design} takes {sorted(DESIGNS[self.design])}, "
                f"not {sorted(self.tensors)}"
            )

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    @property
    def vision(self) -> Tensor | None:
        """Visual prompts [B, depth, tokens, vision width], or None where the design has none."""
        if self.design != "vlj":
            return self.tensors.get("vision")
        weight, bias = self.tensors["projection.weight"], self.tensors["projection.bias"]
        return self.tensors["text"] @ weight.transpose(-1, -2) + bias.unsqueeze(-2)

    @property
    def text(self) -> Tensor | None:
        """Text prompts [B, depth, tokens, text width], or None for design V."""
        return self.tensors.get("text")

    def map(self, tensors: Mapping[str, Tensor]) -> "DefensePrompts":
        """The same design with other values."""
        return DefensePrompts(self.design, dict(tensors))

    def expand(self, batch: int) -> "DefensePrompts":
        """Copies of a single set of prompts for `batch` requests."""
        return self.map(
            {name: value.expand(batch, *value.shape[1:]) for name, value in self.tensors.items()}
        )

    def select(self, rows: list[int]) -> "DefensePrompts":
        """The prompts of some requests."""
        return self.map({name: value[rows] for name, value in self.tensors.items()})

    def to(self, device: torch.device) -> "DefensePrompts":
        return self.map({name: value.to(device) for name, value in self.tensors.items()})
