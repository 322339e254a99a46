"""What an attacker knows and wants: four threat models, to be named beside every figure.

- `transfer`: undefended CLIP, the image alone;
- `static`: CLIP with the learned prompts, the image alone;
- `adaptive`: the whole defense with its readout, but not the seed of its views;
- `stealthy`: the same, and wants a low suspicion score as well, by one attack of that name.
"""

from typing import Literal, get_args

from torch import Tensor

from models.attacks.attack import Model
from models.classifier import DefendedClassifier
from models.label_encoder import EncodedLabels, Template

Threat = Literal["transfer", "static", "adaptive", "stealthy"]
THREATS: tuple[Threat, ...] = get_args(Threat)
STEALTHY: Threat = "stealthy"


def transfer(
    classifier: DefendedClassifier, labels: tuple[str, ...], template: Template | None = None
) -> Model:
    """Undefended CLIP's logits of pixels [N, 3, S, S]."""
    return _single_view(classifier, classifier.encoder.encode(labels, template, "none"))


def static(
    classifier: DefendedClassifier, labels: tuple[str, ...], template: Template | None = None
) -> Model:
    """The logits of CLIP with the learned prompts.

    Raises:
        ValueError: there is no bundle, so that this would be the transfer attack by another name.
    """
    if classifier.bundle is None:
        raise ValueError("the static threat attacks learned prompts: it needs a defense bundle")
    return _single_view(classifier, classifier.encoder.encode(labels, template, "learned"))


def _single_view(classifier: DefendedClassifier, labels: EncodedLabels) -> Model:
    clip = classifier.checkpoint.clip

    def logits(pixels: Tensor) -> Tensor:
        # One request with one view per image, so that all share labels and prompts.
        seen = clip.encode_images(pixels.unsqueeze(0), labels.prompts.vision).features
        return clip.class_logits(seen, labels.features, labels.batch)[0]

    return logits
