"""No defense: CLIP's own zero-shot prediction for the picture as it is."""

from collections.abc import Iterator
from dataclasses import replace

from models.clip import PromptedCLIP
from models.defenses import ensemble
from models.defenses.defense import Images, Verdict


def defend(clip: PromptedCLIP, images: Images) -> Iterator[Verdict]:
    """The mean over one view, the picture itself."""
    return ensemble.defend(clip, replace(images, views=images.views[:, :1]))
