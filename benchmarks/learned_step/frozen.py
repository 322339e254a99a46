"""What no step and no gate changes: the model, its labels and how it draws views."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.learned_step.learning import Answer
from models.classifier import DefendedClassifier
from models.clip import PromptedCLIP
from models.images.preprocess import Preprocessing
from models.statistics import TokenStatistics
from models.views import make_batch_views, round_levels


@dataclass(frozen=True, slots=True)
class Frozen:
    """What no step changes.

    Attributes:
        text: features [C, D] of the labels.
        layers: blocks whose inputs the alignment compares.
    """

    clip: PromptedCLIP
    preprocessing: Preprocessing
    text: Tensor
    statistics: TokenStatistics
    layers: int

    def cut(self, pixels: Tensor, views: int, seeds: Sequence[int]) -> Tensor:
        """Views [N, views, 3, S, S] of images [N, 3, S, S] in [0, 1], with a gradient."""
        images = list(round_levels(pixels * 255))
        return make_batch_views(images, views, seeds, self.preprocessing, pixels.device)

    def logits(self, views: Tensor, visual: Tensor) -> Tensor:
        """[N, V, C] with prompts [N, depth, tokens, width]."""
        seen = self.clip.encode_images(views, visual).features
        logits: Tensor = self.clip.logit_scale * seen @ self.text.T
        return logits

    def answer_by_mean(self, vision: Tensor, views: int) -> Answer:
        """The views with prompts [1, depth, tokens, width] as they are."""

        def answer(pixels: Tensor, seeds: Sequence[int]) -> Tensor:
            cut = self.cut(pixels, views, seeds)
            return self.logits(cut, vision.expand(len(cut), *vision.shape[1:]))

        return answer


def freeze(classifier: DefendedClassifier, names: tuple[str, ...]) -> Frozen:
    """Labels as the bundle's prompts read them. A step through the text tower would cost more than
    all views, with 200 labels.

    Raises:
        ValueError: the classifier has no bundle of design v or vli with statistics.
    """
    bundle = classifier.bundle
    if bundle is None or bundle.statistics is None or bundle.prompts.design == "vlj":
        raise ValueError("needs a bundle of design v or vli, with statistics")
    return Frozen(
        classifier.checkpoint.clip,
        classifier.checkpoint.preprocessing,
        classifier.encoder.encode(names, None, "learned").features,
        bundle.statistics,
        max(0, bundle.layers - 1),
    )
