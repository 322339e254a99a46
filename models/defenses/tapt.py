"""TAPT as a defense: look at all views, adapt, and read out each request as it leaves the loop."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from models import tapt
from models.clip import PromptedCLIP
from models.defenses.catalog import DefenseSpec
from models.defenses.defense import DefenseInput, DefenseOutput
from models.prompts import DefensePrompts
from models.readout import gather_views, view_weights

SPEC = DefenseSpec(
    name="tapt",
    description="Adapts prompts learned against attacks to each image (TAPT).",
    prompts="learned",
    views="all",
    adapts=True,
    order=4,
)


def defend(clip: PromptedCLIP, inputs: DefenseInput) -> Iterator[DefenseOutput]:
    return tune(clip, inputs)


def tune(
    clip: PromptedCLIP, inputs: DefenseInput, averages_logits: bool = False
) -> Iterator[DefenseOutput]:
    """Adapt the prompts of `inputs` and read the views out with them."""
    labels, text = inputs.prompted.batch, inputs.prompted.features
    # Of the first look, only the weights of the `weighted` readout depend smoothly on the views.
    with torch.set_grad_enabled(torch.is_grad_enabled() and "weighted" in inputs.readouts):
        features = clip.encode_images(inputs.views, inputs.prompts.vision).features
        initial = clip.class_logits(features, text, labels)
    kept = tapt.select_confident(initial, inputs.selection_ratio)
    departures = inputs.adaptation.adapt(
        clip,
        gather_views(inputs.views, kept),
        labels,
        text,
        inputs.prompts,
        inputs.objective,
        inputs.adaptation.leaving,
        gather_views(features, kept),
    )
    for departure in departures:
        adapted = time.perf_counter()
        # Requests that leave together are read out together, one readout after the other.
        for readout in sorted({inputs.readouts[row] for row in departure.rows}):
            places = [i for i, row in enumerate(departure.rows) if inputs.readouts[row] == readout]
            rows = [departure.rows[place] for place in places]
            weights = view_weights(readout, kept[rows], features[rows])
            logits = initial[rows]
            if departure.steps or not inputs.adaptation.all_logits:
                counted = weights > 0
                if inputs.adaptation.all_logits:  # the entropy of the kept views is reported
                    counted = counted.scatter(1, kept[rows], True)
                seen = _order_views(counted)
                prompts = departure.prompts.select(places)
                chosen = inputs.select(rows)
                fresh = _look_again(clip, chosen, prompts, departure.steps, features[rows], seen)
                if inputs.adaptation.all_logits:
                    index = seen.unsqueeze(-1).expand(-1, -1, fresh.shape[-1])
                    logits = logits[..., : fresh.shape[-1]].scatter(1, index, fresh)
                else:
                    logits, weights = fresh, gather_views(weights, seen)
            yield DefenseOutput(
                rows=rows,
                initial=initial[rows],
                logits=logits,
                weights=weights,
                kept=kept[rows],
                averages_logits=averages_logits,
                steps=departure.steps,
                adapted=adapted,
            )


def _order_views(wanted: Tensor) -> Tensor:
    """Indices [n, m] of the views to look at, from a mask [n, V]: the wanted ones first. All
    requests look at the same number, so others fill up where one wants fewer."""
    most = int(wanted.sum(dim=1).max())
    return wanted.byte().argsort(dim=1, descending=True, stable=True)[:, :most]


def _look_again(
    clip: PromptedCLIP,
    inputs: DefenseInput,
    prompts: DefensePrompts,
    steps: int,
    features: Tensor,
    seen: Tensor,
) -> Tensor:
    """Logits [n, m, C] of the views `seen` [n, m] with the prompts adapted in `steps` steps.

    Args:
        features: [n, V, D] of all views before the steps.
    """
    labels, text = inputs.prompted.batch, inputs.prompted.features
    if torch.is_grad_enabled() or inputs.objective.moves_images(prompts):
        views = gather_views(inputs.views, seen)
        images = clip.encode_images(views, prompts.vision).features
    else:
        images = gather_views(features, seen)
    if steps and "text" in inputs.objective.moving(prompts):
        text = clip.encode_labels(labels, prompts.text)
    return clip.class_logits(images, text, labels)
