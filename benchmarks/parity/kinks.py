"""Where the alignment has no gradient: prompt tokens that are their own reference.

A prompt token is the same in all views and in the reference statistics. In designs V and VLI the
two are equal bit for bit, so the gradient of their distance is 0. In VLJ a matrix product makes the
token. The two then differ by rounding, which depends on the processor, and the gradient of each
value's absolute difference is plus or minus one term. What the published code found on another
machine is therefore ours plus some change of the visual prompts' gradient. The change reaches the
text prompts and the projection by the chain rule, so it can be found from one of them and must
explain all.
"""

import torch
from torch import Tensor

from benchmarks.parity.figures import Figures
from models.prompts import DefensePrompts
from models.tapt import Objective

ROUNDING = 1e-6  # of the visual prompts, whose values are about 1
TERMS = 2  # plus one instead of minus one
FIRST_GAIN = 12.0  # at most, of the layer norm before the first block at the figures' prompts


def settle(
    figures: Figures, prompts: DefensePrompts, found: dict[str, Tensor], objective: Objective
) -> dict[str, Tensor]:
    """Our gradients `found` [1, ...] in VLJ, with the published signs at undetermined values.

    No value moves by more than two terms, and behind the first block none whose token is not within
    rounding of its reference. What is left of the difference is ours to answer for.
    """
    reference = objective.reference
    if prompts.design != "vlj" or reference is None or prompts.vision is None:
        return found
    text = prompts.tensors["text"][0].double()  # [depth, tokens, text width]
    weight = prompts.tensors["projection.weight"][0].double()  # [depth, vision width, text width]
    name = "projection.weight"
    gap = figures.expected[f"grad_last_step.{name}"].double() - found[name][0].double()
    change = torch.linalg.lstsq(text.mT, gap.mT).solution  # [depth, tokens, vision width]
    tokens = change.shape[1]
    scale = objective.alignment_weight / max(1, objective.layers)
    term = scale * 0.5 / reference.clean_mean[0].numel()
    for layer, moved in enumerate(change):
        own = prompts.vision[0, layer]
        targets = (reference.adv_mean[layer, -tokens:], reference.clean_mean[layer, -tokens:])
        near = torch.stack([(own - target).abs() < ROUNDING for target in targets]).any(dim=0)
        if layer == 0:  # its reference is behind a layer norm
            near, reach = torch.ones_like(near), TERMS * term * FIRST_GAIN
        else:
            reach = TERMS * term * (1 + 1e-3)
        moved.clamp_(-reach, reach).mul_(near)
    by_name = {
        "projection.weight": change.mT @ text,
        "projection.bias": change.sum(dim=1),
        "text": change @ weight,
    }
    return {key: value + by_name[key][None].to(value.dtype) for key, value in found.items()}
