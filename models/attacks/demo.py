"""An attack to be watched: projected gradient descent on one picture, a picture a step."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.attacks.adaptive import surrogates
from models.attacks.attack import LEVELS, Model, cross_entropy, draw_start, quantize
from models.attacks.pgd import REACH, stride
from models.attacks.threats import transfer
from models.classifier import DefendedClassifier, Picture
from models.evaluation.trial import without_resize
from models.views import make_views


def run_demo_attack(
    guard: DefendedClassifier,
    picture: Picture,
    method: str,
    views: int,
    steps: int,
    *,
    epsilon: int,
    strides: int,
    target: int | None,
    adaptive: bool,
) -> Iterator[NDArray[np.uint8]]:
    """Yield the picture as the model sees it, uint8 [S, S, 3], and then after each of `strides`
    steps of an attack on it, at most `epsilon` levels of 255 away.

    Args:
        method, views, steps: the defense's, with the picture's readout.
        target: the label to be named; None is away from what is named now.
        adaptive: whether the attacker knows the defense: his gradients then go through its views
            and its readout and hold the prompts that it adapts at that step (BPDA). He draws views
            of his own. Otherwise he knows undefended CLIP only, which is the threat `transfer`.
    """
    device = guard.checkpoint.clip.device
    whole = make_views(picture.image, 1, 0, guard.checkpoint.preprocessing, device)
    yield _levels(whole)[0]
    shown = _in_template(without_resize(guard), picture.template)
    names, readout, seed = picture.labels, picture.readout, picture.seed + 1
    model: Model = transfer(shown, names)
    if adaptive:
        model = next(iter(surrogates(shown, names, method, views, steps, readout, seed).values()))
    with torch.no_grad():
        named = model(whole).argmax(dim=1)
    wanted = named if target is None else torch.tensor([target], device=device)
    sign = 1 if target is None else -1

    def loss(pixels: Tensor) -> Tensor:
        return sign * cross_entropy(model(pixels), wanted).sum()

    reach = epsilon / LEVELS
    start = draw_start(whole, reach, [seed], 0)
    for pixels in stride(whole, loss, reach, strides, REACH * reach / strides, start):
        yield _levels(quantize(pixels, whole, reach))[0]


def redraw(
    guard: DefendedClassifier, image: NDArray[np.uint8], views: int, seed: int
) -> NDArray[np.uint8]:
    """The views [views, S, S, 3] that a seed drew of an image."""
    clip, preprocessing = guard.checkpoint.clip, guard.checkpoint.preprocessing
    return _levels(make_views(image, views, seed, preprocessing, clip.device))


def _in_template(guard: DefendedClassifier, template: str | None) -> DefendedClassifier:
    """The guard with every label read in this template."""
    if template is None:
        return guard
    bundle = None if guard.bundle is None else replace(guard.bundle, template=template)
    return DefendedClassifier(
        guard.checkpoint, bundle, guard.objective, guard.selection_ratio, template
    )


def _levels(pixels: Tensor) -> NDArray[np.uint8]:
    """Pictures [N, 3, S, S] in [0, 1] as uint8 [N, S, S, 3]."""
    levels = (pixels * LEVELS).round().byte().permute(0, 2, 3, 1)
    return levels.contiguous().cpu().numpy()
