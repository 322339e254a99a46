"""An attack to be watched: projected gradient descent on one image, which yields every step."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.attacks.adaptive import surrogates
from models.attacks.attack import LEVELS, Model, cross_entropy, draw_start, quantize
from models.attacks.pgd import REACH, take_steps
from models.attacks.threats import transfer
from models.classifier import DefendedClassifier, ImageQuery
from models.views import make_views


def run_demo_attack(
    classifier: DefendedClassifier,
    query: ImageQuery,
    method: str,
    views: int,
    *,
    epsilon: int,
    attack_steps: int,
    target: int | None,
    adaptive: bool,
) -> Iterator[NDArray[np.uint8]]:
    """Yield the image as the model sees it, uint8 [S, S, 3], and then after each step of an attack.

    Args:
        query, method, views: the defended request.
        epsilon: largest change of a channel, in levels of 255.
        attack_steps: steps of projected gradient descent.
        target: index of the label to aim at; None aims away from the current answer.
        adaptive: whether the attacker knows the defense. If so, gradients pass through its views
            and its readout and hold the adapted prompts constant (BPDA), and the attacker draws
            views of his own. Otherwise he knows undefended CLIP only: the threat `transfer`.
    """
    checkpoint, labels, template = classifier.checkpoint, query.labels, query.template
    device, seed = checkpoint.clip.device, query.seed + 1
    whole = make_views(query.image, 1, 0, checkpoint.preprocessing, device, query.view)
    yield _levels(whole)[0]
    shown = classifier.without_resize()
    model: Model = transfer(shown, labels, template)
    if adaptive:
        steps, readout = query.steps, query.readout
        ways = surrogates(shown, labels, method, views, steps, readout, [seed], template)
        model = next(iter(ways.values()))
    with torch.no_grad():
        named = model(whole).argmax(dim=1)
    wanted = named if target is None else torch.tensor([target], device=device)
    sign = 1 if target is None else -1

    def loss(pixels: Tensor) -> Tensor:
        return sign * cross_entropy(model(pixels), wanted).sum()

    reach = epsilon / LEVELS
    start = draw_start(whole, reach, [seed], 0)
    for pixels in take_steps(whole, loss, reach, attack_steps, REACH * reach / attack_steps, start):
        yield _levels(quantize(pixels, whole, reach))[0]


def redraw(classifier: DefendedClassifier, query: ImageQuery, views: int) -> NDArray[np.uint8]:
    """The views of a query, uint8 [views, S, S, 3]."""
    preprocessing, device = classifier.checkpoint.preprocessing, classifier.checkpoint.clip.device
    return _levels(make_views(query.image, views, query.seed, preprocessing, device, query.view))


def _levels(pixels: Tensor) -> NDArray[np.uint8]:
    """Pixels [N, 3, S, S] in [0, 1] as uint8 [N, S, S, 3]."""
    levels = (pixels * LEVELS).round().byte().permute(0, 2, 3, 1)
    return levels.contiguous().cpu().numpy()
