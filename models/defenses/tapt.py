"""TAPT as a defense: first look, adapt, read out each request as it leaves the loop."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models import tapt
from models.clip import PromptedCLIP
from models.defenses.defense import Images, Verdict
from models.prompts import DefensePrompts
from models.readout import view_weights


def defend(clip: PromptedCLIP, images: Images) -> Iterator[Verdict]:
    return tune(clip, images, mean_prediction)


def mean_prediction(weights: Tensor, logits: Tensor) -> Tensor:
    """Probabilities [n, C]: the mean of the views' predictions, from weights [n, V] that sum to 1
    and logits [n, V, C]."""
    return (weights.unsqueeze(-1) * logits.softmax(dim=-1)).sum(dim=1)


def tune(
    clip: PromptedCLIP, images: Images, average: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[Verdict]:
    """Tune the prompts of `images` and read the views out by `average`, which has the signature of
    `mean_prediction`."""
    labels, text = images.prompted.batch, images.prompted.features
    with torch.no_grad():
        features = clip.encode_images(images.views, images.prompts.vision).features
        logits = clip.class_logits(features, text, labels)
    kept = tapt.select_confident(logits, images.selection_ratio)
    before = tapt.view_entropy(_gather(logits, kept)).tolist()
    departures = tapt.adapt(
        clip,
        _gather(images.views, kept),
        labels,
        text,
        images.prompts,
        images.objective,
        images.leaving,
    )
    for departure in departures:
        adapted = time.perf_counter()
        # Requests that leave together are read out together, by readout.
        for readout in sorted({images.readouts[row] for row in departure.rows}):
            places = [i for i, row in enumerate(departure.rows) if images.readouts[row] == readout]
            rows = [departure.rows[place] for place in places]
            weights = view_weights(readout, kept[rows], features[rows])
            after = logits[rows]
            if departure.steps:
                after = _look_again(
                    clip, images, departure.prompts.select(places), rows, weights, kept, after
                )
            probabilities = average(weights, after)
            entropy = tapt.view_entropy(_gather(after, kept[rows])).tolist()
            for place, row in enumerate(rows):
                count = labels.counts[row]
                yield Verdict(
                    row=row,
                    probabilities=probabilities[place, :count],
                    views=logits[row, :, :count].softmax(dim=-1),
                    kept=kept.shape[1],
                    steps=departure.steps,
                    entropy_before=before[row],
                    entropy_after=entropy[place],
                    adapted=adapted,
                )


def _look_again(
    clip: PromptedCLIP,
    images: Images,
    prompts: DefensePrompts,
    rows: list[int],
    weights: Tensor,
    kept: Tensor,
    logits: Tensor,
) -> Tensor:
    """Logits [n, V, C] with the adapted prompts, anew for the views that count or were kept."""
    labels = images.prompted.batch.select(rows)
    wanted = (weights > 0).scatter(1, kept[rows], True)
    most = int(wanted.sum(dim=1).max())
    # The same number of views a request: the wanted ones first, then any others.
    seen = wanted.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    with torch.no_grad():
        features = clip.encode_images(_gather(images.views[rows], seen), prompts.vision).features
        text = images.prompted.batch.take(images.prompted.features, rows)
        if "text" in images.objective.moving(prompts):
            text = clip.encode_labels(labels, prompts.text)
        fresh = clip.class_logits(features, text, labels)
    index = seen.unsqueeze(-1).expand(-1, -1, fresh.shape[-1])
    return logits[..., : fresh.shape[-1]].scatter(1, index, fresh)


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Values [B, V, ...] at views [B, k]."""
    return values[torch.arange(len(values), device=values.device).unsqueeze(1), index]
