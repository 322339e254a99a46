"""Recording rules and alerts, for Prometheus' own files and for its operator.

The objectives: 99.5% of the classifications succeed (end neither with 5xx nor with a 429 for lack
of capacity), and 99% take at most the service's own `latency_objective_ms`. Requests refused for
the client's own fault (4xx) are left out: they are neither success nor failure, and anyone can send
them without a key. So are the 504s of requests whose own `deadline_ms` was too short.

The factors of the burn rates are those of the SRE workbook's chapter on alerting on SLOs.
"""

from typing import Any

from k8s.monitoring.queries import Scope

AVAILABILITY = 0.995
SLOW = 0.01
FALSE_POSITIVES = 0.05  # of the suspicion threshold; the default of `tapt-serve calibrate`
RUNBOOK = "docs/runbook.md"

CLASSIFICATIONS = 'route=~"/v1/classify|/"'
FAILED = f'{CLASSIFICATIONS},code=~"5.."'
SUCCEEDED = f'{CLASSIFICATIONS},code=~"2.."'
OWN_DEADLINE = 'reason="client_deadline"'  # 504s that the client's own deadline caused
FULL = 'reason=~"queue_full|uploads|fetches|decoders"'  # the 429s for lack of capacity
# No key's own limits. The last three are 503s.
REFUSED = 'reason=~"queue_full|uploads|fetches|decoders|not_ready|draining|no_decoder"'

PODS = ("namespace", "pod")


def within(window: str) -> Scope:
    """One series per deployment (namespace), or one in total without namespaces."""
    return Scope(window, by=("namespace",))


def failed_share(scope: Scope) -> str:
    """The share of failed classifications."""
    return f"({_failed(scope)} + {_full(scope)}) / {_valid(scope)}"


def refused_share(scope: Scope) -> str:
    """The share of classifications that were refused because of the state of the service."""
    return f"{_count(scope, 'tapt_rejected_total', REFUSED)} / {_valid(scope)}"


def _valid(scope: Scope) -> str:
    """The valid events of the objective: classifications that ended with 2xx or 5xx, or that were
    refused for lack of capacity. Those of a key that exceeds its own limits or deadlines are left
    out: it can neither spend the error budget nor hide the failures of other keys."""
    succeeded = _count(scope, "tapt_requests_total", SUCCEEDED)
    return f"({succeeded} + {_failed(scope)} + {_full(scope)})"


def _failed(scope: Scope) -> str:
    """Those that ended with 5xx, without those at a deadline of their own. Both are counted at the
    same time, but a rate misses the first count of a new series, hence the bound."""
    failed = _count(scope, "tapt_requests_total", FAILED)
    own = _count(scope, "tapt_rejected_total", OWN_DEADLINE)
    return f"clamp_min({failed} - {own}, 0)"


def _full(scope: Scope) -> str:
    return _count(scope, "tapt_rejected_total", FULL)


def _count(scope: Scope, metric: str, where: str) -> str:
    """A rate; 0 where the series does not exist yet but classifications do."""
    none = f"0 * {scope.rate('tapt_requests_total', where=CLASSIFICATIONS)}"
    return f"({scope.rate(metric, where=where)} or {none})"


def recordings() -> dict[str, str]:
    """Recorded series and their expressions."""
    rules = {
        f"tapt:requests:failed_share{window}": failed_share(within(window))
        for window in ("5m", "30m", "1h", "6h")
    }
    rules["tapt:requests:slow_share5m"] = within("5m").share(
        "tapt_slow_requests_total", "tapt_request_seconds_count"
    )
    rules["tapt:requests:refused_share5m"] = refused_share(within("5m"))
    for window in ("15m", "1d"):
        rules[f"tapt:answers:suspected_share{window}"] = within(window).share(
            "tapt_suspected_adversarial_total", "tapt_view_agreement_count"
        )
    for window in ("30m", "1d"):
        rules[f"tapt:entropy_before:mean{window}"] = within(window).mean("tapt_entropy_before")
    # For the autoscaler. Without traffic a quantile is NaN, which it cannot use; report 0 instead.
    pods = Scope("2m", by=PODS)
    rules["tapt:pod_adaptation_seconds:p90_2m"] = (
        f"({pods.quantile(0.9, 'tapt_adaptation_seconds')} >= 0)"
        f" or 0 * {pods.over('sum', 'tapt_queue_depth')}"
    )
    return rules


