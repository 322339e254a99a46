"""Adversarial prompt tuning (APT, Li et al., CVPR 2024, arXiv 2403.01849): learned prompts, as they
are, on the image alone.

This is TAPT before its first step; the difference between the two is what adapting adds.
"""

from collections.abc import Iterator

from models.clip import PromptedCLIP
from models.defenses.catalog import DefenseSpec
from models.defenses.defense import DefenseInput, DefenseOutput, average_views

SPEC = DefenseSpec(
    name="apt",
    description="Prompts learned against attacks, on the image alone.",
    prompts="learned",
    views="one",
    adapts=False,
    readout="single",
    order=2,
)


def defend(clip: PromptedCLIP, inputs: DefenseInput) -> Iterator[DefenseOutput]:
    yield average_views(clip, inputs.views[:, :1], inputs.prompted, inputs.prompts.vision)
