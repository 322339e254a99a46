"""DNS lookups of image URLs, in threads of their own.

A lookup blocks its thread until the name servers answer, which nothing can interrupt and which can
take far longer than a fetch may. In the event loop's own threads, where `loop.getaddrinfo` runs, a
few would delay the large bodies of all callers. The threads are daemons, because Python waits for
those of a `ThreadPoolExecutor` at exit.
"""

import asyncio
import socket
import threading
from concurrent.futures import Future

from service.intake.places import Full

MAX_LOOKUPS = 32  # names at once: more than fetches, because a lookup outlives the fetch's timeout


class Lookups:
    """Finds the addresses of hosts. Fetches that need the same name at once share its lookup, so a
    slow name takes one thread."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, int], Future[list[str]]] = {}

    async def find(self, host: str, port: int) -> list[str]:
        """The addresses of a host. Raises OSError or ValueError if there are none, Full if
        MAX_LOOKUPS other names are still being looked up."""
        lookup = self._running.get((host, port)) or self._start(host, port)
        return await asyncio.wrap_future(lookup)

    def _start(self, host: str, port: int) -> Future[list[str]]:
        if len(self._running) >= MAX_LOOKUPS:
            raise Full
        lookup: Future[list[str]] = Future()
        # A running one cannot be cancelled, so a fetch that ends leaves it to the others.
        lookup.set_running_or_notify_cancel()
        self._running[host, port] = lookup
        thread = threading.Thread(target=self._look_up, args=(host, port, lookup), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the machine is short of threads
            del self._running[host, port]
            raise Full from None
        return lookup

    def _look_up(self, host: str, port: int, lookup: Future[list[str]]) -> None:
        found: list[str] = []
        problem: Exception | None = None
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found = list(dict.fromkeys(str(address[0]) for *_, address in addresses))
        except Exception as error:  # OSError; ValueError for a name that no DNS can hold
            problem = error
        # Before the result, so that the next fetch looks again and is never given an old answer.
        del self._running[host, port]
        if problem:
            lookup.set_exception(problem)
        else:
            lookup.set_result(found)
