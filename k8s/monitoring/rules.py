"""Recording rules and alerts, the same for Prometheus' own files and for its operator.

The objectives: 99.5% of the classifications are answered (neither 5xx nor, for want of room, 429),
and 99% of them within `TARGET_SECONDS`, which must be a bucket of `tapt_request_seconds`.
"""

from typing import Any

from k8s.monitoring.queries import Scope

TARGET_SECONDS = 3.0
AVAILABILITY = 0.995
FALSE_POSITIVES = 0.05  # of the suspicion's threshold, as `tapt-serve calibrate` sets it by default
RUNBOOK = "docs/runbook.md"

CLASSIFICATIONS = 'route=~"/v1/classify|/"'
FAILED = f'{CLASSIFICATIONS},code=~"5.."'
FULL = 'reason=~"queue_full|uploads|fetches"'  # what of the 429s is the service's doing
REFUSED = 'reason=~"queue_full|uploads|fetches|not_ready|draining"'  # no client's own doing

PODS = ("namespace", "pod")


def within(window: str) -> Scope:
    """One series a deployment; where there are no namespaces, one at all."""
    return Scope(window, by=("namespace",))


def failed_share(scope: Scope) -> str:
    """Of the classifications that no key's own limit refused, those that the service failed: a
    key that floods neither spends the budget nor hides what fails for the others."""
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
        slow = here.rate("tapt_request_seconds_bucket", where=f'le="{TARGET_SECONDS}"')
        rules[f"tapt:requests:slow_share{window}"] = (
            f"1 - {slow} / {here.rate('tapt_request_seconds_count')}"
        )
    rules["tapt:request_seconds:p99_5m"] = within("5m").quantile(0.99, "tapt_request_seconds")
    rules["tapt:requests:refused_share5m"] = within("5m").share(
        "tapt_rejected_total", "tapt_requests_total", REFUSED, CLASSIFICATIONS
    )
    for window in ("15m", "1d"):
        rules[f"tapt:answers:suspected_share{window}"] = within(window).share(
            "tapt_suspected_adversarial_total", "tapt_view_agreement_count"
        )
    for window in ("30m", "1d"):
        rules[f"tapt:entropy_before:mean{window}"] = within(window).mean("tapt_entropy_before")
    # What replicas are added by. Without traffic a quantile is NaN, which says nothing to an
    # autoscaler; 0 says that nobody waits.
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
            "No worker is ready, every classification is refused.",
            "All workers are loading, recovering or given up, or nothing is scraped.",
        ),
        alert(
            "TaptErrorBudgetBurns",
            f"tapt:requests:failed_share5m > {14.4 * budget:g}"
            f" and tapt:requests:failed_share1h > {14.4 * budget:g}",
            "2m",
            "critical",
            "Classifications fail fast enough to spend a month's error budget in two days.",
            "{{ $value | humanizePercentage }} of the classifications end with 5xx or, for want of "
            "room, with 429.",
        ),
        alert(
            "TaptSlow",
            f"tapt:request_seconds:p99_5m > {TARGET_SECONDS:g}",
            "10m",
            "warning",
            f"The p99 of the time to answer is over its target of {TARGET_SECONDS:g} s.",
            "It stands at {{ $value | humanizeDuration }}.",
        ),
        alert(
            "TaptRejecting",
            "tapt:requests:refused_share5m > 0.05",
            "5m",
            "warning",
            "More than 5% of the classifications are refused at the door.",
            "{{ $value | humanizePercentage }} are refused: the queue is full, or nothing is "
            "ready.",
        ),
        alert(
            "TaptWorkerRestarts",
            f"{within('15m').increase('tapt_worker_restarts_total')} > 2",
            "0m",
            "warning",
            "Workers were lost more than twice in 15 minutes.",
            "Each loss costs a model load, and its batch a second try.",
        ),
        alert(
            "TaptSuspectedAttackSurge",
            f"tapt:answers:suspected_share15m > {4 * FALSE_POSITIVES:g}"
            " and tapt:answers:suspected_share15m > 2 * tapt:answers:suspected_share1d",
            "5m",
            "warning",
            "Far more answers than usual look attacked.",
            f"{{{{ $value | humanizePercentage }}}} of the answers passed a threshold whose "
            f"false positive rate is {FALSE_POSITIVES:.0%}.",
        ),
        alert(
            "TaptEntropyDrift",
            "abs(tapt:entropy_before:mean30m - tapt:entropy_before:mean1d)"
            " > 0.5 * tapt:entropy_before:mean1d",
            "30m",
            "warning",
            "The images or labels that arrive are not those of the last day.",
            "The mean entropy before adapting is {{ $value | humanize }} nats from its daily mean.",
        ),
    ]


def groups() -> list[dict[str, Any]]:
    """As Prometheus and the operator's PrometheusRule take them."""
    recorded = [{"record": name, "expr": expr} for name, expr in recordings().items()]
    return [{"name": "tapt-recordings", "rules": recorded}, {"name": "tapt", "rules": alerts()}]
