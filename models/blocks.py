"""One transformer block of `transformers`' CLIP, computed from its weights.

The block's own `forward` changes between releases. It does not support keys and values that several
rows share, or computing the output of one token alone.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.activations import QuickGELUActivation

QUICK = 1.702  # the constant in CLIP's activation

GRAPH = 14
"""Values that a block keeps per token until its backward pass, in widths."""

KeysValues = tuple[Tensor, Tensor]
"""Keys and values, [N, heads, tokens, head width] each."""


def run_block(
    block: Any,
    hidden: Tensor,
    mask: Tensor | None = None,
    lead: KeysValues | None = None,
    only: Tensor | None = None,
) -> tuple[Tensor, KeysValues]:
    """A pre-norm block: hidden states [N, T, W], and the keys and values of their tokens.

    Args:
        mask: true where a token attends to a key, broadcast to [N, heads, T, lead + T]; None: to
            all.
        lead: keys and values of tokens in front, which do not attend to these.
        only: [N], the one token of each row to compute, for hidden states [N, 1, W].
    """
    attention, normed = block.self_attn, block.layer_norm1(hidden)

    def project(linear: Any, tokens: Tensor) -> Tensor:
        split: Tensor = linear(tokens).unflatten(-1, (attention.num_heads, -1))
        return split.transpose(1, 2)

    own = project(attention.k_proj, normed), project(attention.v_proj, normed)
    key, value = own
    if lead is not None:
        key, value = torch.cat([lead[0], key], dim=2), torch.cat([lead[1], value], dim=2)
    if only is not None:
        rows = torch.arange(len(hidden), device=hidden.device)
        hidden, normed = hidden[rows, only].unsqueeze(1), normed[rows, only].unsqueeze(1)
    query = project(attention.q_proj, normed)
    mixed = _attend(query, key, value, mask)
    hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + _feed_forward(block.mlp, block.layer_norm2(hidden)), own


def _feed_forward(mlp: Any, tokens: Tensor) -> Tensor:
    """A block's two layers, [N, T, W] to [N, T, W].

    CLIP's usual activation, x sigmoid(1.702 x), is silu(1.702 x) / 1.702. Folding the factors into
    the matrix products leaves one of three passes over the widest activations, and half as many
    of them to keep for the backward pass.
    """
    result: Tensor
    if not isinstance(mlp.activation_fn, QuickGELUActivation):
        result = mlp(tokens)
        return result
    first, second = mlp.fc1, mlp.fc2
    wide = torch.addmm(QUICK * first.bias, tokens.flatten(0, 1), first.weight.T, alpha=QUICK)
    result = torch.addmm(second.bias, F.silu(wide), second.weight.T, alpha=1 / QUICK)
    return result.view(tokens.shape)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    # On a CPU the fused kernel's backward pass is slow for short rows, and very slow in bf16.
    plain = torch.is_grad_enabled() and query.device.type == "cpu"
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
