"""Test-time prompt tuning (TPT, Shu et al., NeurIPS 2022, arXiv 2209.07511).

AdamW steps on the template's own words lower the entropy of the confident views' mean prediction;
the answer is read from the image alone. Made for distribution shift, not against attacks.
"""

from collections.abc import Iterator
from dataclasses import replace

from models.clip import PromptedCLIP
from models.defenses import tapt
from models.defenses.catalog import DefenseSpec
from models.defenses.defense import DefenseInput, DefenseOutput
from models.tapt import Objective

SPEC = DefenseSpec(
    name="tpt",
    description="Adapts the template's words to each image (TPT); not made against attacks.",
    prompts="words",
    views="all",
    adapts=True,
    readout="single",
    order=5,
)

OBJECTIVE = Objective(learning_rate=5e-3)  # as published


def defend(clip: PromptedCLIP, inputs: DefenseInput) -> Iterator[DefenseOutput]:
    objective = replace(OBJECTIVE, early_stop=inputs.objective.early_stop)
    return tapt.tune(clip, replace(inputs, objective=objective))
