"""Dashboard and rules: current, about metrics that exist, and tried on a real Prometheus."""

import json
import math
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.harness.prometheus import PROMETHEUS, RULES, Prometheus, scrape
from benchmarks.harness.server import Server
from k8s.monitoring import rules
from k8s.monitoring.__main__ import COMPOSE, NAMESPACE, ROOT, files
from k8s.monitoring.panels import ROWS, fill
from service.settings import Settings
from tests.exposed_series import exposed
from tests.real_server import COFFEE, LABELS

PROMTOOL = shutil.which("promtool")
QUERIES = {
    f"{panel.title}: {query.legend}": fill(query.expr, "30s")
    for panels in ROWS.values()
    for panel in panels
    for query in panel.queries
}
ALERTS = {alert["alert"]: alert for alert in rules.alerts(COMPOSE)}
SERIES = re.compile(r"\btapt[_:][a-zA-Z0-9_:]+")


# Without Prometheus.


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_generated_files_are_current(path: Path) -> None:
    assert path.read_text() == files()[path], "run `python -m k8s.monitoring`"


def test_every_series_named_anywhere_exists() -> None:
    known = exposed()
    alerts = {name: alert["expr"] for name, alert in ALERTS.items()}
    for name, expr in {**QUERIES, **rules.recordings(), **alerts}.items():
        assert set(SERIES.findall(expr)), name
        assert set(SERIES.findall(expr)) <= known, name
    told = (ROOT / "docs/runbook.md").read_text()
    assert set(SERIES.findall(told)) - {"tapt_serve"} <= known