def alert(
    name: str, expr: str, wait: str, severity: str, summary: str, description: str
) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expr,
        "for": wait,
        "labels": {"severity": severity},
        "annotations": {
            "summary": summary,
            "description": description,
            "runbook_url": f"{RUNBOOK}#{name.lower()}",
        },
    }


def budget_burns(short: str, long: str, factor: float) -> str:
    """Whether the error budget is spent `factor` times as fast as it may be, over a long window and
    still over a short one."""
    limit = f"{factor * (1 - AVAILABILITY):g}"
    return (
        f"tapt:requests:failed_share{short} > {limit}"
        f" and tapt:requests:failed_share{long} > {limit}"
    )


def alerts(namespace: str) -> list[dict[str, Any]]:
    """The alerts. `namespace` is that of the deployment whose series must never be absent."""
    return [
        alert(
            "TaptNoReadyReplica",
            f"{within('').over('sum', 'tapt_ready')} == 0"
            f' or absent(tapt_ready{{namespace="{namespace}"}})',
            "1m",
            "critical",
            "No replica is ready. Every classification is refused.",
            "All replicas lack a worker or a decoder, or are stopping, or none is scraped.",
        ),
        alert(
            "TaptUnreadyReplica",
            # A replica that ends and starts again is not scraped meanwhile, on Kubernetes for up to
            # 5 minutes.
            "max_over_time(tapt_ready[6m]) == 0",
            "10m",
            "warning",
            "A replica has not been ready for 10 minutes.",
            "{{ $labels.instance }} has no worker or no decoder.",
        ),
        alert(
            "TaptErrorBudgetBurns",
            budget_burns("5m", "1h", 14.4),
            "2m",
            "critical",
            "Classifications fail fast enough to spend a month's error budget in two days.",
            "{{ $value | humanizePercentage }} of the classifications end with 5xx, or with 429 "
            "for lack of capacity.",
        ),
        alert(
            "TaptErrorBudgetBurnsSlowly",
            budget_burns("30m", "6h", 6),
            "15m",
            "critical",
            "Classifications fail fast enough to spend a month's error budget in five days.",
            "{{ $value | humanizePercentage }} of the classifications end with 5xx, or with 429 "
            "for lack of capacity.",
        ),
        alert(
            "TaptSlow",
            f"tapt:requests:slow_share5m > {SLOW:g}",
            "10m",
            "warning",
            f"More than {SLOW:.0%} of the answers take longer than TAPT_LATENCY_OBJECTIVE_MS.",
            "{{ $value | humanizePercentage }} do.",
        ),
        alert(
            "TaptRejecting",
            "tapt:requests:refused_share5m > 0.05",
            "5m",
            "warning",
            "More than 5% of the classifications are refused.",
            "{{ $value | humanizePercentage }} are refused: the queue is full, or no worker or "
            "decoder is ready.",
        ),
        alert(
            "TaptKeyFileStale",
            f"{within('').over('min', 'tapt_key_file_ok')} == 0",
            "5m",
            "warning",
            "The key file cannot be read.",
            "Key changes are not applied, and a restart will fail.",
        ),
        alert(
            "TaptWorkerRestarts",
            f"{within('15m').increase('tapt_worker_restarts_total')} > 2",
            "0m",
            "warning",
            "Workers were lost more than twice in 15 minutes.",
            "After each loss the model is loaded again and the batch is retried.",
        ),
        alert(
            "TaptSuspectedAttackSurge",
            f"tapt:answers:suspected_share15m > {4 * FALSE_POSITIVES:g}"
            " and tapt:answers:suspected_share15m > 2 * tapt:answers:suspected_share1d",
            "5m",
            "warning",
            "Far more answers than usual exceed the suspicion threshold.",
            f"{{{{ $value | humanizePercentage }}}} of the answers exceed a threshold with a "
            f"false positive rate of {FALSE_POSITIVES:.0%}.",
        ),
        alert(
            "TaptEntropyDrift",
            "abs(tapt:entropy_before:mean30m - tapt:entropy_before:mean1d)"
            " > 0.5 * tapt:entropy_before:mean1d",
            "30m",
            "warning",
            "The images or labels differ from those of the last day.",
            "The mean entropy before adapting differs by {{ $value | humanize }} nats from its "
            "daily mean.",
        ),
    ]


def groups(namespace: str) -> list[dict[str, Any]]:
    """The rule groups, as in Prometheus' files and in a PrometheusRule."""
    recorded = [{"record": name, "expr": expr} for name, expr in recordings().items()]
    return [
        {"name": "tapt-recordings", "rules": recorded},
        {"name": "tapt", "rules": alerts(namespace)},
    ]
