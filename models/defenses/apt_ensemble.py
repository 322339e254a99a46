"""The learned prompts as they are, and the mean prediction over all views."""

from collections.abc import Iterator

from models.clip import PromptedCLIP
from models.defenses.catalog import DefenseSpec
from models.defenses.defense import DefenseInput, DefenseOutput, average_views

SPEC = DefenseSpec(
    name="apt-ensemble",
    description="Prompts learned against attacks, and the mean prediction over random views.",
    prompts="learned",
    views="all",
    adapts=False,
    readout="all",
    order=3,
)


def defend(clip: PromptedCLIP, inputs: DefenseInput) -> Iterator[DefenseOutput]:
    yield average_views(clip, inputs.views, inputs.prompted, inputs.prompts.vision)
