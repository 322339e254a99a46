"""The backward pass from a loss to a request's prompts.

The part through the text tower runs in chunks of labels, which is exact: first from the loss to the
label features, then from them to the text prompts. The activations of a thousand labels would not
fit into memory.
"""

import torch
from torch import Tensor

from models.clip import PromptedCLIP
from models.labels import LabelBatch
from models.prompts import DefensePrompts


def make_leaves(
    prompts: DefensePrompts, text: Tensor, moving: frozenset[str]
) -> tuple[DefensePrompts, Tensor]:
    """Prompts and label features [R, D] as leaves of a new graph.

    Of the prompts, those named in `moving` require a gradient. The features do if the text prompts
    are among them.
    """
    tensors = {k: v.detach().requires_grad_(k in moving) for k, v in prompts.tensors.items()}
    features = text.detach().requires_grad_("text" in moving & tensors.keys())
    return prompts.map(tensors), features


@torch.enable_grad()
def differentiate(
    clip: PromptedCLIP, labels: LabelBatch, prompts: DefensePrompts, text: Tensor, loss: Tensor
) -> dict[str, Tensor]:
    """The gradient of a scalar loss at each prompt, by name. Prompts that it does not reach are
    absent.

    Args:
        prompts, text: the leaves, as returned by `make_leaves`, that the loss was computed from.
    """
    if not loss.requires_grad:
        return {}
    leaves = {k: v for k, v in prompts.tensors.items() if v.requires_grad}
    inputs = [*leaves.values(), *([text] if text.requires_grad else [])]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    reached = {k: g for k, g in zip(leaves, found, strict=False) if g is not None}
    text_gradient = found[-1] if text.requires_grad else None
    if prompts.text is not None and text_gradient is not None:
        through_text = clip.text_gradient(labels, prompts.text, text_gradient)
        reached["text"] = reached["text"] + through_text if "text" in reached else through_text
    return reached
