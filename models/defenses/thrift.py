"""TAPT that spends little where little is needed: a few views first, and no more if they agree.

Where a quarter of the views all name the same label, and name it with confidence, their mean is
the answer, without a step; every other picture goes the whole way. An attacker has to win over
fewer views on the short way than on the long one. Offered for its price, measured beside the rest.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from models.clip import PromptedCLIP
from models.defenses import tapt
from models.defenses.defense import Images, Verdict
from models.defenses.ensemble import conclude

SHARE, FEWEST = 1 / 4, 3  # of the views looked at first; fewer could hardly disagree
CONFIDENCE = 0.9  # mean probability of the label that they agree on


def defend(clip: PromptedCLIP, images: Images) -> Iterator[Verdict]:
    start, labels = time.perf_counter(), images.prompted
    few = few_views(images.views.shape[1])
    with torch.no_grad():
        features = clip.encode_images(images.views[:, :few], images.prompts.vision).features
        logits = clip.class_logits(features, labels.features, labels.batch)
    sure = agree(logits.softmax(dim=-1)).tolist()
    for verdict in conclude(logits, labels.batch.counts, start):
        if sure[verdict.row]:
            yield verdict
    rows = [row for row, enough in enumerate(sure) if not enough]
    if rows:
        for verdict in tapt.defend(clip, images.select(rows)):
            yield replace(verdict, row=rows[verdict.row])


def few_views(views: int) -> int:
    """How many of the views are looked at first."""
    return min(views, max(FEWEST, int(views * SHARE)))


def agree(probabilities: Tensor) -> Tensor:
    """[B]: whether views [B, V, C] name one label, with confidence."""
    best = probabilities.argmax(dim=-1)
    confidence = probabilities.mean(dim=1).amax(dim=-1)
    return (best == best[:, :1]).all(dim=1) & (confidence >= CONFIDENCE)
