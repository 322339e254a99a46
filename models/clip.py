"""CLIP with prompt slots.

`PromptedCLIP` computes the blocks of a `transformers` `CLIPModel` from their weights, because the
layers' signatures and outputs change between releases and do not support deep prompts. It returns
every feature explicitly and keeps no state between calls. Work is done in chunks, and
`PromptedCLIP.interruptible` can stop it between them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from models.blocks import GRAPH, KeysValues, run_block
from models.device import upload
from models.labels import MASKED, LabelBatch

# Tokens in one chunk of views without a gradient, or of label rows. Bounds the memory. On a CPU, a
# chunk's activations also fit its caches; a GPU would wait for the kernels of small chunks.
CPU_CHUNK_TOKENS = 1024
GPU_CHUNK_TOKENS_PER_GIB = 1024  # of the device's memory
GPU_GRAPH_SHARE = 1 / 6  # of this memory, at most, for the text tower's activations of a chunk


class Interrupted(Exception):
    """The computation was stopped between two chunks; see `PromptedCLIP.interruptible`."""


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """Attributes:
    features: [B, V, D] of unit length, fp32.
    projected: the same before normalization.
    inputs: per collected layer, the block's input [B, V, tokens, width] with its prompts.
    """

    features: Tensor
    projected: Tensor
    inputs: list[Tensor]


class PromptedCLIP:
    """A frozen `CLIPModel` that takes pixels in [0, 1] and prompts as arguments.

    `mean` and `std` are the checkpoint's channel normalization. The model computes in its own
    dtype; prompts and features stay in fp32.
    """

    def __init__(self, model: CLIPModel, mean: Sequence[float], std: Sequence[float]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.device = model.device
        # The scale may be wider.
        self.dtype: torch.dtype = model.visual_projection.weight.dtype
        self.chunk_tokens = CPU_CHUNK_TOKENS
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
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
            self.chunk_tokens = gpu_chunk_tokens(memory, self.text_graph_bytes)
            # cuDNN's attention makes and keeps a plan for every new shape, and batches and label
            # sets keep changing shape. The other kernels need no plans.
            torch.backends.cuda.enable_cudnn_sdp(False)
            # TF32 convolutions would round float32 to ten bits.
            torch.backends.cudnn.allow_tf32 = False
        self._stop: Callable[[], bool] | None = None

    def convert(self, dtype: torch.dtype) -> None:
        """Compute in another dtype from now on."""
        scale = self.model.logit_scale.detach().clone()
        self.model.to(dtype)
        # Rounding this exponent would change every logit by about 1%.
        self.model.logit_scale = torch.nn.Parameter(scale, requires_grad=False)
        self.dtype = dtype

    @contextmanager
    def interruptible(self, stop: Callable[[], bool]) -> Iterator[None]:
        """Call `stop` before every chunk that is computed in this context.

        Contexts may be nested; the innermost counts. Results do not change.

        Raises:
            Interrupted: in the computation, as soon as `stop` returns true.
        """
        outer, self._stop = self._stop, stop
        try:
            yield
        finally:
            self._stop = outer

    def _interrupt(self) -> None:
        if self._stop is not None and self._stop():
            raise Interrupted

    @property
    def image_graph_bytes(self) -> int:
        """What an image token's activations take in all layers until the backward pass."""
        return self.vision_layers * GRAPH * self.vision_width * self.dtype.itemsize

    @property
    def text_graph_bytes(self) -> int:
        """What a text token's activations take in all layers until the backward pass."""
        return self.text_layers * GRAPH * self.text_width * self.dtype.itemsize

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
        flat = pixels.flatten(0, 1)
        prompts = None if visual is None else visual.repeat_interleave(views, dim=0)
        size = len(flat)
        if not collect and not torch.is_grad_enabled():
            size = max(1, self.chunk_tokens // (1 + self.patches))
        parts = [
            self._encode_views(
                flat[start : start + size],
                None if prompts is None else prompts[start : start + size],
                collect,
            )
            for start in range(0, len(flat), size)
        ]
        projected = torch.cat([part for part, _ in parts]).unflatten(0, (batch, views))
        inputs = [hidden.unflatten(0, (batch, views)) for hidden in parts[0][1]]
        return ImageFeatures(_normalize(projected), projected, inputs)

    def _encode_views(
        self, pixels: Tensor, prompts: Tensor | None, collect: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Projected features [N, D] in fp32 of pixels [N, 3, S, S] with prompts [N, ...], and the
        inputs of the first `collect` blocks."""
        self._interrupt()
        vision = self.model.vision_model
        normal = ((pixels - self._mean) / self._std).to(self.dtype)
        patches = _embed_patches(normal, vision.embeddings.patch_embedding.weight)
        cls = vision.embeddings.class_embedding.to(self.dtype).expand(len(normal), 1, -1)
        hidden = torch.cat([cls, patches], dim=1) + vision.embeddings.position_embedding.weight
        if prompts is not None:
            prompts = prompts.to(self.dtype)
            hidden = torch.cat([hidden, prompts[:, 0]], dim=1)
        hidden = vision.pre_layrnorm(hidden)
        inputs: list[Tensor] = []
        first = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        for index, block in enumerate(vision.encoder.layers):
            if prompts is not None and 0 < index < prompts.shape[1]:
                hidden[:, -prompts.shape[2] :] = prompts[:, index]
            if index < collect:
                inputs.append(hidden)
            # Only the first token of the last block is read.
            only = first if index == self.vision_layers - 1 else None
            hidden, _ = run_block(block, hidden, only=only)
        pooled = self.model.visual_projection(vision.post_layernorm(hidden[:, 0]))
        return pooled.float(), inputs

    def encode_labels(self, labels: LabelBatch, prompts: Tensor | None = None) -> Tensor:
        """Label features [R, D] of unit length in fp32.

        They have a gradient only to prompts that require one, as those of an attack do. The graph
        then holds all rows, however many; serving takes `text_gradient`.

        Args:
            labels: the rows of B requests, their slots included.
            prompts: [B, depth, slots, width], one set per request, or None for plain text.
        """
        wanted = prompts is not None and prompts.requires_grad
        with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
            features = [self._encode_text(labels, rows, prompts) for rows in self._chunks(labels)]
        return torch.cat(features)

    def text_gradient(self, labels: LabelBatch, prompts: Tensor, gradient: Tensor) -> Tensor:
        """The gradient [B, depth, slots, width] at the prompts, from one at the label features.

        Exact, and in chunks of rows: the text tower's activations of a thousand labels would not
        fit.

        Args:
            gradient: of the loss with respect to the features [R, D] of all rows.
        """
        prompts = prompts.detach().requires_grad_()
        total = torch.zeros_like(prompts)
        for rows in self._chunks(labels):
            features = self._encode_text(labels, rows, prompts)
            total += torch.autograd.grad(features, prompts, gradient[rows])[0]
        return total

    def _encode_text(self, labels: LabelBatch, rows: slice, prompts: Tensor | None) -> Tensor:
        """Features [r, D] of some token rows, with prompts [B, ...], one set per request.

        Layer 0's prompts replace the slots' embeddings before the positions are added; at the
        start of each later prompted layer they replace those hidden states. All rows of a request
        share their first tokens, slots included. Under the causal mask these do not depend on what
        follows, so they are computed once per request.
        """
        self._interrupt()
        text, lead = self.model.text_model, labels.lead
        ids, ends = labels.ids[rows, lead:], labels.ends[rows] - lead
        shares = labels.split(rows)
        counts = [count for _, count in shares]
        firsts = upload([first for first, _ in shares], labels.ids.device)
        owners = labels.owners[firsts]
        embed, places = text.embeddings.token_embedding, text.embeddings.position_embedding.weight
        head, tail = embed(labels.ids[firsts, :lead]), embed(ids)
        depth = 0
        if prompts is not None:
            depth, slots = prompts.shape[1:3]
            if slots >= lead:
                raise ValueError(
                    f"{slots} prompts do not fit where a request's rows share {lead} tokens"
                )
            prompts = prompts[owners].to(self.dtype)
            head = _fill_slots(head, prompts[:, 0])
        head, tail = head + places[:lead], tail + places[lead : lead + ids.shape[1]]
        length = lead + ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        *blocks, last = text.encoder.layers
        for index, block in enumerate(blocks):
            if prompts is not None and 0 < index < depth:
                head = _fill_slots(head, prompts[:, index])
            head, shared = run_block(block, head, causal[:lead, :lead])
            tail, _ = run_block(block, tail, causal[lead:], _spread(shared, counts))
        if prompts is not None and 0 < len(blocks) < depth:
            head = _fill_slots(head, prompts[:, len(blocks)])
        _, shared = run_block(last, head, causal[:lead, :lead])
        seen = causal[lead + ends].view(-1, 1, 1, length)
        pooled, _ = run_block(last, tail, seen, _spread(shared, counts), only=ends)
        return _normalize(self.model.text_projection(text.final_layer_norm(pooled[:, 0])))

    def _chunks(self, labels: LabelBatch) -> list[slice]:
        size = max(1, self.chunk_tokens // (labels.ids.shape[1] - labels.lead))
        return [slice(start, start + size) for start in range(0, len(labels.ids), size)]


def gpu_chunk_tokens(memory: int, text_graph_bytes: int) -> int:
    """Tokens in a chunk on a GPU with `memory` bytes.

    Args:
        text_graph_bytes: see `PromptedCLIP`; a large text tower gets smaller chunks.
    """
    tokens = GPU_CHUNK_TOKENS_PER_GIB * max(1, memory // 2**30)
    return max(1, min(tokens, int(GPU_GRAPH_SHARE * memory) // text_graph_bytes))


def _embed_patches(pixels: Tensor, weight: Tensor) -> Tensor:
    """The patches of pixels [N, 3, S, S] as [N, patches, width].

    A matrix product instead of CLIP's convolution, which is slow in bfloat16 on a CPU.

    Args:
        weight: [width, 3, P, P] of the convolution, whose stride is P and which has no bias.
    """
    side = weight.shape[-1]
    whole = pixels.shape[-1] // side * side  # a convolution ignores what is no whole patch
    pixels = pixels[..., :whole, :whole]
    grid = pixels.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))  # [N, 3, row, y, column, x]
    patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return F.linear(patches, weight.flatten(1))


def _fill_slots(hidden: Tensor, prompt: Tensor) -> Tensor:
    return torch.cat([hidden[:, :1], prompt, hidden[:, 1 + prompt.shape[1] :]], dim=1)


def _spread(shared: KeysValues, counts: Sequence[int]) -> KeysValues:
    """Keys and values of requests, [B, ...], as those of their rows, [R, ...]."""
    if len(set(counts)) == 1:  # one kernel, however many requests
        key, value = (part.repeat_interleave(counts[0], dim=0) for part in shared)
        return key, value
    key, value = (
        torch.cat([one.expand(n, -1, -1, -1) for one, n in zip(part.split(1), counts, strict=True)])
        for part in shared
    )
    return key, value


def _normalize(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)
