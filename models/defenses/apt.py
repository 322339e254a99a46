"""Adversarial prompt tuning (APT): the learned prompts as they are, on the picture alone.

What TAPT is before its first step; the difference between the two is what the loop adds.
"""

from collections.abc import Iterator

from models.clip import PromptedCLIP
from models.defenses.defense import Images, Verdict
from models.defenses.ensemble import average


def defend(clip: PromptedCLIP, images: Images) -> Iterator[Verdict]:
    return average(clip, images.views[:, :1], images.prompted, images.prompts.vision)