def test_the_dashboard_shows_what_was_promised() -> None:
    board = json.loads((ROOT / "docker/grafana/dashboards/tapt-serve.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    shown = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    for metric in (
        *("adaptation_seconds", "queue_depth", "batch_size", "requests_total", "entropy_before"),
        *("entropy_after", "view_agreement", "suspected_adversarial_total", "label_changed_total"),
        *("worker_restarts_total", "device_memory_bytes", "text_cache_hits_total", "worker_up"),
        *("ready", "decoders_up", "key_file_ok"),
    ):
        assert f"tapt_{metric}" in shown
    assert {panel["type"] for panel in panels} == {"stat", "timeseries", "heatmap"}
    # No two panels on one spot, none beyond the 24 columns.
    cells = [
        (x, y)
        for panel in board["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23


def test_alerts_lead_into_the_runbook() -> None:
    text = (ROOT / "docs/runbook.md").read_text()
    anchors = {heading.lower() for heading in re.findall(r"^## (\S+)$", text, re.M)}
    links = {alert["annotations"]["runbook_url"] for alert in ALERTS.values()}
    assert links == {f"docs/runbook.md#{anchor}" for anchor in anchors}
    assert set(re.findall(r"\(#(\w+)\)", text)) <= anchors
    settings = {name.lower().removeprefix("tapt_") for name in re.findall(r"TAPT_[A-Z_]+", text)}
    assert settings <= set(Settings.model_fields)


def test_every_recorded_series_is_used() -> None:
    adapter = (ROOT / "k8s/components/hpa/adapter-values.yaml").read_text()
    used = " ".join([*(alert["expr"] for alert in ALERTS.values()), *QUERIES.values(), adapter])
    assert set(rules.recordings()) <= set(SERIES.findall(used))


def test_what_may_not_be_absent_is_in_the_namespace_of_the_deployment() -> None:
    """Or staging, scraped by the same Prometheus, would hide that production is not."""
    overlay = yaml.safe_load((ROOT / "k8s/overlays/cpu/kustomization.yaml").read_text())
    assert overlay["namespace"] == NAMESPACE
    (job,) = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())[
        "scrape_configs"
    ]
    assert job["static_configs"][0]["labels"]["namespace"] == COMPOSE
    for path, namespace in (
        ("k8s/components/monitoring/prometheus-rule.yaml", NAMESPACE),
        ("docker/prometheus/rules.yml", COMPOSE),
    ):
        named = re.findall(r'absent\(tapt_ready\{namespace="(.*?)"\}\)', files()[ROOT / path])
        assert named == [namespace]
    elsewhere = files("staging")[ROOT / "k8s/components/monitoring/prometheus-rule.yaml"]
    assert 'absent(tapt_ready{namespace="staging"})' in elsewhere


# With promtool.


def series(selector: str, values: str) -> dict[str, str]:
    return {"series": selector, "values": values}


def requests(ok: str, failed: str) -> list[dict[str, str]]:
    return [
        series('tapt_requests_total{namespace="a",route="/v1/classify",code="200"}', ok),
        series('tapt_requests_total{namespace="a",route="/",code="503"}', failed),
    ]


def times(slow: str, all: str) -> list[dict[str, str]]:
    return [
        series('tapt_slow_requests_total{namespace="a"}', slow),
        series('tapt_request_seconds_count{namespace="a",method="tapt"}', all),
    ]


def entropy(sums: str, counts: str) -> list[dict[str, str]]:
    return [
        series('tapt_entropy_before_sum{namespace="a"}', sums),
        series('tapt_entropy_before_count{namespace="a"}', counts),
    ]


def suspected(part: str, whole: str) -> list[dict[str, str]]:
    return [
        series('tapt_suspected_adversarial_total{namespace="a"}', part),
        series('tapt_view_agreement_count{namespace="a"}', whole),
    ]


def refused(
    reason: str, values: str, ok: str = "0+100x90", failed: str = "0+0x90"
) -> list[dict[str, str]]:
    return [
        *requests(ok, failed),
        series('tapt_requests_total{namespace="a",route="/v1/classify",code="429"}', values),
        series(f'tapt_rejected_total{{namespace="a",reason="{reason}"}}', values),
    ]


def late(values: str) -> list[dict[str, str]]:
    """Requests that end at a deadline of their own."""
    return [
        series('tapt_requests_total{namespace="a",route="/v1/classify",code="504"}', values),
        series('tapt_rejected_total{namespace="a",reason="client_deadline"}', values),
    ]


def without_key(values: str) -> list[dict[str, str]]:
    """Requests that anyone can send."""
    return [series('tapt_requests_total{namespace="a",route="/v1/classify",code="401"}', values)]


def replicas(first: str, second: str) -> list[dict[str, str]]:
    return [
        series('tapt_ready{namespace="a",pod="1"}', first),
        series('tapt_ready{namespace="a",pod="2"}', second),
    ]


def key_file(values: str) -> list[dict[str, str]]:
    return [
        series('tapt_key_file_ok{namespace="a",pod="1"}', values),
        series('tapt_key_file_ok{namespace="a",pod="2"}', "1x20"),
    ]


def restarts(values: str) -> list[dict[str, str]]:
    return [series('tapt_worker_restarts_total{namespace="a"}', values)]


# Alert, what happens (a value a minute), when to look, and whether it fires by then.
CASES: dict[str, tuple[str, list[dict[str, str]], str, bool]] = {
    "no replica ready": ("TaptNoReadyReplica", replicas("1 0x20", "1 0x20"), "10m", True),
    "one of two ready": ("TaptNoReadyReplica", replicas("1 0x20", "1x20"), "10m", False),
    "only another namespace scraped": ("TaptNoReadyReplica", replicas("1x20", "1x20"), "10m", True),
    "one stays unready": ("TaptUnreadyReplica", replicas("1 0x25", "1x25"), "20m", True),
    "one ends again and again": (
        "TaptUnreadyReplica",
        replicas("1 0 0 stale _x3 0 0 stale _x3 0 0 stale _x3 0 0 stale", "1x25"),
        "20m",
        True,
    ),
    "one was loading": ("TaptUnreadyReplica", replicas("0x6 1x20", "1x20"), "15m", False),
    "a tenth fails": ("TaptErrorBudgetBurns", requests("0+90x90", "0+10x90"), "80m", True),
    "one in twenty fails": ("TaptErrorBudgetBurns", requests("0+95x90", "0+5x90"), "80m", False),
    "a tenth fails in a flood without keys": (
        "TaptErrorBudgetBurns",
        [*requests("0+90x90", "0+10x90"), *without_key("0+1000x90")],
        "80m",
        True,
    ),
    "nothing but a flood without keys": (
        "TaptErrorBudgetBurns",
        [*requests("0x90", "0x90"), *without_key("0+1000x90")],
        "80m",
        False,
    ),
    "a twentieth fails for hours": (
        "TaptErrorBudgetBurnsSlowly",
        requests("0+95x90", "0+5x90"),
        "80m",
        True,
    ),
    "a fiftieth fails for hours": (
        "TaptErrorBudgetBurnsSlowly",
        requests("0+98x90", "0+2x90"),
        "80m",
        False,
    ),
    "a tenth failed a while ago": (
        "TaptErrorBudgetBurns",
        requests("0+90x90", "0+10x60 600x30"),
        "80m",
        False,
    ),
    "none has failed ever": ("TaptErrorBudgetBurns", requests("0+9x90", "_x90"), "80m", False),
    "no room for a tenth": ("TaptErrorBudgetBurns", refused("queue_full", "0+12x90"), "80m", True),
    "one key is over its limit": (
        "TaptErrorBudgetBurns",
        refused("key_rate", "0+90x90"),
        "80m",
        False,
    ),
    "a tenth fails beside it": (
        "TaptErrorBudgetBurns",
        refused("key_rate", "0+90x90", "0+90x90", "0+10x90"),
        "80m",
        True,
    ),
    "a client's own deadlines pass": (
        "TaptErrorBudgetBurns",
        [*requests("0+90x90", "0x90"), *late("0+10x90")],
        "80m",
        False,
    ),
    "none but those": (
        "TaptErrorBudgetBurns",
        [*requests("0x90", "0x90"), *late("0+10x90")],
        "80m",
        False,
    ),
    "a tenth fails beside those": (
        "TaptErrorBudgetBurns",
        [*requests("0+90x90", "0+10x90"), *late("0+1000x90")],
        "80m",
        True,
    ),
    "the queue is full beside those": (
        "TaptRejecting",
        [*refused("queue_full", "0+10x60"), *late("0+1000x60")],
        "30m",
        True,
    ),
    "slow": ("TaptSlow", times("0+5x60", "0+100x60"), "40m", True),
    "fast": ("TaptSlow", times("0+1x60", "0+100x60"), "40m", False),
    "the queue is full": ("TaptRejecting", refused("queue_full", "0+10x60"), "30m", True),
    "the queue is full in a flood without keys": (
        "TaptRejecting",
        [*refused("queue_full", "0+10x60"), *without_key("0+1000x60")],
        "30m",
        True,
    ),
    "no decoder starts": (
        "TaptRejecting",
        [
            *requests("0+90x60", "0+10x60"),
            series('tapt_rejected_total{namespace="a",reason="no_decoder"}', "0+10x60"),
        ],
        "30m",
        True,
    ),
    "clients get it wrong": ("TaptRejecting", refused("unprocessable", "0+50x60"), "30m", False),
    "a malformed key file": ("TaptKeyFileStale", key_file("1 0x20"), "10m", True),
    "a corrected key file": ("TaptKeyFileStale", key_file("1 0x3 1x20"), "10m", False),
    "four restarts": ("TaptWorkerRestarts", restarts("0 1 2 3 4x20"), "12m", True),
    "one restart": ("TaptWorkerRestarts", restarts("0 1x30"), "12m", False),
    "a surge": (
        "TaptSuspectedAttackSurge",
        suspected("0+5x60 300+60x20", "0+100x80"),
        "80m",
        True,
    ),
    "false positives": (
        "TaptSuspectedAttackSurge",
        suspected("0+5x80", "0+100x80"),
        "80m",
        False,
    ),
    "always that much": (
        "TaptSuspectedAttackSurge",
        suspected("0+30x80", "0+100x80"),
        "80m",
        False,
    ),
    "other pictures": (
        "TaptEntropyDrift",
        entropy("0+100x120 12000+300x80", "0+100x200"),
        "200m",
        True,
    ),
    "the same pictures": ("TaptEntropyDrift", entropy("0+100x200", "0+100x200"), "200m", False),
}


ABSENT = "only another namespace scraped"


def write_cases(names: list[str]) -> dict[str, Any]:
    """Cases as one test of promtool's, a namespace each, so that they pass its slow set-up once.

    Its own tests of alerts compare all annotations; a query of ALERTS asks no more than whether.
    """
    given, asked = [], []
    for number, name in enumerate(names):
        alert, inputs, when, fires = CASES[name]
        own = f'namespace="{number}"'
        given += [
            {**each, "series": each["series"].replace('namespace="a"', own)} for each in inputs
        ]
        where = f'namespace="{COMPOSE}"' if name == ABSENT else own
        expr = f'count(ALERTS{{alertname="{alert}",alertstate="firing",{where}}}) or vector(0)'
        expected = [{"labels": "{}", "value": int(fires)}]
        asked.append({"expr": expr, "eval_time": when, "exp_samples": expected})
    return {"interval": "1m", "input_series": given, "promql_expr_test": asked}


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    if not PROMTOOL:
        pytest.skip("promtool (Debian's prometheus) is not installed, so no alert was tried")
    assert {alert for alert, _, _, fires in CASES.values() if fires} == ALERTS.keys()
    tests = [write_cases(list(CASES))]
    file = tmp_path / "cases.yml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests})
    )
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(file)]):
        done = subprocess.run([PROMTOOL, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# With Prometheus.


def bother(server: Server) -> None:
    """A little of everything that a metric counts."""
    form = {"labels": json.dumps(LABELS)}
    asked = [
        *({**form, "defense": json.dumps({"method": method})} for method in ("tapt", "plain")),
        {**form, "defense": json.dumps({"method": "ensemble"})},
        {"labels": json.dumps(["word " * 50, "dog"])},  # more than the model's context
        {"labels": "dog"},  # too few
    ]

    def ask(fields: dict[str, str]) -> None:
        server.http.post("/v1/classify", data=fields, files={"image": COFFEE}, timeout=90)

    with ThreadPoolExecutor(len(asked)) as pool:
        list(pool.map(ask, asked))


def finite(prometheus: Prometheus, expr: str, since: float) -> bool:
    """Whether a query found a number at some instant."""
    found = prometheus.range(expr, since, time.time(), 1)
    return any(math.isfinite(float(value)) for one in found for _, value in one["values"])


@pytest.mark.timeout(400)  # for a machine that has other things to do
@pytest.mark.skipif(not PROMETHEUS, reason="prometheus is not installed, so no query was tried")
def test_every_query_finds_data_while_the_service_is_used() -> None:
    alerts = " ".join(alert["expr"] for alert in ALERTS.values())
    wanted = {**QUERIES, **{name: name for name in rules.recordings()}}
    wanted |= {name: name for name in SERIES.findall(alerts)}
    with Server("--max-queue-size", "2") as server, scrape(server.url) as prometheus:
        began, limit = time.time(), time.monotonic() + 240
        while missing := {n for n, expr in wanted.items() if not finite(prometheus, expr, began)}:
            assert time.monotonic() < limit, f"no data: {sorted(missing)}"
            bother(server)
        told = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
        assert {rule["health"] for rule in told} == {"ok"}
        assert len(told) == len(rules.recordings()) + len(ALERTS)
        # What the autoscalers ask, with their adapter's blanks filled in.
        values = yaml.safe_load((ROOT / "k8s/components/hpa/adapter-values.yaml").read_text())
        for rule in values["rules"]["custom"]:
            blanks = {"<<.Series>>": rule["seriesQuery"], "<<.LabelMatchers>>": ""}
            expr = rule["metricsQuery"].replace("<<.GroupBy>>", "instance")
            for blank, filling in blanks.items():
                expr = expr.replace(blank, filling)
            assert finite(prometheus, expr, began), expr
