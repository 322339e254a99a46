"""The plain view ensemble: the mean prediction of undefended CLIP over all views."""

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.clip import PromptedCLIP
from models.defenses.defense import Images, LabelFeatures, Verdict
from models.tapt import view_entropy


def defend(clip: PromptedCLIP, images: Images) -> Iterator[Verdict]:
    return average(clip, images.views, images.plain, None)


def average(
    clip: PromptedCLIP, views: Tensor, labels: LabelFeatures, visual: Tensor | None
) -> Iterator[Verdict]:
    """The mean prediction over views [B, V, 3, S, S], seen with visual prompts or without."""
    start = time.perf_counter()
    with torch.no_grad():
        features = clip.encode_images(views, visual).features
        logits = clip.class_logits(features, labels.features, labels.batch)
    return conclude(logits, labels.batch.counts, start)


def conclude(logits: Tensor, counts: Sequence[int], start: float) -> Iterator[Verdict]:
    """The mean prediction from the views' logits [B, V, C] for so many labels a request; looking
    began at `start`."""
    probabilities, entropy = logits.softmax(dim=-1), view_entropy(logits).tolist()
    for row, count in enumerate(counts):
        seen = probabilities[row, :, :count]
        yield Verdict(
            row=row,
            probabilities=seen.mean(dim=0),
            views=seen,
            kept=len(seen),
            steps=0,
            entropy_before=entropy[row],
            entropy_after=entropy[row],
            adapted=start,
        )
