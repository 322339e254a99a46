"""The service as a process of its own, started as an operator starts it."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, Self

import httpx
import psutil

from service.settings import Settings

SERVE = (sys.executable, "-m", "service.cli", "serve")
STOP_SECONDS = 60.0  # to answer what was accepted, before the process is killed


class Server:
    """A `tapt-serve serve` process on 127.0.0.1, started and ready.

    `http` is a client of it. As a context manager it stops on exit.

    Args:
        flags: of `tapt-serve serve`.
        port: to listen on; 0 takes a free one.
        env: environment variables, in addition to those of this process.
        command: another program that takes the same flags and prints its address when it is ready.
        stderr: where its log goes; by default it is kept for `logs`.

    Raises:
        RuntimeError: it ended before it was ready; the message holds the end of its log.
    """

    def __init__(
        self,
        *flags: str,
        port: int = 0,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = SERVE,
        stderr: IO[Any] | None = None,
    ) -> None:
        self._command = [*command, *flags]
        self._environment = {**os.environ, **(env or {})}
        self._stderr = stderr
        self._start(port)

    def _start(self, port: int) -> None:
        self._log: IO[Any] = self._stderr or tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._logged = ""
        self.process = subprocess.Popen(
            [*self._command, "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self._environment,
        )
        assert self.process.stdout is not None
        found = re.search(r'http://[^\s"]+', self.process.stdout.readline())
        self.ready_at = time.monotonic()
        self.url = found.group() if found else ""
        self.http = httpx.Client(base_url=self.url, timeout=120)
        if found is None:
            self.kill()
            raise RuntimeError(f"The service did not start. {self.logs()[-2000:]}")
        self.port = int(self.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        """Of the API process."""
        return self.process.pid

    def workers(self) -> list[int]:
        """Process ids of the workers, in ascending order."""
        try:
            children = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return []
        return sorted(child.pid for child in children if "spawn_main" in " ".join(_command(child)))

    def pids(self) -> list[int]:
        """Of the API process, if it runs, and of its workers."""
        own = [self.pid] if self.process.poll() is None else []
        return own + self.workers()

    def memory(self) -> tuple[float, float]:
        """Resident MiB of the API process, and of its child processes together."""
        process = psutil.Process(self.pid)
        children = sum(_resident(child) for child in process.children())
        return _resident(process) / 2**20, children / 2**20

    def cpu_seconds(self) -> float:
        """Processor time that the API process has used, its workers' left out."""
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system

    def decoder_cpu_seconds(self) -> float:
        """Processor time that the running decoder processes have used."""
        decoders = [
            child.cpu_times()
            for child in psutil.Process(self.pid).children()
            if "service.intake.decoder" in _command(child)
        ]
        return sum(times.user + times.system for times in decoders)

    def logs(self) -> str:
        """What it wrote to standard error. Empty if `stderr` was given."""
        if not self._log.closed and self._log.readable():
            self._log.seek(0)
            self._logged = self._log.read()
        return self._logged

    def stop(self) -> str:
        """Let it answer what it accepted and exit; what it printed after its address."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self._close()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self._close()

    def _close(self) -> str:
        self.http.close()
        self.process.wait()
        stdout = self.process.stdout
        printed = stdout.read() if stdout and not stdout.closed else ""
        if stdout:
            stdout.close()
        self.logs()
        if not self._stderr:
            self._log.close()
        return printed

    def restart(self) -> None:
        """Kill the API process, and start another one at the same address."""
        self.kill()
        self._start(self.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def read_knobs(flags: Sequence[str]) -> Settings:
    """The settings of a server with these flags, `--NAME VALUE` each."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    given: dict[str, Any] = {
        flag.removeprefix("--").replace("-", "_"): value for flag, value in pairs
    }
    return Settings(**given)


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended meanwhile
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0
