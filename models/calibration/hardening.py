"""Adversarial fine-tuning of a CLIP image tower.

Only the image tower and its projection are trained. The text tower and the logit scale stay as
they are, so that text features of the original checkpoint stay valid. There are two losses:

- Unsupervised (FARE, Schlarmann et al., ICML 2024, arXiv 2402.12336, eq. 3): the squared distance
  between the embedding of the attacked image and the original model's embedding of the clean
  image, neither of them normalized. Needs no labels.
- Labelled (after TeCoA, Mao et al., ICLR 2023, arXiv 2212.07016): cross-entropy over the class
  names, plus a penalty for turning away from the original model's clean embedding.

Everything that a step draws follows from the seed and the step number. A resumed run therefore
equals an uninterrupted one, and processes that share a batch agree about it without talking.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.attacks.pgd import ascend
from models.calibration import processes
from models.calibration.crops import cut_crops, draw_crops
from models.clip import ImageFeatures, PromptedCLIP

BETAS, STABILIZER = (0.9, 0.98), 1e-6  # AdamW's, as CLIP was trained
MAX_GRADIENT_NORM = 1.0


def _setting(default: Any, low: float, high: float, text: str) -> Any:
    return field(default=default, metadata={"range": (low, high), "help": text})


@dataclass(frozen=True, slots=True)
class Hardening:
    """Settings of a run. Each field's metadata holds its range and its help text.

    Raises:
        ValueError: a value is out of its range.
    """

    steps: int = _setting(20_000, 1, 10**9, "optimizer steps in all, cool-down included")
    batch: int = _setting(128, 1, 10**6, "pictures in a step, over all processes")
    rate: float = _setting(1e-5, 0, 1, "peak learning rate of AdamW")
    weight_decay: float = _setting(1e-4, 0, 1, "weight decay of AdamW, on matrices only")
    warm_up: int = _setting(200, 0, 10**9, "steps over which the learning rate rises from 0")
    cooldown: float = _setting(
        0.4, 0, 1, "share of the steps, at the end, over which the learning rate falls to 0"
    )
    ema: float = _setting(
        0.995, 0, 0.999999, "decay of the moving average of the weights, which is what is written"
    )
    epsilon: float = _setting(
        2 / 255, 0, 1, "largest change of a pixel in the attack, pixels in [0, 1]: 2/255"
    )
    attack_steps: int = _setting(
        10, 1, 1000, "gradient steps of the attack, from a random start within epsilon"
    )
    step_size: float = _setting(0.5, 0, 10, "size of an attack step, as a multiple of epsilon")
    attacked_share: float = _setting(
        0.75, 0, 1, "share of each batch that is attacked; the rest stays clean"
    )
    clean_weight: float = _setting(
        2.0, 0, 1000, "with labels: weight of 1 - cosine to the original's clean embedding"
    )
    smoothing: float = _setting(0.1, 0, 0.999, "with labels: label smoothing of the cross-entropy")
    crop_area: tuple[float, float] = _setting(
        (0.25, 1.0), 0.01, 1, "smallest and largest share of the image that a random crop covers"
    )
    dtype: str = field(
        default="bfloat16",
        metadata={
            "choices": ("bfloat16", "float32"),
            "help": "dtype of matrix products; weights, losses and optimizer stay in float32",
        },
    )
    seed: int = _setting(0, 0, 2**31 - 1, "seed of the order of images, crops and attack starts")

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            name = option.name.replace("_", "-")
            if choices := option.metadata.get("choices"):
                if value not in choices:
                    raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value}")
                continue
            low, high = option.metadata["range"]
            values = value if isinstance(value, tuple) else (value,)
            if not all(low <= one <= high for one in values):
                hint = "; write 2/255 for two of 255 levels" if name == "epsilon" else ""
                raise ValueError(f"{name} must be from {low} to {high}, not {value}{hint}")
        if self.crop_area[0] > self.crop_area[1]:
            raise ValueError("crop-area must give the smaller share first")

    @property
    def cooldown_start(self) -> int:
        """The first step of the cool-down, counted from 0."""
        return self.steps - int(self.steps * self.cooldown)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step counted from 0: linear warm-up, constant, half a cosine to 0.

        Before the cool-down it does not depend on `steps`, so a run can be extended or ended early
        from any checkpoint before its cool-down (Hägele et al., NeurIPS 2024, arXiv 2405.18392).
        """
        warm = min(1.0, (step + 1) / max(1, self.warm_up))
        done = max(0, step - self.cooldown_start) / max(1, self.steps - self.cooldown_start)
        return self.rate * warm * 0.5 * (1 + math.cos(math.pi * done))


