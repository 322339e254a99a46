"""A real Prometheus on this machine that scrapes a server."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.harness.report import ROOT
from benchmarks.harness.server import free_port

RULES = ROOT / "docker" / "prometheus" / "rules.yml"
PROMETHEUS = shutil.which("prometheus")
INTERVAL = "1s"
PATIENCE = 60.0  # seconds to start


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A Prometheus that listens at `url`."""

    url: str

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data of an answer of its API. Raises ValueError if it refuses the question."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        if answer.status_code != 200:
            raise ValueError(answer.json()["error"])
        return answer.json()["data"]

    def range(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The series of a query, each with its `metric` and its `values`."""
        found = self.ask("query_range", query=expr, start=start, end=end, step=step)["result"]
        return list(found)


@contextmanager
def scrape(service: str) -> Iterator[Prometheus]:
    """Prometheus while it scrapes the service at this address and evaluates its rules, each every
    second."""
    assert PROMETHEUS, "prometheus is not installed"
    targets = [{"targets": [service.removeprefix("http://")]}]
    configuration = {
        "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "tapt-serve", "static_configs": targets}],
    }
    with tempfile.TemporaryDirectory() as folder:
        file, port = Path(folder) / "prometheus.yml", free_port()
        file.write_text(yaml.safe_dump(configuration))
        command = [
            PROMETHEUS,
            f"--config.file={file}",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
        with subprocess.Popen(command) as process:
            try:
                url = f"http://127.0.0.1:{port}"
                _wait_for(f"{url}/-/ready")
                yield Prometheus(url)
            finally:
                process.terminate()


def _wait_for(url: str) -> None:
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"{url} did not answer in {PATIENCE:g} s")
