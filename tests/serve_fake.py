"""Serve without a model: python serve_fake.py KIND [--KNOB VALUE ...].

KIND is a runner in fake_worker.py, `slow` (a fake worker that takes 50 ms a request) or
NAME:SECONDS (one that takes so long for every batch, and whose model has that name).
"""

import sys
from dataclasses import replace
from pathlib import Path


def main() -> int:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from benchmarks.harness.server import read_knobs
    from service.server import serve
    from service.worker.supervisor import WorkerProcess
    from tests.fake_worker import READY, FakeWorker

    kind, *flags = sys.argv[1:]
    settings = read_knobs(flags)
    if kind == "slow":
        return serve(settings, FakeWorker(seconds=lambda batch: 0.05 * len(batch)))
    if ":" in kind:
        name, _, seconds = kind.partition(":")
        ready = replace(READY, info={"model": {"name": name}})
        return serve(settings, FakeWorker(seconds=lambda batch: float(seconds), ready=ready))
    runner = f"tests.fake_worker:{kind}"
    return serve(settings, WorkerProcess(settings, 0, runner=runner, silence=3.0, backoff=0.005))


if __name__ == "__main__":
    sys.exit(main())
