"""Test-time prompt tuning (TPT, Shu et al., NeurIPS 2022, arXiv 2209.07511).

The template's own words take AdamW steps down the entropy of the confident views' mean prediction;
the picture alone is read out. Made for distribution shift, not against attacks.
"""

from collections.abc import Iterator
from dataclasses import replace

from models.clip import PromptedCLIP
from models.defenses import tapt
from models.defenses.defense import Images, Verdict
from models.objective import Objective

OBJECTIVE = Objective(learning_rate=5e-3)


def defend(clip: PromptedCLIP, images: Images) -> Iterator[Verdict]:
    single = ["single"] * len(images.readouts)
    return tapt.defend(clip, replace(images, objective=OBJECTIVE, readouts=single))
