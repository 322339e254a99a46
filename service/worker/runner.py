"""Inside the worker: load the model, warm it up, run batches. Service's only torch import."""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

import models.checkpoint
from models.attacks.demo import redraw, run_demo_attack
from models.bundle import DefenseBundle, load_bundle
from models.checkpoint import Checkpoint, load_checkpoint
from models.classifier import DefendedClassifier, Finding, Picture
from models.defenses.defense import Verdict
from models.device import DeviceError, catch_up, pick_device
from models.memory import footprint, free_bytes, resident_bytes
from models.objective import Objective
from service.errors import ModelError
from service.messages import (
    Answer,
    Failure,
    ProgressEvent,
    Ready,
    Task,
    Truncation,
    ViewReport,
)
from service.settings import Settings
from service.worker.demo import run_demo

WARM_LABELS = 10
BATCH_SHARE = 0.5  # of the free memory, for the largest batch

Settle = Callable[[str, Answer | Failure | ProgressEvent], None]
Cancelled = Callable[[str], bool]

log = logging.getLogger(__name__)


class Runner:
    """One loaded model; `run` answers a batch of requests of equal method and views.

    Raises:
        ModelError: the device is not there, or checkpoint or bundle cannot be used.
    """

    def __init__(self, settings: Settings, index: int) -> None:
        self.progress = time.monotonic()
        self._settings = settings
        try:
            self._load(settings, index)
        except (ModelError, DeviceError, models.checkpoint.ModelError) as error:
            raise ModelError(str(error)) from error
        except Exception as error:  # whatever the files make a library trip over
            what = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ModelError(f"{settings.model} cannot be loaded: {what}") from error
        self.ready = self._describe()

    def _load(self, settings: Settings, index: int) -> None:
        self.device = pick_device(settings.device, index)
        usual = "float32" if self.device.type == "cpu" else "bfloat16"
        dtype = usual if settings.dtype == "auto" else settings.dtype
        checkpoint = load_checkpoint(
            settings.model,
            self.device,
            getattr(torch, dtype),
            settings.model_revision,
            settings.model_sha256.lower(),
        )
        bundle = _find_bundle(settings, checkpoint)
        objective = Objective(
            reference=None if bundle is None else bundle.statistics,
            layers=0 if bundle is None else bundle.layers,
            alignment_weight=settings.alignment_weight,
            gamma=settings.gamma,
            adapts=settings.adapts,
            learning_rate=settings.learning_rate,
            settled=settings.early_stop,
        )
        self.guard = DefendedClassifier(
            checkpoint, bundle, objective, settings.selection_ratio, settings.hypothesis_template
        )
        if settings.method not in self.guard.methods:
            raise ModelError(f"method {settings.method} needs a defense bundle")
        self._warm_up()

    def memory_bytes(self) -> int:
        """Memory in use on the device; on a CPU, the resident memory of this process."""
        on_cuda = self.device.type == "cuda"
        return torch.cuda.memory_allocated(self.device) if on_cuda else resident_bytes()

    def run(self, batch: list[Task], settle: Settle, cancelled: Cancelled) -> dict[str, int]:
        """Answer every request of a batch, each as soon as its own loop ends.

        A batch that does not fit the device is run again in halves, one that fails otherwise
        request by request, so that one poisoned input fails alone.
        """
        try:
            return self._run_all(batch, settle, cancelled)
        except torch.AcceleratorError:
            # Whatever is asked of the device from now on fails. The next process starts afresh, and
            # tries each request once more, alone.
            log.exception("the device failed; this worker ends")
            os._exit(1)

    def _run_all(self, batch: list[Task], settle: Settle, cancelled: Cancelled) -> dict[str, int]:
        if batch[0].attack is not None:
            self._demonstrate(batch[0], settle, cancelled)
            return {}
        counts: Counter[str] = Counter()
        before = self.guard.encoder.misses
        self._run_in_parts(batch, settle, cancelled, counts)
        misses = self.guard.encoder.misses - before
        needed = len(batch) * self.guard.label_sets(batch[0].method)
        counts["text_cache_misses"] = misses
        counts["text_cache_hits"] = max(0, needed - misses)
        return counts

    def _run_in_parts(
        self, batch: list[Task], settle: Settle, cancelled: Cancelled, counts: Counter[str]
    ) -> None:
        left = {work.id: work for work in batch}

        def settle_once(id: str, result: Answer | Failure | ProgressEvent) -> None:
            if left.pop(id, None) is not None:
                settle(id, result)

        try:
            return self._run(batch, settle_once, cancelled)
        except torch.AcceleratorError:
            raise
        except torch.OutOfMemoryError:
            log.warning("out of memory with %d requests", len(batch))
            reason, size = "oom_splits", max(1, (len(left) + 1) // 2)
        except Exception:
            log.exception("a batch of %d requests failed", len(batch))
            reason, size = "error_splits", 1
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        rest = list(left.values())
        if len(batch) == 1:
            for work in rest:
                settle(work.id, Failure("internal", "The request could not be worked on."))
            return None
        counts[reason] += 1
        for start in range(0, len(rest), size):
            self._run_in_parts(rest[start : start + size], settle, cancelled, counts)
        return None

    def _run(self, batch: list[Task], settle: Settle, cancelled: Cancelled) -> None:
        pictures = [Picture(w.image, w.labels, w.template, w.readout, w.seed) for w in batch]
        method, views = batch[0].method, batch[0].views
        if method not in self.guard.methods:
            for work in batch:
                message = f"The defense {method} needs a bundle, and this model has none."
                settle(work.id, Failure("unprocessable", message))
            return
        for places in self.guard.group(pictures, method):
            works, group = [batch[i] for i in places], [pictures[i] for i in places]
            pace = _Pace(self, works, group, cancelled)
            start = time.perf_counter()
            for finding in self.guard.classify(group, method, views, pace):
                row = finding.verdict.row
                reason = pace.truncated.get(row)
                if reason == "cancelled":
                    settle(works[row].id, Failure("client_gone", "The client left."))
                else:
                    seconds = time.perf_counter() - start
                    settle(works[row].id, self._answer(works[row], finding, reason, seconds))

    def _answer(
        self, work: Task, finding: Finding, truncated: Truncation | None, seconds: float
    ) -> Answer:
        verdict = finding.verdict
        scores = verdict.probabilities.tolist()
        if not np.isfinite(scores).all():
            raise FloatingPointError("a score is not finite")
        agreeing = verdict.views.argmax(dim=-1) == verdict.probabilities.argmax()
        threshold = self.guard.threshold(work.method, len(verdict.views))
        return Answer(
            scores=scores,
            undefended_scores=finding.undefended.tolist(),
            design=self.guard.design(work.method),
            steps=verdict.steps,
            views=len(verdict.views),
            views_kept=verdict.kept,
            entropy_before=verdict.entropy_before,
            entropy_after=verdict.entropy_after,
            agreement=float(agreeing.float().mean()),
            suspicion=finding.doubt,
            suspected=None if threshold is None else finding.doubt > threshold,
            truncated=truncated,
            labels_truncated=finding.labels_truncated,
            adapt_seconds=finding.seconds,
            predict_seconds=seconds - finding.seconds,
            view_reports=self._exhibit(work, verdict) if work.return_views else (),
        )

    def _exhibit(self, work: Task, verdict: Verdict) -> tuple[ViewReport, ...]:
        images = redraw(self.guard, work.image, len(verdict.views), work.seed)
        kept = torch.special.entr(verdict.views).sum(dim=-1).argsort()[: verdict.kept].tolist()
        best = verdict.views.max(dim=-1)
        seen = zip(images, best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple(ViewReport(*one, place in kept) for place, one in enumerate(seen))

    def _demonstrate(self, work: Task, settle: Settle, cancelled: Cancelled) -> None:
        picture = Picture(work.image, work.labels, work.template, work.readout, work.seed)

        def ask(one: Task) -> Answer | Failure:
            results: list[Answer | Failure | ProgressEvent] = []
            self._run([one], lambda _, result: results.append(result), cancelled)
            assert not isinstance(results[0], ProgressEvent)
            self.progress = time.monotonic()
            return results[0]

        attack = work.attack
        assert attack is not None
        pictures = run_demo_attack(
            self.guard,
            picture,
            work.method,
            work.views,
            work.steps,
            epsilon=attack.epsilon,
            strides=attack.steps,
            target=attack.target,
            adaptive=attack.adaptive,
        )
        run_demo(work, pictures, ask, settle, cancelled)

    def _describe(self) -> Ready:
        checkpoint, bundle = self.guard.checkpoint, self.guard.bundle
        clip = checkpoint.clip
        visual = None if bundle is None else bundle.prompts.vision
        image_tokens = 1 + clip.patches + (0 if visual is None else visual.shape[2])
        ratio, resident = self._settings.selection_ratio, self.memory_bytes()
        cost = footprint(clip, resident, ratio, image_tokens)
        share = BATCH_SHARE / (1 if self.device.type == "cuda" else self._settings.workers)
        tokens = self._settings.max_batch_tokens or cost.budget(
            int(free_bytes(self.device) * share)
        )
        return Ready(
            info={
                "model": {
                    "name": checkpoint.name,
                    "sha256": checkpoint.sha256,
                    "parameters": sum(p.numel() for p in clip.model.parameters()),
                    "image_size": clip.image_size,
                    "context_length": clip.context_length,
                    "dtype": str(clip.dtype).removeprefix("torch."),
                    "device": str(self.device),
                },
                "bundle": None if bundle is None else bundle.describe(),
                "design": self.guard.design("tapt"),
                "memory": {
                    "resident_bytes": resident,
                    "image_token_bytes": round(cost.image_token),
                    "text_token_bytes": round(cost.text_token),
                    "batch_tokens": tokens,
                    "peak_bytes": max(cost.peak(tokens, 0), cost.peak(0, tokens)),
                },
                "designs": ["v", "vli", "vlj"],
                "defenses": self.guard.methods,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            },
            max_batch_tokens=tokens,
            image_tokens=image_tokens,
            context_length=clip.context_length,
        )

    def _warm_up(self) -> None:
        """The full adaptation at a typical shape, so that the first request finds all warm."""
        settings, name = self._settings, self.guard.checkpoint.name
        side = self.guard.checkpoint.clip.image_size
        work = Task(
            id="warm-up",
            image=np.zeros((side, side, 3), np.uint8),
            labels=tuple(f"label {number}" for number in range(WARM_LABELS)),
            template=None,
            method="tapt",
            steps=max(1, settings.steps),
            views=settings.views,
            readout=settings.readout,
            seed=0,
            deadline=float("inf"),
        )
        results: list[Answer | Failure | ProgressEvent] = []
        for _ in range(2):
            self.run([work], lambda _, result: results.append(result), lambda _: False)
        if any(isinstance(result, Failure) for result in results):
            raise ModelError(f"{name} failed its warm-up; the log says why")


class _Pace:
    """Who leaves the loop when: at the end of its steps, near its deadline, or cancelled."""

    def __init__(
        self, runner: Runner, works: list[Task], pictures: list[Picture], cancelled: Cancelled
    ) -> None:
        self._runner, self._works, self._cancelled = runner, works, cancelled
        self._steps = [
            work.steps if runner.guard.adaptable(picture, work.method) else 0
            for work, picture in zip(works, pictures, strict=True)
        ]
        self._last = time.monotonic()
        self._readout: float | None = None
        self.truncated: dict[int, Truncation] = {}

    def __call__(self, steps: int, rows: list[int]) -> set[int]:
        catch_up(self._runner.device)  # or the clock would time the asking alone
        now = time.monotonic()
        # The first look costs about what reading out will, and at least a step.
        step, self._last = now - self._last, now
        self._readout = step if self._readout is None else self._readout
        self._runner.progress = now
        gone = set()
        for row in rows:
            work = self._works[row]
            if self._cancelled(work.id):
                self.truncated[row] = "cancelled"
            elif steps < self._steps[row]:
                if now + step + self._readout <= work.deadline:
                    continue
                self.truncated[row] = "deadline"
            gone.add(row)
        return gone


def _find_bundle(settings: Settings, checkpoint: Checkpoint) -> DefenseBundle | None:
    """The bundle that the settings name, or the one beside the checkpoint, if any."""
    beside = checkpoint.directory / "bundle"
    if not settings.bundle and not beside.is_dir():
        log.warning(
            "no defense bundle for %s: only the template's own words adapt, by the entropy alone",
            checkpoint.name,
        )
        return None
    directory = Path(settings.bundle) if settings.bundle else beside
    bundle = load_bundle(directory, checkpoint.clip, checkpoint.sha256)
    if bundle.prompts.design != settings.design:
        raise ModelError(
            f"the bundle {directory} is of design {bundle.prompts.design}, "
            f"the settings ask for {settings.design}"
        )
    return bundle
