"""A gate in front of TAPT: only an image that looks attacked is adapted.

Padding moves the features of an attacked image far more than those of a clean one (test-time
padding, arXiv 2512.16523). An image whose features stay close gets CLIP's undefended prediction,
at a fraction of the cost. Expect it to lower robustness: an attacker who keeps the cosine above the
threshold faces undefended CLIP.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip import PromptedCLIP
from models.defenses import plain, tapt
from models.defenses.catalog import DefenseSpec
from models.defenses.defense import DefenseInput, DefenseOutput

SPEC = DefenseSpec(
    name="gate",
    description="TAPT for images whose features move when padded; others pass undefended.",
    prompts="learned",
    views="all",
    adapts=True,
    order=9,
)

THRESHOLD = 0.8  # cosine, as published: an image at or below it counts as attacked
BORDER = 1 / 7  # of a side, on each side; ours: 32 of 224 pixels


def defend(clip: PromptedCLIP, inputs: DefenseInput) -> Iterator[DefenseOutput]:
    suspect = (padding_similarity(clip, inputs.views[:, 0]) <= THRESHOLD).tolist()
    for defense, attacked in ((plain, False), (tapt, True)):
        rows = [row for row, suspicious in enumerate(suspect) if suspicious == attacked]
        if rows:
            for output in defense.defend(clip, inputs.select(rows)):
                yield replace(output.renumber(rows), readout=defense.SPEC.readout)


@torch.no_grad()
def padding_similarity(clip: PromptedCLIP, pixels: Tensor) -> Tensor:
    """Cosine [B] between the features of images [B, 3, S, S] and of the same, shrunk and padded
    with black to S x S."""
    side = pixels.shape[-1]
    width = max(1, round(side * BORDER))
    inner = F.interpolate(pixels, size=side - 2 * width, mode="bilinear", antialias=True)
    padded = F.pad(inner, (width, width, width, width))
    features = clip.encode_images(torch.stack([pixels, padded], dim=1)).features
    return (features[:, 0] * features[:, 1]).sum(dim=-1)
