"""One training run: its steps, its moving average, its checkpoints, its curve."""

import copy
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from research.embedded.augment import crop, jitter, mix, skip_blocks
from research.embedded.losses import Targets, image_losses, text_losses
from research.embedded.recipe import Recipe
from research.embedded.zeroshot import normalize

Measure = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class Budget:
    """How long a run lasts: a number of steps, or seconds of training time.

    With steps a resumed run equals an uninterrupted one to the last bit; with seconds the
    schedule follows the clock, so that a busy machine ends on time with fewer steps.
    """

    steps: int | None = None
    seconds: float | None = None

    def progress(self, step: int, elapsed: float) -> float:
        """Share of the run that is done. Raises ValueError where no budget was given."""
        if self.steps is not None:
            return step / self.steps
        if self.seconds is None:
            raise ValueError("a budget needs steps or seconds")
        return elapsed / self.seconds


def build_optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the matrices inside the encoders, AdamW for everything else."""
    hidden, matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if "encoder.layers" in name and parameter.ndim == 2:
            hidden.append(parameter)
        elif parameter.ndim >= 2 and "embedding" not in name:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    muon = torch.optim.Muon(
        hidden, lr=recipe.rate, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw"
    )
    groups = [
        {"params": matrices, "weight_decay": recipe.decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [muon, torch.optim.AdamW(groups, lr=recipe.rate / 3, betas=(0.9, 0.98))]


class Trainer:
    """A run in progress and everything that a checkpoint holds of it.

    images: uint8 [count, 3, size, size], a tensor or a memory-mapped array; labels: int64
    [count]. The order of the images and every random number of a step follow from (seed, step),
    so the position is all there is to remember of them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        targets: Targets,
        images: Any,
        labels: Tensor,
        recipe: Recipe,
        budget: Budget,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if len(labels) < recipe.batch:
            raise ValueError(f"{len(labels)} images do not fill one batch of {recipe.batch}")
        self.model, self.tokenizer, self.targets = model, tokenizer, targets
        self.images, self.labels, self.recipe = images, labels, recipe
        self.budget, self.clock = budget, clock
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizers = build_optimizers(model, recipe)
        self.step, self.seen, self.elapsed = 0, 0, 0.0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    @property
    def progress(self) -> float:
        return self.budget.progress(self.step, self.elapsed)

    @property
    def epoch(self) -> float:
        return self.seen / len(self.labels)

    def train_step(self) -> dict[str, float]:
        """One update of the weights and their average; returns the losses."""
        started = self.clock()
        # The fused kernel's backward is the larger half of a step on a CPU (0.93 s of 2.0 s at 17
        # tokens, batch 512); with plain matrix products the whole step takes half the time.
        on_cpu = self.model.device.type == "cpu"
        with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
            parts = self._losses()
            torch.stack(list(parts.values())).sum().backward()
        scale = self.recipe.rate_at(self.recipe.phase_at(self.progress)[1])
        rates = (self.recipe.rate, self.recipe.rate / 3)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self._update_average()
        self.elapsed += self.clock() - started
        return {name: float(part.detach()) for name, part in parts.items()}

    def _losses(self) -> dict[str, Tensor]:
        """The losses of a step, to be summed: of the words, then of the images."""
        recipe, seed = self.recipe, self.recipe.seed * 1_000_003 + self.step
        towers, draws = (self.model, self.tokenizer, self.targets), random.Random(seed)
        words, progress = recipe.phase_at(self.progress)
        if words:
            return text_losses(*towers, recipe, draws)
        generator = torch.Generator().manual_seed(seed)
        images, labels = self._batch()
        images = crop(images, recipe.size_at(progress), generator)
        images = jitter(images, recipe.jitter, generator, recipe.gray)
        images, mixed = mix(images, recipe.mixing, generator)
        truth = mixed.labels(labels, len(self.targets.classes))
        hooks = skip_blocks(self.model.vision_model, recipe.drop, generator)
        try:
            return image_losses(*towers, normalize(images), truth, recipe, draws)
        finally:
            for hook in hooks:
                hook.remove()

    def _batch(self) -> tuple[Tensor, Tensor]:
        size, count = self.recipe.batch, len(self.labels)
        epoch, place = divmod(self.seen // size, count // size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.recipe.seed + epoch)
            self._order = (epoch, torch.randperm(count, generator=generator))
        self.seen += size
        rows = self._order[1][place * size : (place + 1) * size].sort().values
        pixels = torch.as_tensor(self.images[rows.numpy()])
        return pixels.to(self.model.device), self.labels[rows].to(self.model.device)

    def _update_average(self) -> None:
        decay = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        averages, weights = list(self.average.parameters()), list(self.model.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay)

    def save(self, path: Path) -> None:
        """Write a checkpoint in one move, so that a killed run leaves the last whole one."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seen": self.seen,
            "elapsed": self.elapsed,
        }
        unfinished = path.with_suffix(".part")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same recipe."""
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.step, self.seen, self.elapsed = state["step"], state["seen"], state["elapsed"]


def run(
    trainer: Trainer, out: Path, measure: Measure, every: float = 240.0
) -> Iterator[dict[str, float]]:
    """Train to the end of the budget; each `every` seconds measure the average, checkpoint, yield.

    The rows yielded (epoch, step, seconds, losses, logit scale, pixels, measures) are appended
    to `curve.jsonl` in `out` beside `checkpoint.pt`.
    """
    out.mkdir(parents=True, exist_ok=True)
    sums: dict[str, list[float]] = {}
    last = trainer.elapsed
    with Progress() as bar:
        task = bar.add_task("train", total=1.0)
        while trainer.progress < 1:
            for name, loss in trainer.train_step().items():
                sums.setdefault(name, []).append(loss)
            bar.update(task, completed=trainer.progress)
            if trainer.elapsed - last < every and trainer.progress < 1:
                continue
            row = {"epoch": trainer.epoch, "step": trainer.step, "seconds": trainer.elapsed}
            row |= {f"loss_{name}": fmean(losses) for name, losses in sums.items()}
            row["scale"] = float(trainer.model.logit_scale.detach().exp())
            row["pixels"] = trainer.recipe.size_at(trainer.recipe.phase_at(trainer.progress)[1])
            row |= measure(trainer.average)
            row = {name: round(value, 4) for name, value in row.items()}
            trainer.save(out / "checkpoint.pt")
            with (out / "curve.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            sums, last = {}, trainer.elapsed
            yield row
