"""What an attacker knows: three threat models, always named beside a figure.

- `transfer`: undefended CLIP, the picture alone;
- `static`: CLIP with the learned prompts, the picture alone;
- `adaptive`: the whole defense with its readout, but not the seed of its views.
"""

from typing import Literal, get_args

from torch import Tensor

from models.attacks.attack import Model
from models.classifier import DefendedClassifier
from models.label_encoder import EncodedLabels, Prompting

Threat = Literal["transfer", "static", "adaptive"]
THREATS: tuple[Threat, ...] = get_args(Threat)


def encode(
    guard: DefendedClassifier, labels: tuple[str, ...], prompting: Prompting
) -> EncodedLabels:
    """Labels as the guard reads them in the template that goes with such prompts."""
    learned = guard.bundle if prompting == "learned" else None
    template = learned.template if learned else guard.template
    return guard.encoder.encode(labels, template, prompting)


def transfer(guard: DefendedClassifier, labels: tuple[str, ...]) -> Model:
    """Undefended CLIP's logits of pixels [N, 3, S, S]."""
    return _single_view(guard, encode(guard, labels, "none"))


def static(guard: DefendedClassifier, labels: tuple[str, ...]) -> Model:
    """The logits of CLIP with the learned prompts.

    Raises:
        ValueError: there is no bundle, so that this would be the transfer attack by another name.
    """
    if guard.bundle is None:
        raise ValueError("the static threat attacks learned prompts: it needs a defense bundle")
    return _single_view(guard, encode(guard, labels, "learned"))


def _single_view(guard: DefendedClassifier, labels: EncodedLabels) -> Model:
    clip = guard.checkpoint.clip

    def logits(pixels: Tensor) -> Tensor:
        # One request with a view a picture, so that all share labels and prompts.
        seen = clip.encode_images(pixels.unsqueeze(0), labels.prompts.vision).features
        return clip.class_logits(seen, labels.features, labels.batch)[0]

    return logits
