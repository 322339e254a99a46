"""Token moments: mean and variance of a prompted CLIP's hidden tokens over images."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from models.clip import PromptedCLIP
from models.prompts import DefensePrompts


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Means and variances over images of each layer's block input, [layers, tokens, width].

    They belong to the prompts they were taken with: these are among the tokens, and the values of
    the others depend on them.
    """

    clean_mean: Tensor
    clean_var: Tensor
    adv_mean: Tensor
    adv_var: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device) -> "TokenStatistics":
        return TokenStatistics(**{k: v.to(device) for k, v in self.tensors().items()})


def token_moments(
    clip: PromptedCLIP, batches: Iterable[Tensor], prompts: DefensePrompts | None
) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance over images of every block's input, [layers, tokens, width].

    Args:
        batches: pixels [N, 3, S, S] in [0, 1], resized and cropped like view 0.
        prompts: the prompts in place, a single set [1, ...].

    Raises:
        ValueError: there is no image.
    """
    count, total, squares = 0, None, None
    for pixels in batches:
        visual = None if prompts is None else prompts.vision
        with torch.no_grad():
            images = clip.encode_images(pixels.unsqueeze(0), visual, clip.vision_layers)
        hidden = torch.stack([layer[0] for layer in images.inputs]).double()
        count += len(pixels)
        total = hidden.sum(dim=1) if total is None else total + hidden.sum(dim=1)
        square = hidden.square().sum(dim=1)
        squares = square if squares is None else squares + square
    if total is None or squares is None:
        raise ValueError("token statistics need at least one image")
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).float()
