"""`serve` as a process of its own, before a fake worker or a real one that has no model.

python fake_server.py KIND [--KNOB VALUE ...]; KIND is `slow` (a fake worker, 50 ms a request) or
the name of a runner in fake_worker.py.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).resolve()


class Service:
    """The process from outside. Its standard error is given back by `close`."""

    def __init__(self, kind: str, *, limit: str = "", stderr: Any = subprocess.PIPE, **knobs: Any):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in knobs.items()]
        command = [sys.executable, str(HERE), kind, *flags]
        if limit:
            command = ["sh", "-c", f'{limit}; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=HERE.parent.parent
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("listening on "):
            self.process.kill()
            raise AssertionError(self.process.communicate())
        self.url = line.split()[-1]
        self.port = int(self.url.rpartition(":")[2])
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def close(self) -> str:
        self.http.close()
        self.process.kill()
        return self.process.communicate()[1] or ""

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def main() -> int:
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
    import fake_worker

    from service.server import serve
    from service.settings import Settings
    from service.worker.supervisor import WorkerProcess

    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    options, rest = parser.parse_known_args()
    pairs = (flag.removeprefix("--").partition("=") for flag in rest)
    knobs: dict[str, Any] = {name.replace("-", "_"): value for name, _, value in pairs}
    settings = Settings(**{"port": 0} | knobs)
    if options.kind == "slow":
        return serve(settings, fake_worker.FakeWorker(seconds=lambda batch: 0.05 * len(batch)))
    runner = f"fake_worker:{options.kind}"
    return serve(settings, WorkerProcess(settings, 0, runner=runner, silence=3.0, backoff=0.005))


if __name__ == "__main__":
    sys.exit(main())
