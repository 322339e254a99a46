"""CLIP with prompt slots.

`PromptedCLIP` walks the blocks of a `transformers` `CLIPModel` through their weights, because the
layers' signatures and outputs change between releases and have no place for deep prompts. It
returns every feature explicitly and keeps no state between calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from models.labels import MASKED, LabelBatch

TEXT_TOKENS = 8192  # in one chunk of label rows: what bounds the memory of the text tower


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """`features` [B, V, D] of unit length and `projected`, the same at their own length, in fp32;
    `inputs`: per collected layer, the block's input with its prompts in place, [B, V, tokens,
    width]."""

    features: Tensor
    projected: Tensor
    inputs: list[Tensor]


class PromptedCLIP:
    """A frozen `CLIPModel` that takes pixels in [0, 1] and prompts as arguments.

    `mean` and `std` are the checkpoint's channel normalization. Compute runs in the model's dtype,
    prompts and features stay in fp32.
    """

    def __init__(self, model: CLIPModel, mean: Sequence[float], std: Sequence[float]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.device = model.device
        self.dtype = model.dtype
        config = model.config
        self.image_size: int = config.vision_config.image_size
        self.vision_width: int = config.vision_config.hidden_size
        self.vision_layers: int = config.vision_config.num_hidden_layers
        self.text_width: int = config.text_config.hidden_size
        self.text_layers: int = config.text_config.num_hidden_layers
        self.context_length: int = config.text_config.max_position_embeddings
        self.patches: int = (self.image_size // config.vision_config.patch_size) ** 2
        self._mean = torch.tensor(mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(std, device=self.device).view(3, 1, 1)

    @property
    def logit_scale(self) -> Tensor:
        scale: Tensor = self.model.logit_scale
        return scale.float().exp()

    def class_logits(self, images: Tensor, text: Tensor, labels: LabelBatch) -> Tensor:
        """Scaled cosine logits [B, V, C] of views [B, V, D] against label rows [R, D]."""
        logits = self.logit_scale * images @ labels.pad(text).transpose(1, 2)
        return logits.masked_fill(~labels.mask.unsqueeze(1), MASKED)

    def encode_images(
        self, pixels: Tensor, visual: Tensor | None = None, collect: int = 0
    ) -> ImageFeatures:
        """Encode views with visual prompts.

        Layer 0's prompts are appended behind the patches; at the start of each later prompted
        layer they replace those last tokens.

        Args:
            pixels: [B, V, 3, S, S] in [0, 1].
            visual: [B, depth, tokens, width] or None.
            collect: return the inputs of the first `collect` blocks.
        """
        batch, views = pixels.shape[:2]
        vision = self.model.vision_model
        flat = ((pixels - self._mean) / self._std).flatten(0, 1).to(self.dtype)
        patches = vision.embeddings.patch_embedding(flat).flatten(2).transpose(1, 2)
        cls = vision.embeddings.class_embedding.to(self.dtype).expand(len(flat), 1, -1)
        hidden = torch.cat([cls, patches], dim=1) + vision.embeddings.position_embedding.weight
        prompts = None
        if visual is not None:
            prompts = visual.to(self.dtype).repeat_interleave(views, dim=0)
            hidden = torch.cat([hidden, prompts[:, 0]], dim=1)
        hidden = vision.pre_layrnorm(hidden)
        inputs: list[Tensor] = []
        for index, block in enumerate(vision.encoder.layers):
            if prompts is not None and 0 < index < prompts.shape[1]:
                hidden = torch.cat([hidden[:, : -prompts.shape[2]], prompts[:, index]], dim=1)
            if index < collect:
                inputs.append(hidden.unflatten(0, (batch, views)))
            hidden = _run_block(block, hidden, causal=False)
        pooled = self.model.visual_projection(vision.post_layernorm(hidden[:, 0]))
        projected = pooled.float().unflatten(0, (batch, views))
        return ImageFeatures(_normalize(projected), projected, inputs)

    def encode_labels(
        self, labels: LabelBatch, prompts: Tensor | None = None, graph: bool = False
    ) -> Tensor:
        """Label features [R, D] of unit length in fp32, without gradient unless `graph` asks.

        Args:
            labels: the rows of B requests, their slots included.
            prompts: [B, depth, slots, width], one set a request, or None for plain text.
            graph: keep the graph of all rows, however large, for attacks; serving does not.
        """
        owners = labels.owners
        with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
            features = [
                self._encode_text(
                    labels.ids[rows],
                    labels.ends[rows],
                    None if prompts is None else prompts[owners[rows]],
                )
                for rows in self._chunks(labels)
            ]
        return torch.cat(features)

    def text_gradient(self, labels: LabelBatch, prompts: Tensor, pull: Tensor) -> Tensor:
        """The gradient [B, depth, slots, width] that `pull` [R, D], a gradient with respect to
        the label features, has at the prompts. Exact, and in chunks of rows: the text tower's
        activations of a thousand labels would not fit.
        """
        prompts, owners = prompts.detach().requires_grad_(), labels.owners
        total = torch.zeros_like(prompts)
        for rows in self._chunks(labels):
            features = self._encode_text(labels.ids[rows], labels.ends[rows], prompts[owners[rows]])
            total += torch.autograd.grad(features, prompts, pull[rows])[0]
        return total

    def _encode_text(self, ids: Tensor, ends: Tensor, prompts: Tensor | None) -> Tensor:
        """Features [R, D] of token rows [R, T] pooled at `ends`, prompts [R, ...] a set a row.

        Layer 0's prompts stand in for the slots' embeddings before the positions are added; at
        the start of each later prompted layer they replace those hidden states.
        """
        text = self.model.text_model
        hidden = text.embeddings.token_embedding(ids)
        if prompts is not None:
            prompts = prompts.to(self.dtype)
            hidden = _fill_slots(hidden, prompts[:, 0])
        hidden = hidden + text.embeddings.position_embedding.weight[: hidden.shape[1]]
        for index, block in enumerate(text.encoder.layers):
            if prompts is not None and 0 < index < prompts.shape[1]:
                hidden = _fill_slots(hidden, prompts[:, index])
            hidden = _run_block(block, hidden, causal=True)
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), ends]
        return _normalize(self.model.text_projection(text.final_layer_norm(pooled)))

    def _chunks(self, labels: LabelBatch) -> list[slice]:
        size = max(1, TEXT_TOKENS // labels.ids.shape[1])
        return [slice(start, start + size) for start in range(0, len(labels.ids), size)]


def _fill_slots(hidden: Tensor, prompt: Tensor) -> Tensor:
    return torch.cat([hidden[:, :1], prompt, hidden[:, 1 + prompt.shape[1] :]], dim=1)


def _run_block(block: Any, hidden: Tensor, causal: bool) -> Tensor:
    """One pre-norm transformer block of `transformers`' CLIP, [N, T, W] to [N, T, W]."""
    attention = block.self_attn
    normed = block.layer_norm1(hidden)
    query, key, value = (
        projection(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    changed: Tensor = hidden + block.mlp(block.layer_norm2(hidden))
    return changed


def _normalize(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)
