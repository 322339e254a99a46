"""python tests/replica.py NAME SECONDS [FLAG...]: a replica without a model.

It is the service as it is started, but for its worker, which answers each batch after SECONDS
under the model name NAME.
"""

import sys
from dataclasses import replace

from fake_worker import READY, FakeWorker

from service.cli import _parser, _settings
from service.server import serve

if __name__ == "__main__":
    name, seconds = sys.argv[1], float(sys.argv[2])
    worker = FakeWorker(
        seconds=lambda batch: seconds, ready=replace(READY, info={"model": {"name": name}})
    )
    settings = _settings(_parser().parse_args(["serve", *sys.argv[3:]]))
    sys.exit(serve(settings, worker))
