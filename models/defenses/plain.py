"""No defense: CLIP's own zero-shot prediction for the image as it is."""

from collections.abc import Iterator

from models.clip import PromptedCLIP
from models.defenses.catalog import DefenseSpec
from models.defenses.defense import DefenseInput, DefenseOutput, average_views

SPEC = DefenseSpec(
    name="plain",
    description="CLIP's own prediction, without any defense.",
    prompts="none",
    views="one",
    adapts=False,
    readout="single",
    order=0,
)


def defend(clip: PromptedCLIP, inputs: DefenseInput) -> Iterator[DefenseOutput]:
    yield average_views(clip, inputs.views[:, :1], inputs.plain)
