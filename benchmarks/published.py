"""TAPT in the shape it was published in, written a second time as plainly as it goes.

One image at a time, gradients through all views, the labels' whole context, a prompt a parameter,
torch's own optimizer. It shares no code with `models.tapt`: the tests hold the two against each
other on any model, and speed is measured against this.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Prompts = dict[str, list[nn.Parameter]]


@dataclass(frozen=True)
class Trace:
    """What one adaptation went through, as the reference figures name it."""

    selected: Tensor
    logits_initial: Tensor
    entropy: list[Tensor]
    align_adv: list[Tensor]
    align_clean: list[Tensor]
    logits_adapted_views: Tensor


def adapt(
    model: Any,
    views: Tensor,
    ids: Tensor,
    prompts: Prompts,
    statistics: dict[str, Tensor],
    steps: int = 1,
    gamma: float = 0.5,
    weight: float = 100.0,
    rate: float = 5e-4,
    ratio: float = 0.1,
    look: slice = slice(None),
    rows: int | None = None,
) -> Trace:
    """Adapt the prompts in place.

    Args:
        model: a transformers `CLIPModel`.
        views: normalized pixels [V, 3, S, S].
        ids: [C, context], two words behind the start token to be replaced, padding included.
        prompts: by name, a parameter a layer: `vision`, `text`, `projection.weight`, `.bias`.
        statistics: `{clean,adv}_{mean,var}`, [layers, tokens, width].
        look: the views that are read at the end; published is the first alone.
        rows: labels whose graph is held at once, None for all as published. What does not fit is
            passed forward once without a graph, then in chunks forward and backward.
    """
    depth = max(map(len, prompts.values()))
    optimizer = torch.optim.AdamW([p for layer in prompts.values() for p in layer], lr=rate)
    selected = first = torch.empty(0)
    terms: dict[str, list[Tensor]] = {"entropy": [], "adv": [], "clean": []}
    for step in range(steps):
        visual, text = _prompts(prompts)
        images, inputs = see(model, views, visual)
        chunks: list[Tensor] = []
        if rows is None or text is None:
            labels = read(model, ids, text)
        else:
            chunks = list(ids.split(rows))
            labels = skim(model, chunks, text)
        logits = model.logit_scale.exp() * images @ labels.T
        if step == 0:
            first = logits.detach()
            entropy = -(first.softmax(1) * first.log_softmax(1)).sum(1)
            selected = entropy.argsort()[: int(len(views) * ratio)]
        kept = logits[selected].log_softmax(dim=1)
        mean = kept.logsumexp(dim=0) - math.log(len(kept))
        loss = entropy = -(mean * mean.exp()).sum()
        for kind, share in (("adv", gamma), ("clean", 1 - gamma)):
            distance = torch.zeros((), device=views.device)
            for layer in range(depth - 1):
                hidden = inputs[layer][selected]
                moments = {"mean": hidden.mean(0), "var": hidden.var(0, unbiased=False)}
                for name, moment in moments.items():
                    target = statistics[f"{kind}_{name}"][layer]
                    distance = distance + 0.5 * F.l1_loss(moment, target)
            terms[kind].append(distance.detach())
            loss = loss + weight / depth * share * distance
        terms["entropy"].append(entropy.detach())
        optimizer.zero_grad()
        loss.backward()
        if chunks:
            assert labels.grad is not None
            for chunk, pull in zip(chunks, labels.grad.split(rows), strict=True):
                read(model, chunk, text).backward(pull)
        optimizer.step()
    with torch.no_grad():
        visual, text = _prompts(prompts)
        images, labels = see(model, views[look], visual)[0], read(model, ids, text)
        last = model.logit_scale.exp() * images @ labels.T
    return Trace(selected, first, terms["entropy"], terms["adv"], terms["clean"], last)


def _prompts(prompts: Prompts) -> tuple[list[Tensor], list[nn.Parameter] | None]:
    """Visual prompts and text prompts, a layer each."""
    text = prompts.get("text")
    if "projection.weight" not in prompts:
        return list(prompts["vision"]), text
    assert text is not None
    maps = zip(text, prompts["projection.weight"], prompts["projection.bias"], strict=True)
    return [F.linear(prompt, weight, bias) for prompt, weight, bias in maps], text


def see(model: Any, views: Tensor, prompts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Unit features [V, D] and each block's input [V, tokens, width]."""
    vision, count, tokens = model.vision_model, len(views), prompts[0].shape[0]
    patches = vision.embeddings.patch_embedding(views).flatten(2).transpose(1, 2)
    hidden = torch.cat([vision.embeddings.class_embedding.expand(count, 1, -1), patches], dim=1)
    hidden = hidden + vision.embeddings.position_embedding.weight
    hidden = torch.cat([hidden, prompts[0].expand(count, -1, -1)], dim=1)
    hidden, inputs = vision.pre_layrnorm(hidden), []
    for layer, block in enumerate(vision.encoder.layers):
        if 0 < layer < len(prompts):
            hidden = torch.cat([hidden[:, :-tokens], prompts[layer].expand(count, -1, -1)], dim=1)
        inputs.append(hidden)
        hidden = _block(block, hidden, None)
    features = model.visual_projection(vision.post_layernorm(hidden[:, 0]))
    return features / features.norm(dim=-1, keepdim=True), inputs


def skim(model: Any, chunks: list[Tensor], prompts: list[nn.Parameter]) -> Tensor:
    """The labels' features as a leaf of their own: the pass that cutting into chunks adds."""
    with torch.no_grad():
        features = torch.cat([read(model, chunk, prompts) for chunk in chunks])
    return features.requires_grad_()


def read(model: Any, ids: Tensor, prompts: list[nn.Parameter] | None) -> Tensor:
    """Unit features [C, D] of token rows."""
    text, (count, length) = model.text_model, ids.shape
    hidden = text.embeddings.token_embedding(ids)
    mask = torch.full((length, length), -math.inf, device=ids.device, dtype=hidden.dtype).triu(1)
    for layer, block in enumerate(text.encoder.layers):
        if prompts is not None and layer < len(prompts):
            own = prompts[layer].expand(count, -1, -1)
            hidden = torch.cat([hidden[:, :1], own, hidden[:, 1 + own.shape[1] :]], dim=1)
        if layer == 0:
            hidden = hidden + text.embeddings.position_embedding.weight[:length]
        hidden = _block(block, hidden, mask)
    end = model.config.text_config.eos_token_id
    ends = ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)
    rows = torch.arange(count, device=ids.device)
    hidden = text.final_layer_norm(hidden)[rows, ends]
    features = model.text_projection(hidden)
    unit: Tensor = features / features.norm(dim=-1, keepdim=True)
    return unit


def _block(block: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    attention, normed = block.self_attn, block.layer_norm1(hidden)
    query, key, value = (
        linear(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    out: Tensor = hidden + block.mlp(block.layer_norm2(hidden))
    return out
