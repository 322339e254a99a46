"""What the dashboard shows: rows of panels, each a question and the queries that answer it."""

from dataclasses import dataclass
from typing import Literal

from k8s.monitoring.queries import Scope
from k8s.monitoring.rules import CLASSIFICATIONS, failed_share

HERE = Scope("$__rate_interval", 'namespace=~"$namespace"')


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """`unit` is Grafana's name of it; `width` is in 24ths of the row, `most` the axis' end."""

    title: str
    what: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["lines", "heatmap", "number"] = "lines"
    width: int = 8
    most: float | None = None


def fill(expr: str, window: str) -> str:
    """A query without Grafana's variables: over this window, in every namespace."""
    return expr.replace("$__rate_interval", window).replace("$namespace", ".*")


def quantiles(histogram: str, *by: str) -> tuple[Query, ...]:
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    return tuple(
        Query(HERE.quantile(q, histogram, *by), f"p{100 * q:g} {legend}".strip())
        for q in (0.5, 0.9, 0.99)
    )


ROWS: dict[str, tuple[Panel, ...]] = {
    "Service": (
        Panel(
            "Ready",
            "Replicas that serve requests: they need a worker with a loaded model and a decoder "
            "process. `key files` counts the replicas that can read their key file; the others "
            "apply no key changes.",
            "none",
            (
                Query(HERE.over("sum", "tapt_ready"), "replicas"),
                Query(HERE.over("sum", "tapt_worker_up"), "workers"),
                Query(HERE.over("sum", "tapt_decoders_up"), "decoders"),
                Query(HERE.over("sum", "tapt_key_file_ok"), "key files"),
            ),
            "number",
            4,
        ),
        Panel(
            "Throughput",
            "Classifications per second, by status.",
            "reqps",
            (Query(HERE.rate("tapt_requests_total", "code", where=CLASSIFICATIONS), "{{code}}"),),
            width=7,
        ),
        Panel(
            "Errors",
            "Share of failed classifications: 5xx, and 429 for lack of capacity. Other refusals "
            "(4xx, also 429 by a key's own limits), and 504 at a client's own deadline, count "
            "neither as failures nor as successes.",
            "percentunit",
            (Query(failed_share(HERE), "failed"),),
            width=6,
        ),
        Panel(
            "Time to answer",
            "Successful classifications, from the complete request to the answer, without "
            "fetching an image by URL. The objective is for the p99.",
            "s",
            (
                *quantiles("tapt_request_seconds"),
                Query(HERE.over("max", "tapt_latency_objective_seconds"), "objective"),
            ),
            width=7,
        ),
    ),
    "Adaptation": (
        Panel(
            "Time in the adaptation",
            "Distribution of the time that requests spend in the adaptation.",
            "s",
            (Query(HERE.increase("tapt_adaptation_seconds_bucket", "le"), "{{le}}"),),
            "heatmap",
            12,
        ),
        Panel(
            "Time in the adaptation by method",
            "Quantiles. Requests of a batch adapt together, so this grows with the load.",
            "s",
            quantiles("tapt_adaptation_seconds", "method"),
            width=12,
        ),
        Panel(
            "Time to answer by method",
            "Quantiles of successful classifications, with decoding and queue, without the upload.",
            "s",
            quantiles("tapt_request_seconds", "method"),
            width=24,
        ),
    ),
    "Queue and batches": (
        Panel(
            "Queue",
            "Requests waiting for their batch, by replica.",
            "none",
            (Query(HERE.over("sum", "tapt_queue_depth", "instance"), "{{instance}}"),),
            width=6,
        ),
        Panel(
            "Time in the queue",
            "From admission to the start of the batch.",
            "s",
            quantiles("tapt_queue_seconds"),
            width=6,
        ),
        Panel(
            "Batch",
            "Mean requests and mean steps. About one request under load means that requests with "
            "different methods or views cannot share a batch.",
            "none",
            (
                Query(HERE.mean("tapt_batch_size"), "requests a batch"),
                Query(HERE.mean("tapt_adaptation_steps"), "steps a request"),
            ),
            width=6,
        ),
        Panel(
            "Views",
            "Mean number of views in a batch, over all its requests.",
            "none",
            (Query(HERE.mean("tapt_batch_views"), "views a batch"),),
            width=6,
        ),
    ),
    "Defense": (
        Panel(
            "Entropy",
            "Mean entropy of the prediction in nats. Adapting should lower it. It depends on the "
            "number of labels, so compare it only with itself.",
            "none",
            (
                Query(HERE.mean("tapt_entropy_before"), "before"),
                Query(HERE.mean("tapt_entropy_after"), "after"),
            ),
            width=6,
        ),
        Panel(
            "Agreement",
            "Mean share of the views that agree with the answer.",
            "percentunit",
            (Query(HERE.mean("tapt_view_agreement"), "agreement"),),
            width=6,
            most=1,
        ),
        Panel(
            "Suspected attacks",
            "Share of answers whose suspicion exceeds the bundle's threshold. Answers without a "
            "threshold count as not suspected. The bundle names its false positive rate.",
            "percentunit",
            (
                Query(
                    HERE.share("tapt_suspected_adversarial_total", "tapt_view_agreement_count"),
                    "suspected",
                ),
            ),
            width=6,
        ),
        Panel(
            "Label changes",
            "Share of answers whose first label differs from undefended CLIP's.",
            "percentunit",
            (
                Query(
                    HERE.share("tapt_label_changed_total", "tapt_view_agreement_count"), "changed"
                ),
            ),
            width=6,
        ),
    ),
    "Rejections and truncations": (
        Panel(
            "Rejected",
            "Requests refused before processing, or ended at their own deadline, by reason.",
            "reqps",
            (Query(HERE.rate("tapt_rejected_total", "reason"), "{{reason}}"),),
            width=8,
        ),
        Panel(
            "Truncated",
            "Answers cut short: by their deadline, because the client left, or with labels too "
            "long for the model.",
            "reqps",
            (Query(HERE.rate("tapt_truncated_total", "reason"), "{{reason}}"),),
            width=8,
        ),
        Panel(
            "Batches run again in parts",
            "After the device ran out of memory, or after an input failed the whole batch.",
            "reqps",
            (Query(HERE.rate("tapt_batch_splits_total", "reason"), "{{reason}}"),),
            width=8,
        ),
    ),
    "Device": (
        Panel(
            "Worker restarts",
            "Worker processes within the window that were lost or could not be started. After each "
            "a new start is tried.",
            "none",
            (Query(HERE.increase("tapt_worker_restarts_total", "instance"), "{{instance}}"),),
        ),
        Panel(
            "Device memory",
            "Memory in use on each worker's device. On a CPU, the worker's resident memory.",
            "bytes",
            (
                Query(
                    HERE.over("max", "tapt_device_memory_bytes", "instance", "worker"),
                    "{{instance}} worker {{worker}}",
                ),
            ),
        ),
        Panel(
            "Text cache",
            "Share of label sets with cached text features.",
            "percentunit",
            (
                Query(
                    f"{HERE.rate('tapt_text_cache_hits_total')} / "
                    f"({HERE.rate('tapt_text_cache_hits_total')} + "
                    f"{HERE.rate('tapt_text_cache_misses_total')})",
                    "hits",
                ),
            ),
            most=1,
        ),
    ),
}
