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
from models.clip import PromptedCLIP
from models.prompts import DefensePrompts
from models.tapt import Objective

ROUNDING = 1e-6  # of tokens, whose values are about 1
TERMS = 2  # plus one instead of minus one


def settle(
    figures: Figures,
    clip: PromptedCLIP,
    prompts: DefensePrompts,
    found: dict[str, Tensor],
    objective: Objective,
) -> dict[str, Tensor]:
    """Our gradients `found` [1, ...] in VLJ, with the published signs at undetermined values.

    No value of a visual prompt is changed by more than the terms of the tokens that it makes and
    that are within rounding of their reference. What is left of the difference is ours to answer
    for.
    """
    reference = objective.reference
    if prompts.design != "vlj" or reference is None or prompts.vision is None:
        return found
    text = prompts.tensors["text"][0].double()  # [depth, tokens, text width]
    weight = prompts.tensors["projection.weight"][0].double()  # [depth, vision width, text width]
    name = "projection.weight"
    gap = figures.expected[f"grad_last_step.{name}"].double() - found[name][0].double()
    change = torch.linalg.lstsq(text.mT, gap.mT).solution  # [depth, tokens, vision width]
    scale = objective.alignment_weight / max(1, objective.layers)
    term = scale * 0.5 / reference.clean_mean[0].numel()
    # The first block reads its tokens behind a layer norm. The sum runs over `layers` - 1 blocks.
    makers = [clip.model.vision_model.pre_layrnorm, *[torch.nn.Identity()] * (len(change) - 1)]
    aligned = max(0, objective.layers - 1)
    change[aligned:] = 0
    for layer, make in enumerate(makers[:aligned]):
        for token, prompt in enumerate(prompts.vision[0, layer]):
            place = token - change.shape[1]  # prompts are the last tokens
            targets = (reference.adv_mean[layer, place], reference.clean_mean[layer, place])
            near = sum((make(prompt) - target).abs() < ROUNDING for target in targets) > 0
            slopes = torch.autograd.functional.jacobian(make, prompt).abs()  # [made, prompt]
            reach = TERMS * term * slopes[near].sum(dim=0).double() * (1 + 1e-3)
            change[layer, token] = change[layer, token].clamp(-reach, reach)
    by_name = {
        "projection.weight": change.mT @ text,
        "projection.bias": change.sum(dim=1),
        "text": change @ weight,
    }
    return {key: value + by_name[key][None].to(value.dtype) for key, value in found.items()}
