"""Run batches of requests on a loaded model, splitting those that fail."""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from models.attacks.demo import redraw, run_demo_attack
from models.classifier import EncodedQuery, ImageQuery, Prediction, PreparedBatch
from models.clip import Interrupted
from models.tapt import Exit
from service.defaults import make_typical_task
from service.errors import ModelError
from service.messages import Answer, Failure, ProgressEvent, Task, Truncation, ViewReport
from service.settings import Settings
from service.worker.demo import run_demo
from service.worker.loading import describe, load, memory_bytes
from service.worker.pacing import Cancelled, Pacer

CLIENT_GONE = Failure("client_gone", "The client left.")
LATE = Failure("deadline", "The deadline passed while the labels were encoded.")

Settle = Callable[[str, Answer | Failure | ProgressEvent], None]

log = logging.getLogger(__name__)


class Runner:
    """One loaded and warm model; `run` answers a batch of requests of equal method and views.

    Attributes:
        ready: the model's facts.
        progress: `time.monotonic()` of the last step boundary or start of a chunk.

    Raises:
        ModelError: the model cannot be loaded or fails its warm-up.
    """

    def __init__(self, settings: Settings, index: int) -> None:
        self.progress = time.monotonic()
        try:
            self.classifier = load(settings, index)
            self.device = self.classifier.checkpoint.clip.device
            seconds = self._warm_up(settings)
        except ModelError:
            raise
        except Exception as error:  # libraries raise anything for a malformed file
            what = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ModelError(f"{settings.model} cannot be loaded: {what}") from error
        self.ready = replace(describe(self.classifier, settings), typical_seconds=seconds)

    def memory_bytes(self) -> int:
        """Memory in use on the device; on a CPU, the resident memory of this process."""
        return memory_bytes(self.device)

    def run(self, batch: list[Task], settle: Settle, cancelled: Cancelled) -> dict[str, int]:
        """Answer every request of a batch, each as soon as its own loop ends.

        A batch that runs out of device memory is run again in halves. One that fails otherwise is
        run again request by request, so that one bad input fails alone.

        Returns:
            Counters to add to the metrics.
        """
        counts: Counter[str] = Counter()
        encoder = self.classifier.encoder
        hits, misses = encoder.hits, encoder.misses
        try:
            if batch[0].attack is not None:
                self._run_demo(batch[0], settle, cancelled)
                return {}
            self._run_in_parts(batch, settle, cancelled, counts)
        except torch.AcceleratorError:
            # Every further call to the device would fail. The next process starts afresh and tries
            # each request once more, alone.
            log.exception("the device failed; this worker exits")
            os._exit(1)
        counts["text_cache_hits"] = encoder.hits - hits
        counts["text_cache_misses"] = encoder.misses - misses
        return counts

    def _run_in_parts(
        self, batch: list[Task], settle: Settle, cancelled: Cancelled, counts: Counter[str]
    ) -> None:
        left = {task.id: task for task in batch}

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
            for task in rest:
                settle(task.id, Failure("internal", "The request could not be worked on."))
            return None
        counts[reason] += 1
        for start in range(0, len(rest), size):
            self._run_in_parts(rest[start : start + size], settle, cancelled, counts)
        return None

    def _run(self, batch: list[Task], settle: Settle, cancelled: Cancelled) -> None:
        method, views = batch[0].method, batch[0].views
        if method not in self.classifier.methods:
            message = f"The defense {method} needs a bundle, and this model has none."
            for task in batch:
                settle(task.id, Failure("unprocessable", message))
            return
        labelled = [
            (task, self._encode(task, settle, cancelled))
            for task in batch
            if not self._refuse(task, settle)
        ]
        tasks, encoded = [], []
        for task, query in labelled:
            if query is not None and cancelled(task.id):
                settle(task.id, CLIENT_GONE)
            elif query is not None:
                tasks.append(task)
                encoded.append(query)
        for group in self.classifier.group(encoded, method):
            members = [tasks[index] for index in group.indices]
            self._run_group(members, group, views, settle, cancelled)

    def _refuse(self, task: Task, settle: Settle) -> bool:
        """Settle a task with several templates if its defense would adapt their words."""
        if not task.steps or self.classifier.can_adapt(task.template, task.method):
            return False
        moves = self.classifier.moves_text
        others = ", ".join(name for name in self.classifier.methods if not moves(name))
        if task.template is None:
            advice = "this server's default has several. Name one `hypothesis_template`, or choose"
        else:
            advice = "the request has several. Name one, or choose"
        message = (
            f"The defense {task.method} adapts the words of one template, but {advice} one of the "
            f"defenses {others}."
        )
        settle(task.id, Failure("unprocessable", message))
        return True

    def _encode(self, task: Task, settle: Settle, cancelled: Cancelled) -> EncodedQuery | None:
        """The task with its labels encoded. None, and the task is settled, if its client left or
        its deadline passed before they were."""

        def stop() -> bool:
            self.progress = time.monotonic()
            return self.progress > task.deadline or cancelled(task.id)

        if not cancelled(task.id):
            try:
                with self.classifier.checkpoint.clip.interruptible(stop):
                    return self.classifier.encode(_query(task), task.method)
            except Interrupted:
                pass
        settle(task.id, CLIENT_GONE if cancelled(task.id) else LATE)
        return None

    def _run_group(
        self,
        tasks: list[Task],
        group: PreparedBatch,
        views: int,
        settle: Settle,
        cancelled: Cancelled,
    ) -> None:
        pacer = Pacer(tasks, group.steps, cancelled, self.device)
        waiting = dict(enumerate(tasks))

        def leaving(steps: int, rows: list[int]) -> Exit:
            leave = pacer(steps, rows)
            self.progress = pacer.last_step
            for row in leave.dropped:
                settle(waiting.pop(row).id, CLIENT_GONE)
            return leave

        def stop() -> bool:
            self.progress = time.monotonic()
            return all(cancelled(task.id) for task in waiting.values())

        start = time.perf_counter()
        try:
            with self.classifier.checkpoint.clip.interruptible(stop):
                for prediction in self.classifier.classify(group, views, leaving):
                    task, seconds = waiting[prediction.row], time.perf_counter() - start
                    truncated: Truncation | None = None
                    if prediction.row in pacer.late:
                        truncated = "deadline"
                    settle(task.id, self._answer(task, prediction, truncated, seconds))
                    del waiting[prediction.row]
        except Interrupted:
            for task in waiting.values():
                settle(task.id, CLIENT_GONE)

    def _answer(
        self, task: Task, prediction: Prediction, truncated: Truncation | None, seconds: float
    ) -> Answer:
        scores = prediction.probabilities.tolist()
        if not np.isfinite(scores).all():
            raise FloatingPointError("a score is not finite")
        agreeing = prediction.views.argmax(dim=-1) == prediction.probabilities.argmax()
        return Answer(
            scores=scores,
            undefended_scores=prediction.undefended.tolist(),
            design=self.classifier.design(task.method),
            steps=prediction.steps,
            views=len(prediction.views),
            views_kept=prediction.kept,
            readout=prediction.readout,
            entropy_before=prediction.entropy_before,
            entropy_after=prediction.entropy_after,
            agreement=float(agreeing.float().mean()),
            suspicion=prediction.suspicion,
            suspected=prediction.suspected,
            truncated=truncated,
            labels_truncated=prediction.labels_truncated,
            adapt_seconds=prediction.seconds,
            predict_seconds=seconds - prediction.seconds,
            view_reports=self._report_views(task, prediction) if task.return_views else (),
        )

    def _report_views(self, task: Task, prediction: Prediction) -> tuple[ViewReport, ...]:
        views = prediction.views
        images = redraw(self.classifier, _query(task), len(views))
        kept = torch.special.entr(views).sum(dim=-1).argsort()[: prediction.kept].tolist()
        best = views.max(dim=-1)
        seen = zip(images, best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple(ViewReport(*one, place in kept) for place, one in enumerate(seen))

    def _run_demo(self, task: Task, settle: Settle, cancelled: Cancelled) -> None:
        def ask(one: Task) -> Answer | Failure:
            results: list[Answer | Failure | ProgressEvent] = []
            self._run([one], lambda _, result: results.append(result), cancelled)
            assert not isinstance(results[0], ProgressEvent)
            self.progress = time.monotonic()
            return results[0]

        attack = task.attack
        assert attack is not None
        if self._refuse(task, settle):
            return
        images = run_demo_attack(
            self.classifier,
            _query(task),
            task.method,
            task.views,
            epsilon=attack.epsilon,
            attack_steps=attack.steps,
            target=attack.target,
            adaptive=attack.adaptive,
        )
        try:
            with self.classifier.checkpoint.clip.interruptible(lambda: cancelled(task.id)):
                run_demo(task, images, ask, settle, cancelled)
        except Interrupted:
            settle(task.id, CLIENT_GONE)

    def _warm_up(self, settings: Settings) -> float:
        """Run the full adaptation at a typical size, so that the first request is fast, and then a
        request with the server's defaults.

        Returns:
            Seconds that the latter took when it was run again.
        """
        classifier, checkpoint = self.classifier, self.classifier.checkpoint
        side = checkpoint.clip.image_size
        typical = replace(make_typical_task(settings), image=np.zeros((side, side, 3), np.uint8))
        full = replace(
            typical,
            template=None if classifier.can_adapt(None, "tapt") else settings.templates[0],
            method="tapt",
            steps=max(1, settings.steps),
            views=settings.views,
            readout=settings.readout,
        )
        results: list[Answer | Failure | ProgressEvent] = []
        for each in (full, typical, typical):
            start = time.perf_counter()
            self.run([each], lambda _, result: results.append(result), lambda _: False)
        if any(isinstance(result, Failure) for result in results):
            raise ModelError(f"{checkpoint.name} failed its warm-up; the log says why")
        return time.perf_counter() - start


def _query(task: Task) -> ImageQuery:
    return ImageQuery(
        image=task.image,
        labels=task.labels,
        template=task.template,
        readout=task.readout,
        seed=task.seed,
        steps=task.steps,
        view=task.view,
    )
