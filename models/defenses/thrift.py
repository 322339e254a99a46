"""TAPT that looks at a few views first and stops if they agree.

If a quarter of the views all give the same label with confidence, their mean is the answer, without
a step. Every other image is adapted as usual. An attacker has fewer views to fool on the short way,
so expect lower robustness for the time it saves.
"""

import time
from collections.abc import Iterator

from torch import Tensor

from models.clip import PromptedCLIP
from models.defenses import tapt
from models.defenses.catalog import DefenseSpec
from models.defenses.defense import DefenseInput, DefenseOutput

SPEC = DefenseSpec(
    name="thrift",
    description="Looks at a quarter of the views. If they agree confidently, their mean is the "
    "answer; otherwise TAPT.",
    prompts="learned",
    views="all",
    adapts=True,
    order=10,
)

SHARE, FEWEST = 1 / 4, 3  # views looked at first; fewer than three could hardly disagree
CONFIDENCE = 0.9  # mean probability of the label that they agree on


def defend(clip: PromptedCLIP, inputs: DefenseInput) -> Iterator[DefenseOutput]:
    start, labels = time.perf_counter(), inputs.prompted
    few = few_views(inputs.views.shape[1])
    features = clip.encode_images(inputs.views[:, :few], inputs.prompts.vision).features
    logits = clip.class_logits(features, labels.features, labels.batch)
    done = agree(logits.softmax(dim=-1)).tolist()
    if rows := [row for row, enough in enumerate(done) if enough]:
        yield DefenseOutput(rows, logits[rows], logits[rows], adapted=start, readout="all")
    if rows := [row for row, enough in enumerate(done) if not enough]:
        for output in tapt.defend(clip, inputs.select(rows)):
            yield output.renumber(rows)


def few_views(views: int) -> int:
    """How many of the views are looked at first."""
    return min(views, max(FEWEST, int(views * SHARE)))


def agree(probabilities: Tensor) -> Tensor:
    """[B], true where all views [B, V, C] name one label and their mean is confident of it."""
    best = probabilities.argmax(dim=-1)
    confidence = probabilities.mean(dim=1).amax(dim=-1)
    return (best == best[:, :1]).all(dim=1) & (confidence >= CONFIDENCE)
