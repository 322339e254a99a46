"""Robust test-time prompt tuning (R-TPT, Sheng et al., CVPR 2025, arXiv 2504.11195).

AdamW steps on the template's own words lower the mean of the confident views' entropies: one
attacked view cannot pull the others along, as it could through the mean prediction. The adapted
views' logits are averaged, weighted by how close each view lies to its neighbors.
"""

from collections.abc import Iterator
from dataclasses import replace

from models.clip import PromptedCLIP
from models.defenses import tapt
from models.defenses.catalog import DefenseSpec
from models.defenses.defense import DefenseInput, DefenseOutput
from models.tapt import Objective

SPEC = DefenseSpec(
    name="rtpt",
    description="Adapts the template's words to each image and weighs views by reliability "
    "(R-TPT).",
    prompts="words",
    views="all",
    adapts=True,
    readout="weighted",
    order=6,
)

OBJECTIVE = Objective(of_mean=False, learning_rate=5e-3)  # as published


def defend(clip: PromptedCLIP, inputs: DefenseInput) -> Iterator[DefenseOutput]:
    objective = replace(OBJECTIVE, early_stop=inputs.objective.early_stop)
    return tapt.tune(clip, replace(inputs, objective=objective), averages_logits=True)
