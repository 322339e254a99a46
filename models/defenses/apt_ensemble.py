"""The learned prompts as they are, and the mean prediction over all views."""

from collections.abc import Iterator

from models.clip import PromptedCLIP
from models.defenses.defense import Images, Verdict
from models.defenses.ensemble import average


def defend(clip: PromptedCLIP, images: Images) -> Iterator[Verdict]:
    return average(clip, images.views, images.prompted, images.prompts.vision)
