"""Send expensive files to a running service, and watch what they do to everybody else.

Three promises hold for each file, also for several copies of it at once: `/livez` answers within a
second meanwhile, each file is answered within four, and all processes of the service together grow
by less than 600 MB.
"""

import http.client
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

MAX_LIVEZ = 1.0  # seconds
MAX_ANSWER = 4.0  # seconds
MAX_GROWTH = 600.0  # MB, of all processes together
ANSWERS = {200, 400, 413, 415, 422}
BUSY = 429  # for some of several files at once
INTERVAL = 0.02  # seconds between two looks
BOUNDARY = b"bomb"


@dataclass(slots=True)
class Effect:
    """The worst that was seen while one file was answered: seconds, and MB above the memory of the
    service before the first file."""

    name: str
    status: int = 0
    answer: float = 0.0
    livez: float = 0.0
    growth: float = 0.0

    def broken(self) -> list[str]:
        """A sentence for each promise that did not hold."""
        found = []
        if self.status not in ANSWERS:
            found.append(f"{self.name}: answered {self.status}")
        if self.answer > MAX_ANSWER:
            found.append(f"{self.name}: answered after {self.answer:.1f} s")
        if self.livez > MAX_LIVEZ:
            found.append(f"{self.name}: /livez answered after {self.livez:.1f} s")
        if self.growth > MAX_GROWTH:
            found.append(f"{self.name}: {self.growth:.0f} MB")
        return found


@dataclass(slots=True)
class Summary:
    """The effects of many files."""

    statuses: Counter[int] = field(default_factory=Counter)
    worst: Effect = field(default_factory=lambda: Effect("worst"))
    broken: list[str] = field(default_factory=list)

    def add(self, effect: Effect) -> None:
        self.statuses[effect.status] += 1
        for name in ("answer", "livez", "growth"):
            setattr(self.worst, name, max(getattr(self.worst, name), getattr(effect, name)))
        self.broken += effect.broken()


class Target:
    """A running service, by its address and the pid of its API process."""

    def __init__(self, url: str, pid: int) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._pid = pid
        self._before = resident(pid)

    def strike(self, name: str, file: bytes, copies: int = 1) -> Effect:
        """Send a file to be classified, or several copies of it at once. The effect's status is
        that of the first answer, or one that should not be, and its time that of the last."""
        effect = Effect(name)
        with self._watched(effect), ThreadPoolExecutor(copies) as clients:
            began = time.monotonic()
            asked = [
                clients.submit(self._ask, "POST", "/v1/classify", form(file)) for _ in range(copies)
            ]
            statuses = [each.result() for each in asked]
            effect.answer = time.monotonic() - began
        expected = ANSWERS | {BUSY} if copies > 1 else ANSWERS
        wrong = [status for status in statuses if status not in expected]
        right = [status for status in statuses if status in ANSWERS]
        effect.status = (wrong or right or statuses)[0]
        return effect

    @contextmanager
    def _watched(self, effect: Effect) -> Iterator[None]:
        over = threading.Event()
        watchers = [
            threading.Thread(target=watch, args=(effect, over))
            for watch in (self._watch_livez, self._watch_memory)
        ]
        for watcher in watchers:
            watcher.start()
        try:
            yield
        finally:
            over.set()
            for watcher in watchers:
                watcher.join()

    def _watch_livez(self, effect: Effect, over: threading.Event) -> None:
        while True:
            began = time.monotonic()
            status = self._ask("GET", "/livez")
            seconds = time.monotonic() - began
            effect.livez = max(effect.livez, seconds if status == 200 else float("inf"))
            if over.wait(INTERVAL):
                return

    def _watch_memory(self, effect: Effect, over: threading.Event) -> None:
        while True:
            effect.growth = max(effect.growth, resident(self._pid) - self._before)
            if over.wait(INTERVAL):
                return

    def _ask(self, method: str, path: str, body: bytes | None = None) -> int:
        """The status, 0 where there is no answer."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=60)
        kind = f"multipart/form-data; boundary={BOUNDARY.decode()}"
        try:
            connection.request(method, path, body, {"Content-Type": kind} if body else {})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        except OSError:
            return 0
        finally:
            connection.close()


def form(file: bytes) -> bytes:
    """A request to classify a file, cheaply."""
    fields = {b"labels": b"cat,dog", b"method": b"plain"}
    parts = [
        b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (BOUNDARY, *field)
        for field in fields.items()
    ]
    head = b'--%b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' % BOUNDARY
    return b"".join(parts) + head + file + b"\r\n--%b--\r\n" % BOUNDARY


def resident(pid: int) -> float:
    """MB of a process and of all below it, what they share counted for each."""
    total, pending = 0.0, [pid]
    while pending:
        process = Path(f"/proc/{pending.pop()}")
        try:
            pages = int((process / "statm").read_text().split()[1])
            children = [(task / "children").read_text() for task in (process / "task").iterdir()]
        except OSError:  # it has just ended
            continue
        total += pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        pending += [int(child) for text in children for child in text.split()]
    return total
