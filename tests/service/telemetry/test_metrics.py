"""The metrics' page."""

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from service.telemetry.metrics import DIAGNOSTICS, table
from tests.conftest import Server

DOCUMENT = Path(__file__).parents[3] / "docs/metrics.md"


def test_the_page_is_current() -> None:
    assert DOCUMENT.read_text() == table(), "python -m service.telemetry.metrics > docs/metrics.md"


def test_the_page_lists_every_metric_of_the_service(server: Server) -> None:
    rows = [line.split("`") for line in table().splitlines() if line.startswith("| `")]
    listed = {row[1] for row in rows}
    exposed = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(server.http.get("/metrics").text)
        if family.name.startswith("tapt_") and not family.name.endswith("_created")
    }
    assert listed == exposed
    scoped = {row[1] for row in rows if "diagnostics" in row}
    assert {name.removeprefix("tapt_").removesuffix("_total") for name in scoped} == DIAGNOSTICS
    assert "| `tapt_requests_total` | counter | `route`, `code` |  |" in table()
