"""The service with a real Prometheus that scrapes it, on this machine."""

import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

RULES = Path(__file__).parent.parent / "docker" / "prometheus" / "rules.yml"
PROMETHEUS = shutil.which("prometheus")
INTERVAL = "1s"
PATIENCE = 60.0  # seconds that either of the two may take to start


@dataclass(frozen=True, slots=True)
class Watched:
    """Where the two listen; `pid` is the service's."""

    service: str
    prometheus: str
    pid: int

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data of Prometheus' answer."""
        answer = httpx.get(f"{self.prometheus}/api/v1/{path}", params=parameters, timeout=30)
        if answer.status_code != 200:
            raise ValueError(answer.json()["error"])
        return answer.json()["data"]

    def range(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The series of a query, each with its `metric` and its `values`."""
        found = self.ask("query_range", query=expr, start=start, end=end, step=step)["result"]
        return list(found)


@contextmanager
def watch(*flags: str) -> Iterator[Watched]:
    """Both running, the service with these flags, scraped and its rules evaluated each second."""
    assert PROMETHEUS, "prometheus is not installed"
    with tempfile.TemporaryDirectory() as folder, _serve(flags) as (service, pid):
        port = _free_port()
        configuration = {
            "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {
                    "job_name": "tapt-serve",
                    "static_configs": [{"targets": [service.removeprefix("http://")]}],
                }
            ],
        }
        file = Path(folder) / "prometheus.yml"
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
                yield Watched(service, url, pid)
            finally:
                process.terminate()


@contextmanager
def _serve(flags: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise RuntimeError("the service did not start")
            yield found.group(), process.pid
        finally:
            process.terminate()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
