"""The plain view ensemble: the mean prediction of undefended CLIP over all views."""

import time
from collections.abc import Iterator

import torch

from models.clip import PromptedCLIP
from models.defenses.defense import Images, Verdict
from models.tapt import class_logits, view_entropy


def defend(clip: PromptedCLIP, images: Images) -> Iterator[Verdict]:
    start = time.perf_counter()
    with torch.no_grad():
        features = clip.encode_images(images.views).features
        logits = class_logits(clip, features, images.plain.features, images.plain.batch)
        probabilities, entropy = logits.softmax(dim=-1), view_entropy(logits).tolist()
    for row, count in enumerate(images.plain.batch.counts):
        views = probabilities[row, :, :count]
        yield Verdict(
            row=row,
            probabilities=views.mean(dim=0),
            views=views,
            kept=len(views),
            steps=0,
            entropy_before=entropy[row],
            entropy_after=entropy[row],
            adapted=start,
        )
