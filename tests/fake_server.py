"""`serve` as a process of its own, with a fake worker or a real one that has no model."""

import sys
from pathlib import Path
from typing import IO, Any

from benchmarks.harness.server import Server

PROGRAM = Path(__file__).with_name("serve_fake.py")


class FakeServer(Server):
    """The process, with these knobs; serve_fake.py says what a kind is.

    As a context manager it is killed on exit.

    Args:
        limit: a shell command to run first, for example `ulimit`.
        stderr: where its log goes.
    """

    def __init__(
        self,
        kind: str,
        *,
        port: int = 0,
        limit: str = "",
        stderr: IO[Any] | None = None,
        **knobs: object,
    ) -> None:
        command = fake_command(kind)
        if limit:
            command = ("sh", "-c", f'{limit}; exec "$@"', "sh", *command)
        flags = (
            part
            for name, value in knobs.items()
            for part in (f"--{name.replace('_', '-')}", str(value))
        )
        super().__init__(*flags, port=port, command=command, stderr=stderr)

    def __exit__(self, *_: object) -> None:
        self.kill()


def fake_command(kind: str) -> tuple[str, ...]:
    """The program of a kind; flags may follow."""
    return sys.executable, str(PROGRAM), kind
