"""DNS lookups: what a name server that does not answer may delay, which is nothing else."""

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service.errors import QueueFull, Unprocessable
from service.intake.body import SMALL_BYTES, parse
from service.intake.image_urls import MAX_FETCHES, ImageFetcher, ImageURL
from service.intake.lookups import MAX_LOOKUPS, Lookups
from service.settings import Settings
from service.telemetry.metrics import Metrics

pytestmark = pytest.mark.alone


class NameServer:
    """Answers no lookup until the test says so."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers = threading.Event()

    def look_up(self, host: str, port: int, **options: Any) -> list[Any]:
        self.asked.append(host)
        assert self.answers.wait(30)
        if host.startswith("none"):
            raise socket.gaierror("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", port))]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    server = NameServer()
    monkeypatch.setattr(socket, "getaddrinfo", server.look_up)
    yield server
    server.answers.set()


def make_fetcher() -> ImageFetcher:
    settings = Settings(
        allow_image_urls=True, image_url_hosts=("*.a.test",), image_url_timeout_ms=100
    )
    return ImageFetcher(settings, Metrics())


async def asked(names: NameServer, count: int) -> None:
    async with asyncio.timeout(20):
        while len(names.asked) < count:
            await asyncio.sleep(0.005)


def test_large_bodies_are_parsed_while_lookups_hang(names: NameServer) -> None:
    async def scenario() -> None:
        # As many threads as asyncio gives a machine with few cores.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4))
        fetcher = make_fetcher()
        urls = [ImageURL(f"https://{number}.a.test/") for number in range(MAX_FETCHES)]
        fetches = [asyncio.create_task(fetcher.fetch(url)) for url in urls]
        try:
            for fetch in fetches:  # the places are free again, the lookups still hang
                with pytest.raises(Unprocessable):
                    await fetch
            async with asyncio.timeout(5):
                assert await parse(bytes(SMALL_BYTES + 1), len) == SMALL_BYTES + 1
            assert len(names.asked) == MAX_FETCHES
        finally:
            names.answers.set()  # or the event loop would wait for its threads

    asyncio.run(scenario())


def test_fetches_share_the_lookup_of_a_name_and_outlive_each_other(names: NameServer) -> None:
    async def scenario() -> None:
        lookups = Lookups()
        first, second = (asyncio.create_task(lookups.find("a.test", 443)) for _ in range(2))
        await asked(names, 1)
        first.cancel()
        names.answers.set()
        assert await second == ["192.0.2.1"]
        assert names.asked == ["a.test"]
        assert await lookups.find("a.test", 443) == ["192.0.2.1"]
        assert names.asked == ["a.test"] * 2  # nothing is kept
        with pytest.raises(OSError, match="not known"):
            await lookups.find("none.test", 443)

    asyncio.run(scenario())


def test_lookups_are_bounded(names: NameServer) -> None:
    async def scenario() -> None:
        fetcher = make_fetcher()
        for number in range(MAX_LOOKUPS):
            with pytest.raises(Unprocessable):
                await fetcher.fetch(ImageURL(f"https://{number}.a.test/"))
        with pytest.raises(QueueFull):
            await fetcher.fetch(ImageURL("https://more.a.test/"))
        with pytest.raises(Unprocessable):  # a name that is being looked up needs no thread
            await fetcher.fetch(ImageURL("https://0.a.test/"))
        assert len(names.asked) == MAX_LOOKUPS

    # One after the other, each until its timeout.
    began = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - began < 20


def test_names_that_no_dns_holds_have_no_address() -> None:
    with pytest.raises((OSError, ValueError)):
        asyncio.run(Lookups().find("a" * 64 + ".test", 443))


def test_numbers_are_found_without_a_name_server() -> None:
    assert asyncio.run(Lookups().find("127.0.0.1", 80)) == ["127.0.0.1"]


EXIT = """
import asyncio, socket, time
from service.intake.lookups import Lookups

socket.getaddrinfo = lambda *name, **options: time.sleep(60)

async def main():
    try:
        await asyncio.wait_for(Lookups().find("a.test", 443), 0.2)
    except TimeoutError:
        print("timeout", flush=True)

asyncio.run(main())
"""


def test_a_lookup_that_hangs_does_not_delay_the_exit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "timeout\n"
