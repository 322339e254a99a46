"""A gate in front of TAPT: only a picture that looks attacked is adapted.

Padding moves the features of an attacked picture far more than those of a clean one (test-time
padding, arXiv 2512.16523), so a picture whose features stay near their own passes with CLIP's
undefended prediction, at a fraction of the cost. An image that passes undefended can only lower
the worst case: an attacker who knows the gate needs only to stay below it. Offered for its price.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip import PromptedCLIP
from models.defenses import plain, tapt
from models.defenses.defense import Images, Verdict

THRESHOLD = 0.8  # cosine, as published: at or below it a picture counts as attacked
BORDER = 1 / 7  # of a side, on each: 32 of 224 pixels; ours


def defend(clip: PromptedCLIP, images: Images) -> Iterator[Verdict]:
    suspect = (steadiness(clip, images.views[:, 0]) <= THRESHOLD).tolist()
    for defense, attacked in ((plain, False), (tapt, True)):
        rows = [row for row, doubtful in enumerate(suspect) if doubtful == attacked]
        if rows:
            for verdict in defense.defend(clip, images.select(rows)):
                yield replace(verdict, row=rows[verdict.row])


def steadiness(clip: PromptedCLIP, pictures: Tensor) -> Tensor:
    """Cosine [B] between the features of pictures [B, 3, S, S] and of the same within a border."""
    side = pictures.shape[-1]
    width = max(1, round(side * BORDER))
    inner = F.interpolate(pictures, size=side - 2 * width, mode="bilinear", antialias=True)
    padded = F.pad(inner, (width, width, width, width))
    with torch.no_grad():
        features = clip.encode_images(torch.stack([pictures, padded], dim=1)).features
    return (features[:, 0] * features[:, 1]).sum(dim=-1)
