"""The service's Prometheus metrics, one registry an app; labels come from closed sets only."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0)
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
NATS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
NEAR = 0.65
"""Images that share more of their codes are the same picture a little changed."""

LIKENESS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, NEAR, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """All metrics as attributes, named as they are exposed less the prefix `tapt_`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=True)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tapt_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"tapt_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"tapt_{name}", text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests answered.", "route", "code")
        self.request_seconds = histogram("request_seconds", "Time to answer.", SECONDS)
        self.queue_seconds = histogram(
            "queue_seconds", "Time from slot to the batch's beginning.", SECONDS
        )
        self.queue_depth = gauge("queue_depth", "Requests whose batch has not begun.")
        self.decode_seconds = histogram("decode_seconds", "Time to decode an image.", SECONDS)
        self.adaptation_seconds = histogram(
            "adaptation_seconds",
            "Time in the adaptation of a request.",
            SECONDS,
            "method",
            "design",
        )
        self.batch_size = histogram("batch_size", "Requests in a batch.", POWERS)
        self.batch_views = histogram("batch_views", "Views in a batch.", (*POWERS, 2048, 4096))
        self.adaptation_steps = histogram(
            "adaptation_steps", "Steps a request got.", (0, *POWERS[:6])
        )
        self.entropy_before = histogram("entropy_before", "Entropy before adapting, nats.", NATS)
        self.entropy_after = histogram("entropy_after", "Entropy after adapting, nats.", NATS)
        self.view_agreement = histogram(
            "view_agreement", "Share of views that agree with the answer.", SHARES
        )
        self.suspected_adversarial = counter(
            "suspected_adversarial", "Answers whose suspicion passed the bundle's threshold."
        )
        self.label_changed = counter(
            "label_changed", "Answers whose first label differs from the undefended one."
        )
        self.truncated = counter("truncated", "Answers cut short.", "reason")
        self.rejected = counter("rejected", "Requests refused before any work.", "reason")
        self.query_similarity = histogram(
            "query_similarity",
            "Likeness of an image to the nearest recent one of its key; retries are left out.",
            LIKENESS,
        )
        self.image_fetches = counter("image_fetches", "Images fetched by URL.", "outcome")
        self.key_file_errors = counter(
            "key_file_errors", "Looks at a key file that could not be read; the old keys stayed."
        )
        self.decoder_kills = counter(
            "decoder_kills",
            "Decoder processes that an image ended: it took too long or too much memory, crashed "
            "the process, or its client left.",
            "reason",
        )
        self.decoder_restarts = counter("decoder_restarts", "Decoder processes started again.")
        self.decoders_up = gauge("decoders_up", "Decoder processes that are ready.")
        self.worker_restarts = counter("worker_restarts", "Worker processes started again.")
        self.worker_up = gauge("worker_up", "1 while the worker is ready.", "worker")
        self.device_memory_bytes = gauge(
            "device_memory_bytes", "Memory in use on the worker's device.", "worker"
        )
        self.text_cache_hits = counter("text_cache_hits", "Label sets found in the cache.")
        self.text_cache_misses = counter("text_cache_misses", "Label sets computed anew.")
        self.batch_splits = counter("batch_splits", "Batches run again in parts.", "reason")
        self.build_info = gauge("build_info", "Constant 1; versions as labels.", "version", "torch")
