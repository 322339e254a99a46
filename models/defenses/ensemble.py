"""The plain view ensemble: the mean prediction of undefended CLIP over all views."""

from collections.abc import Iterator

from models.clip import PromptedCLIP
from models.defenses.catalog import DefenseSpec
from models.defenses.defense import DefenseInput, DefenseOutput, average_views

SPEC = DefenseSpec(
    name="ensemble",
    description="The mean of CLIP's predictions over random views.",
    prompts="none",
    views="all",
    adapts=False,
    readout="all",
    order=1,
)


def defend(clip: PromptedCLIP, inputs: DefenseInput) -> Iterator[DefenseOutput]:
    yield average_views(clip, inputs.views, inputs.plain)
