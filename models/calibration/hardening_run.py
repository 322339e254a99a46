"""A hardening run: its states on disk, its log, and how it is stopped and continued."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import Progress as Bar
from torch import Tensor

from models.attacks.pgd import ascend
from models.calibration.hardening import HardeningTrainer

SAVE_EVERY, MEASURE_EVERY = 120.0, 600.0  # seconds
VALIDATION_ATTACK_STEPS = 10


@dataclass(frozen=True, slots=True)
class Validation:
    """Held-out images [N, 3, S, S] in [0, 1], their labels [N], and text features [C, D] of the
    class names."""

    pixels: Tensor
    labels: Tensor
    text: Tensor

    def measure(self, trainer: HardeningTrainer, batch: int = 100) -> dict[str, float]:
        """Accuracy of the averaged weights on single views, clean and under ten steps of PGD.

        It follows a run's course and is no robustness figure: `tapt-serve evaluate` makes those.
        """
        clip, epsilon = trainer.average, trainer.settings.epsilon
        right: dict[str, int] = {"clean": 0, "attacked": 0}

        def logits(pixels: Tensor) -> Tensor:
            features = clip.encode_images(pixels.unsqueeze(0)).features[0]
            scaled: Tensor = clip.logit_scale * features @ self.text.T
            return scaled

        for clean, goals in zip(self.pixels.split(batch), self.labels.split(batch), strict=True):

            def loss(pixels: Tensor, goals: Tensor = goals) -> Tensor:
                return F.cross_entropy(logits(pixels), goals, reduction="sum")

            attacked = ascend(clean, loss, epsilon, VALIDATION_ATTACK_STEPS, epsilon / 4)
            with torch.no_grad():
                right["clean"] += int((logits(clean).argmax(dim=-1) == goals).sum())
                right["attacked"] += int((logits(attacked).argmax(dim=-1) == goals).sum())
        return {name: count / len(self.labels) for name, count in right.items()}


@dataclass(slots=True)
class Run:
    """A run and its files in `OUT.partial`.

    `latest.pt` is the newest state; `before-cooldown.pt`, from where the cool-down began, is what
    a longer run continues from. `phases` are the settings so far, each with its first step.
    """

    trainer: HardeningTrainer
    partial: Path
    identity: dict[str, Any]
    phases: list[dict[str, Any]] = field(default_factory=list)

    def save(self, name: str) -> None:
        """Write a state in one move, so that a killed run leaves the last whole one."""
        if self.trainer.rank:
            return
        settings = self.trainer.settings
        plan = {"steps": settings.steps, "cooldown_start": settings.cooldown_start}
        state = {**self.trainer.state(), **self.identity, **plan, "phases": self.phases}
        scratch = self.partial / f"{name}.tmp"
        torch.save(state, scratch)
        os.replace(scratch, self.partial / f"{name}.pt")

    def resume(self) -> None:
        """Continue from the newest state that an uninterrupted run of these settings would have
        passed, as far as the learning rate goes.

        Raises:
            ValueError: the states belong to another run, or are all past the cool-down's start.
        """
        settings, passed = self.trainer.settings, 0
        for name in ("latest", "before-cooldown"):
            file = self.partial / f"{name}.pt"
            if not file.exists():
                continue
            state = torch.load(file, map_location=self.trainer.original.device, weights_only=True)
            self._check(state)
            same = state["steps"] == settings.steps
            same = same and state["cooldown_start"] == settings.cooldown_start
            if same or state["step"] <= min(state["cooldown_start"], settings.cooldown_start):
                self.trainer.restore(state)
                self.phases = state["phases"]
                break
            passed = state["step"]
        else:
            if passed:
                least = math.ceil(passed / (1 - settings.cooldown)) if settings.cooldown < 1 else 0
                raise ValueError(
                    f"the run is at step {passed}, and {settings.steps} steps with a cool-down of "
                    f"{settings.cooldown} begin it at {settings.cooldown_start}: choose a shorter "
                    f"--cooldown" + (f", or --steps of {least} or more" if least else "")
                )
        current = json.loads(json.dumps(asdict(settings)))
        last = (
            {k: v for k, v in self.phases[-1].items() if k != "first_step"} if self.phases else {}
        )
        if current != last:
            self.phases.append({"first_step": self.trainer.step, **current})

    def _check(self, state: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if state[name] != value:
                raise ValueError(
                    f"{self.partial} holds a run with {name} {state[name]}, not {value}: "
                    "remove it or choose another --out"
                )

    def train(self, validation: Validation | None, bar: Bar) -> bool:
        """Train to the last step, or until a signal asks to stop; whether the end was reached."""
        trainer, settings = self.trainer, self.trainer.settings
        task = bar.add_task("hardening", total=settings.steps, completed=trainer.step)
        saved = measured = time.monotonic()
        sums: dict[str, float] = {}
        first = trainer.step
        with _signals() as received:
            while trainer.step < settings.steps:
                if trainer.step == settings.cooldown_start:
                    self.save("before-cooldown")
                for name, value in trainer.train_step().items():
                    sums[name] = sums.get(name, 0.0) + value
                bar.update(task, completed=trainer.step)
                stop = _any_process(bool(received), trainer)
                ended, now = trainer.step == settings.steps, time.monotonic()
                if stop or ended or now - saved > SAVE_EVERY:
                    self.save("latest")
                    saved = now
                if ended or now - measured > MEASURE_EVERY:
                    seconds = round(now - measured, 1)
                    losses = {name: total / (trainer.step - first) for name, total in sums.items()}
                    self._log({"seconds": seconds, **losses}, validation, bar)
                    measured, sums, first = time.monotonic(), {}, trainer.step
                if stop and not ended:
                    return False
        return True

    def _log(self, row: dict[str, float], validation: Validation | None, bar: Bar) -> None:
        if self.trainer.rank:
            return
        step = self.trainer.step
        row = {"step": step, "rate": self.trainer.settings.rate_at(step - 1), **row}
        if validation is not None:
            row |= validation.measure(self.trainer)
        line = json.dumps({name: float(f"{value:.5g}") for name, value in row.items()})
        with (self.partial / "log.jsonl").open("a") as log:
            log.write(line + "\n")
        bar.console.print(line, soft_wrap=True, highlight=False)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; the second one acts as usual."""
    received: list[int] = []
    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _any_process(stop: bool, trainer: HardeningTrainer) -> bool:
    """Whether any process was asked to stop: all must stop after the same step."""
    if trainer.processes == 1:
        return stop
    asked = torch.tensor(float(stop), device=trainer.original.device)
    dist.all_reduce(asked)
    return bool(asked)
