"""Robust test-time prompt tuning (R-TPT, Sheng et al., CVPR 2025, arXiv 2504.11195).

The template's own words take AdamW steps down the mean of the confident views' entropies: an
attacked view among them cannot pull the others along as it would through the mean prediction. The
adapted views' logits are averaged by how close each view lies to its neighbors.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from models.clip import PromptedCLIP
from models.defenses import tapt
from models.defenses.defense import Images, Verdict
from models.objective import Objective

OBJECTIVE = Objective(of_mean=False, learning_rate=5e-3)


def defend(clip: PromptedCLIP, images: Images) -> Iterator[Verdict]:
    weighted = ["weighted"] * len(images.readouts)
    images = replace(images, objective=OBJECTIVE, readouts=weighted)
    return tapt.tune(clip, images, lambda w, logits: mean_logits(w, logits).softmax(dim=-1))


def mean_logits(weights: Tensor, logits: Tensor) -> Tensor:
    """Logits [n, C] averaged over views: weights [n, V], logits [n, V, C]."""
    return (weights.unsqueeze(-1) * logits).sum(dim=1)
