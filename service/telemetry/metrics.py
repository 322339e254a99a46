"""The service's Prometheus metrics, in one registry per app. Label values come from closed sets."""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.metrics import MetricWrapperBase

from service.messages import Answer, Task

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0, 120.0)
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
NATS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
NEAR = 0.65
"""Images that share more of their codes are counted as the same image, slightly changed."""

SIMILARITY = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, NEAR, 0.7, 0.8, 0.9, 1.0)


DIAGNOSTICS = {
    "entropy_before",
    "entropy_after",
    "view_agreement",
    "suspected_adversarial",
    "label_changed",
    "query_similarity",
}
"""Metrics of how the defense fared. Read before and after a request, they reveal what only keys
with the scope `diagnostics` may see in its answer."""


class Metrics:
    """Each metric is an attribute, named as it is exposed without the prefix `tapt_`.

    `registry` has all of them, `open_registry` all but those of DIAGNOSTICS.
    """

    def __init__(self, objective: float = math.inf) -> None:
        """`objective`: successful classifications that take longer (seconds) count as slow."""
        self._objective = objective
        self.registry = registry = CollectorRegistry(auto_describe=True)
        self.open_registry = CollectorRegistry(auto_describe=True)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tapt_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"tapt_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"tapt_{name}", text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests answered.", "route", "code")
        self.request_seconds = histogram(
            "request_seconds",
            "Time from a complete request to its answer, without fetching an image by URL; "
            "successful classifications only.",
            SECONDS,
            "method",
        )
        self.slow_requests = counter(
            "slow_requests", "Successful classifications that exceeded the latency objective."
        )
        self.latency_objective_seconds = gauge(
            "latency_objective_seconds", "The setting `latency_objective_ms`, in seconds."
        )
        self.queue_seconds = histogram(
            "queue_seconds", "Time from admission to the beginning of the batch.", SECONDS
        )
        self.queue_depth = gauge("queue_depth", "Requests whose batch has not begun.")
        self.queue_seconds_expected = gauge(
            "queue_seconds_expected",
            "Expected time to answer the requests whose batch has not begun, by price and pace.",
        )
        self.decode_seconds = histogram(
            "decode_seconds", "Time to decode an image, waiting for a decoder included.", SECONDS
        )
        self.adaptation_seconds = histogram(
            "adaptation_seconds",
            "Time to adapt to a request.",
            SECONDS,
            "method",
            "design",
        )
        self.batch_size = histogram("batch_size", "Requests in a batch.", POWERS)
        self.batch_views = histogram("batch_views", "Views in a batch.", (*POWERS, 2048, 4096))
        self.adaptation_steps = histogram(
            "adaptation_steps", "Adaptation steps of a request.", (0, *POWERS[:6])
        )
        self.entropy_before = histogram("entropy_before", "Entropy before adapting, nats.", NATS)
        self.entropy_after = histogram("entropy_after", "Entropy after adapting, nats.", NATS)
        self.view_agreement = histogram(
            "view_agreement", "Share of views that agree with the answer.", SHARES
        )
        self.suspected_adversarial = counter(
            "suspected_adversarial", "Answers whose suspicion exceeded the bundle's threshold."
        )
        self.label_changed = counter(
            "label_changed", "Answers whose first label differs from that of undefended CLIP."
        )
        self.truncated = counter("truncated", "Answers cut short.", "reason")
        self.rejected = counter(
            "rejected",
            "Requests refused before they ran, and requests that ended in a 504 at their own "
            "`deadline_ms` (`client_deadline`).",
            "reason",
        )
        self.query_similarity = histogram(
            "query_similarity",
            "Similarity of an image to the nearest recent one of its key, without retries.",
            SIMILARITY,
        )
        self.image_fetches = counter("image_fetches", "Images fetched by URL.", "outcome")
        self.ready = gauge("ready", "1 while `/readyz` succeeds, else 0.")
        self.key_file_ok = gauge(
            "key_file_ok", "0 while the key file cannot be read and the old keys stay, else 1."
        )
        self.key_file_errors = counter(
            "key_file_errors", "Failed attempts to reload the key file; the old keys stay."
        )
        self.decoder_kills = counter(
            "decoder_kills",
            "Decoder processes killed because of an image: it took too long or too much memory, "
            "crashed the process, or its client left.",
            "reason",
        )
        self.decoder_restarts = counter("decoder_restarts", "Decoder processes restarted.")
        self.decoders_up = gauge("decoders_up", "Decoder processes that are ready.")
        self.worker_restarts = counter(
            "worker_restarts",
            "Worker processes lost, or not started for lack of resources; each is started again.",
        )
        self.worker_up = gauge("worker_up", "1 while the worker is ready.", "worker")
        self.device_memory_bytes = gauge(
            "device_memory_bytes", "Memory in use on the worker's device.", "worker"
        )
        self.text_cache_hits = counter("text_cache_hits", "Label sets found in the text cache.")
        self.text_cache_misses = counter(
            "text_cache_misses", "Label sets not found in the text cache."
        )
        self.batch_splits = counter(
            "batch_splits", "Batches run again in parts after a failure.", "reason"
        )
        self.latency_objective_seconds.set(objective)
        self.build_info = gauge("build_info", "Constant 1; versions as labels.", "version", "torch")
        for name, metric in vars(self).items():
            if isinstance(metric, MetricWrapperBase) and name not in DIAGNOSTICS:
                self.open_registry.register(metric)
        for each in (self.registry, self.open_registry):
            ProcessCollector(registry=each)  # process_*: of the API process, on Linux only

    def set_build(self, info: Mapping[str, Any]) -> None:
        """Publish the versions; `info` is that of a worker's Ready."""
        torch = info.get("versions", {}).get("torch", "")
        self.build_info.labels(version("tapt-serve"), torch).set(1)

    def observe_request(self, method: str, seconds: float) -> None:
        """Count a successful classification that took this long, without the time in which its
        request and its image arrived."""
        self.request_seconds.labels(method).observe(seconds)
        self.slow_requests.inc(seconds > self._objective)

    def observe_batch(self, batch: Sequence[Task]) -> None:
        self.batch_size.observe(len(batch))
        self.batch_views.observe(sum(task.views for task in batch))

    def add_counts(self, counts: Mapping[str, int]) -> None:
        """Add the counts that a worker sends at the end of a batch."""
        self.text_cache_hits.inc(counts.get("text_cache_hits", 0))
        self.text_cache_misses.inc(counts.get("text_cache_misses", 0))
        for reason in ("oom", "error"):
            self.batch_splits.labels(reason).inc(counts.get(f"{reason}_splits", 0))

    def observe_answer(self, task: Task, answer: Answer) -> None:
        self.adaptation_seconds.labels(task.method, answer.design).observe(answer.adapt_seconds)
        self.adaptation_steps.observe(answer.steps)
        self.entropy_before.observe(answer.entropy_before)
        self.entropy_after.observe(answer.entropy_after)
        self.view_agreement.observe(answer.agreement)
        self.suspected_adversarial.inc(bool(answer.suspected))
        self.label_changed.inc(_first(answer.scores) != _first(answer.undefended_scores))
        if answer.truncated:
            self.truncated.labels(answer.truncated).inc()
        if answer.labels_truncated:
            self.truncated.labels("labels").inc()


def _first(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def table() -> str:
    """The text of `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "What `GET /metrics` exposes, in the format of Prometheus. If the server has keys, the "
        "route needs one, and metrics with a scope need a key with that scope; "
        "`TAPT_OPEN_ROUTES=metrics` opens them all. A histogram has the series `_bucket`, `_sum` "
        "and `_count`. On Linux, `process_*` describes the API process. The [runbook](runbook.md) "
        "explains the alerts. Generated by `python -m service.telemetry.metrics`.",
        "",
        "| name | type | labels | scope | meaning |",
        "|---|---|---|---|---|",
    ]
    for attribute, metric in vars(Metrics()).items():
        if not isinstance(metric, MetricWrapperBase):
            continue
        (family,) = metric.describe()
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        scope = "`diagnostics`" if attribute in DIAGNOSTICS else ""
        meaning = family.documentation
        lines.append(f"| `{name}` | {family.type} | {labels} | {scope} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