class HardeningTrainer:
    """Fine-tunes a copy of a checkpoint's image tower; `average` holds the weights to keep.

    Where `torch.distributed` is initialized, the processes share each batch and average their
    gradients.

    Args:
        original: the CLIP to start from, which stays unchanged.
        pixels: uint8 images [N, 3, S, S]; a memory-mapped array is fine.
        labels: class indices [N], or None for the unsupervised loss.
        text: unit-length features [C, D] of the class names, or None for the unsupervised loss.

    Raises:
        ValueError: the images do not fill a batch, or processes cannot share it evenly.
    """

    def __init__(
        self,
        original: PromptedCLIP,
        pixels: NDArray[np.uint8],
        labels: Tensor | None,
        text: Tensor | None,
        settings: Hardening,
    ) -> None:
        if (labels is None) != (text is None):
            raise ValueError("labels and features of the class names are needed together")
        if len(pixels) < settings.batch:
            raise ValueError(f"{len(pixels)} images do not fill a batch of {settings.batch}")
        self.rank, self.processes = processes.rank(), processes.count()
        if settings.batch % self.processes:
            raise ValueError(
                f"{self.processes} processes cannot share a batch of {settings.batch} evenly"
            )
        self.original, self.settings = original, settings
        self.pixels, self.labels, self.text = pixels, labels, text
        self.student, self.average = copy.deepcopy(original), copy.deepcopy(original)
        self.parameters = image_parameters(self.student)
        matrices = [p for p in self.parameters.values() if p.ndim > 1]
        vectors = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, settings.rate, BETAS, STABILIZER)
        self.step = 0

    def train_step(self) -> dict[str, float]:
        """Update the weights and their average once; return this process's loss terms."""
        settings = self.settings
        seed = settings.seed * 1_000_003 + self.step
        rows, clean = self._draw_batch(torch.Generator().manual_seed(seed))
        labels = None
        if self.labels is not None:
            labels = self.labels[rows].to(clean.device)
        with torch.no_grad():
            target = self._encode(self.original, clean).projected[0]
        # The order of a batch is random, so its first images are a random share of it.
        count = round(len(clean) * settings.attacked_share)
        seen = clean.clone()
        if count:
            start = torch.Generator().manual_seed(seed * 8191 + self.rank)
            goals = None if labels is None else labels[:count]
            seen[:count] = self.attack(clean[:count], target[:count], goals, start)
        self._require_gradients(True)
        terms = self.losses(seen, target, labels)
        torch.stack(list(terms.values())).sum().backward()
        self._average_gradients()
        nn.utils.clip_grad_norm_(self.parameters.values(), MAX_GRADIENT_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._update_average()
        return {name: float(term.detach()) for name, term in terms.items()}

    def losses(self, pixels: Tensor, target: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Loss terms, to be summed, each a mean over the images.

        Args:
            pixels: [n, 3, S, S] in [0, 1], attacked or clean.
            target: the original's embeddings [n, D] of the clean images, not normalized.
            labels: class indices [n], or None for the unsupervised loss.
        """
        found = self._encode(self.student, pixels)
        if labels is None or self.text is None:
            return {"distance": (found.projected[0] - target).square().sum(dim=-1).mean()}
        features = found.features[0]
        logits = self.student.logit_scale * features @ self.text.T
        cosine = F.cosine_similarity(features, target, dim=-1)
        return {
            "cross_entropy": F.cross_entropy(
                logits, labels, label_smoothing=self.settings.smoothing
            ),
            "distance": self.settings.clean_weight * (1 - cosine).mean(),
        }

    def attack(
        self, clean: Tensor, target: Tensor, labels: Tensor | None, source: torch.Generator
    ) -> Tensor:
        """Pixels [n, 3, S, S] within epsilon of clean ones that raise the training loss (PGD).

        One step of 1.25 epsilon is FGSM from a random start (Wong et al., ICLR 2020,
        arXiv 2001.03994). `target` and `labels` as in `losses`.
        """
        settings = self.settings
        self._require_gradients(False)  # the attack needs none of the weights'

        def loss(pixels: Tensor) -> Tensor:
            terms = self.losses(pixels, target, labels)
            return torch.stack(list(terms.values())).sum()

        stride = settings.step_size * settings.epsilon
        return ascend(clean, loss, settings.epsilon, settings.attack_steps, stride, source)

    def state(self) -> dict[str, Any]:
        """All that a run needs to continue, as tensors and plain values."""
        return {
            "student": {name: p.detach() for name, p in self.parameters.items()},
            "average": {name: p.detach() for name, p in image_parameters(self.average).items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of a run on the same checkpoint and images."""
        with torch.no_grad():
            for clip, name in ((self.student, "student"), (self.average, "average")):
                for key, parameter in image_parameters(clip).items():
                    parameter.copy_(state[name][key])
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay  # may differ from the stored run's
        self.step = state["step"]

    def _draw_batch(self, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows [n] of this process's share of the batch and random crops [n, 3, S, S] of them.

        Every epoch passes all images in an order of its own; a last part that fills no batch is
        left out.
        """
        size, count = self.settings.batch, len(self.pixels)
        epoch, place = divmod(self.step, count // size)
        order = torch.Generator().manual_seed(self.settings.seed * 7919 + epoch)
        rows = torch.randperm(count, generator=order)[place * size : (place + 1) * size]
        crops = draw_crops(size, self.settings.crop_area, source)
        own = slice(self.rank, None, self.processes)
        images = torch.from_numpy(self.pixels[rows[own].numpy()]).to(self.original.device)
        return rows[own], cut_crops(images, crops[own], self.original.image_size)

    def _encode(self, clip: PromptedCLIP, pixels: Tensor) -> ImageFeatures:
        mixed = self.settings.dtype == "bfloat16"
        with torch.autocast(clip.device.type, dtype=torch.bfloat16, enabled=mixed):
            return clip.encode_images(pixels.unsqueeze(0))

    def _require_gradients(self, wanted: bool) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(wanted)

    def _average_gradients(self) -> None:
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        if self.processes > 1:
            for name, total in processes.add_up(gradients).items():
                gradients[name].copy_(total / self.processes)

    def _update_average(self) -> None:
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        averages: list[Tensor] = [*image_parameters(self.average).values()]
        with torch.no_grad():
            torch._foreach_lerp_(averages, [*self.parameters.values()], 1 - decay)


def image_parameters(clip: PromptedCLIP) -> dict[str, nn.Parameter]:
    """The weights of the image tower and of its projection, by name."""
    prefixes = ("vision_model.", "visual_projection.")
    return {n: p for n, p in clip.model.named_parameters() if n.startswith(prefixes)}
