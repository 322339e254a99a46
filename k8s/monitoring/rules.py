"""Recording rules and alerts, for Prometheus' own files and for its operator.

The objectives: 99.5% of the classifications succeed (end neither with 5xx nor with a 429 for lack
of capacity), and 99% take at most the service's own `latency_objective_ms`.
"""

from typing import Any

from k8s.monitoring.queries import Scope

AVAILABILITY = 0.995
SLOW = 0.01
FALSE_POSITIVES = 0.05  # of the suspicion threshold; the default of `tapt-serve calibrate`
RUNBOOK = "docs/runbook.md"

CLASSIFICATIONS = 'route=~"/v1/classify|/"'
FAILED = f'{CLASSIFICATIONS},code=~"5.."'
FULL = 'reason=~"queue_full|uploads|fetches|decoders"'  # the 429s for lack of capacity
REFUSED = 'reason=~"queue_full|uploads|fetches|decoders|not_ready|draining"'  # no key's own limits

PODS = ("namespace", "pod")


def within(window: str) -> Scope:
    """One series per deployment (namespace), or one in total without namespaces."""
    return Scope(window, by=("namespace",))


def failed_share(scope: Scope) -> str:
    """The share of failed classifications. Those refused by a key's own limits are left out, so
    that a flooding key neither spends the budget nor hides failures of other keys."""
    none = f"0 * {scope.rate('tapt_requests_total', where=CLASSIFICATIONS)}"

    def count(metric: str, where: str) -> str:
        return f"({scope.rate(metric, where=where)} or {none})"

    failed = count("tapt_requests_total", FAILED)
    full = count("tapt_rejected_total", FULL)
    rest = count("tapt_requests_total", f'{CLASSIFICATIONS},code!="429"')
    return f"({failed} + {full}) / ({rest} + {full})"


def recordings() -> dict[str, str]:
    """Recorded series and their expressions."""
    rules = {}
    for window in ("5m", "1h", "6h"):
        here = within(window)
        rules[f"tapt:requests:failed_share{window}"] = failed_share(here)
        rules[f"tapt:requests:slow_share{window}"] = here.share(
            "tapt_slow_requests_total", "tapt_request_seconds_count"
        )
    rules["tapt:requests:refused_share5m"] = within("5m").share(
        "tapt_rejected_total", "tapt_requests_total", REFUSED, CLASSIFICATIONS
    )
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


def alerts() -> list[dict[str, Any]]:
    budget = 1 - AVAILABILITY
    return [
        alert(
            "TaptNoReadyWorker",
            f"{within('').over('sum', 'tapt_worker_up')} == 0 or absent(tapt_worker_up)",
            "1m",
            "critical",
            "No worker is ready. Every classification is refused.",
            "All workers are loading, recovering or stopped for good, or no replica is scraped.",
        ),
        alert(
            "TaptErrorBudgetBurns",
            f"tapt:requests:failed_share5m > {14.4 * budget:g}"
            f" and tapt:requests:failed_share1h > {14.4 * budget:g}",
            "2m",
            "critical",
            "Classifications fail fast enough to spend a month's error budget in two days.",
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
            "{{ $value | humanizePercentage }} are refused: the queue is full, or no worker is "
            "ready.",
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


def groups() -> list[dict[str, Any]]:
    """The rule groups, as in Prometheus' files and in a PrometheusRule."""
    recorded = [{"record": name, "expr": expr} for name, expr in recordings().items()]
    return [{"name": "tapt-recordings", "rules": recorded}, {"name": "tapt", "rules": alerts()}]
