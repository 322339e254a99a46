"""What batches and answers add to the metrics."""

from collections.abc import Mapping, Sequence

from service.messages import Answer, Task
from service.telemetry.metrics import Metrics


def record_batch(metrics: Metrics, batch: Sequence[Task]) -> None:
    metrics.batch_size.observe(len(batch))
    metrics.batch_views.observe(sum(work.views for work in batch))


def record_counts(metrics: Metrics, counts: Mapping[str, int]) -> None:
    """Add the counters that the worker sends with the end of a batch."""
    metrics.text_cache_hits.inc(counts.get("text_cache_hits", 0))
    metrics.text_cache_misses.inc(counts.get("text_cache_misses", 0))
    for reason in ("oom", "error"):
        metrics.batch_splits.labels(reason).inc(counts.get(f"{reason}_splits", 0))


def record_answer(metrics: Metrics, work: Task, answer: Answer) -> None:
    metrics.adaptation_seconds.labels(work.method, answer.design).observe(answer.adapt_seconds)
    metrics.adaptation_steps.observe(answer.steps)
    metrics.entropy_before.observe(answer.entropy_before)
    metrics.entropy_after.observe(answer.entropy_after)
    metrics.view_agreement.observe(answer.agreement)
    metrics.suspected_adversarial.inc(bool(answer.suspected))
    metrics.label_changed.inc(_first(answer.scores) != _first(answer.undefended_scores))
    if answer.truncated:
        metrics.truncated.labels(answer.truncated).inc()
    if answer.labels_truncated:
        metrics.truncated.labels("labels").inc()


def _first(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
