"""No defense: CLIP's own zero-shot prediction for the picture as it is."""

from collections.abc import Iterator

from models.clip import PromptedCLIP
from models.defenses.defense import Images, Verdict
from models.defenses.ensemble import average


def defend(clip: PromptedCLIP, images: Images) -> Iterator[Verdict]:
    """The mean over one view, the picture itself."""
    return average(clip, images.views[:, :1], images.plain, None)
