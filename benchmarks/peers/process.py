"""A peer's server as a tree of processes: its start and end, processor time and memory."""

import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

import httpx
import psutil

from benchmarks.harness.report import ROOT
from benchmarks.harness.requests import draw_file
from benchmarks.harness.server import free_port
from benchmarks.peers.environment import last_error
from benchmarks.peers.peer import Model, Peer, PeerError

START_SECONDS = 180.0
STOP_SECONDS = 30.0
SAMPLE_SECONDS = 0.5  # between looks at the memory
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}


class PeerServer:
    """A peer that serves a model; ready once it has answered a request.

    `url` is its address. As a context manager it stops on exit, with all its processes.

    Raises:
        PeerError: it ended, or did not answer within `START_SECONDS`.
    """

    def __init__(self, peer: Peer, python: Path, model: Model) -> None:
        self.peer, port = peer, free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.peak_bytes = 0
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        began = time.monotonic()
        try:
            self._process = subprocess.Popen(
                peer.command(python, model, port),
                stdout=self._log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **OFFLINE},
                start_new_session=True,
            )
        except OSError as error:
            raise PeerError(f"cannot be started: {error}") from error
        self._tree = psutil.Process(self._process.pid)
        try:
            self._wait(began)
        except PeerError:
            self._end()
            raise
        self.start_seconds = time.monotonic() - began
        self._stopping = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def _wait(self, began: float) -> None:
        with httpx.Client(base_url=self.url, timeout=START_SECONDS) as http:
            while time.monotonic() - began < START_SECONDS:
                if self._process.poll() is not None:
                    self._log.seek(0)
                    raise PeerError(f"cannot be started: {last_error(self._log.read())}")
                try:
                    answer = http.post(self.peer.path, json=self.peer.body(draw_file(0)))
                except httpx.ConnectError:
                    pass  # it does not listen yet
                except httpx.TransportError as error:
                    raise PeerError(f"does not answer: {error!r}") from error
                else:
                    if answer.status_code == 200:
                        return
                    if answer.status_code != 503:  # of a server that is loading
                        said = last_error(answer.text)
                        raise PeerError(f"answers {answer.status_code}: {said}")
                time.sleep(0.2)
        raise PeerError(f"is not ready after {START_SECONDS:g} s")

    def processes(self) -> list[psutil.Process]:
        """All of its processes."""
        try:
            return [self._tree, *self._tree.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> float:
        """Processor time that its processes have used, ended ones that were waited for included."""
        spent = 0.0
        for process in self.processes():
            try:
                spent += sum(process.cpu_times()[:4])  # own and waited-for children's
            except psutil.Error:
                continue
        return spent

    def _sample(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stopping.wait(SAMPLE_SECONDS)
            self.peak_bytes = max(self.peak_bytes, sum(map(_proportional, self.processes())))

    def _end(self) -> None:
        for ending in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, ending)
            except ProcessLookupError:
                break
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._sampler.join()  # after its last look
        self._end()


def _proportional(process: psutil.Process) -> int:
    """Memory of a process, pages that it shares divided among those that share them."""
    try:
        pss: int = process.memory_full_info().pss
    except psutil.Error:  # it has ended meanwhile
        return 0
    return pss
