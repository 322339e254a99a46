"""Images by URL: from listed hosts, at public addresses, whatever the other side does."""

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from service.errors import QueueFull, ServiceError, TooLarge, Unprocessable
from service.intake.image_urls import MAX_FETCHES, ImageFetcher, ImageURL, is_public, read_source
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.conftest import Server

pytestmark = pytest.mark.alone

START = Callable[..., Server]
PUBLIC = "93.184.216.34"  # never spoken to


class Host:
    """A server at a loopback address that sends fixed bytes and counts what it meets."""

    def __init__(
        self,
        answer: bytes = b"",
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        drip: float = 0.0,
        hang: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answer, self.drip, self.hang, self.tls = answer, drip, hang, tls
        self.connections = 0
        self.requests: list[bytes] = []
        self._over = threading.Event()
        self._listener = socket.create_server((address, port))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._talk, args=(client,), daemon=True).start()

    def _talk(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            client.settimeout(10)
            if self.tls:
                client = self.tls.wrap_socket(client, server_side=True)
            asked = b""
            while b"\r\n\r\n" not in asked and (got := client.recv(4096)):
                asked += got
            if asked:
                self.requests.append(asked)
            if self.drip:
                for byte in self.answer:
                    client.sendall(bytes([byte]))
                    if self._over.wait(self.drip):
                        return
            else:
                client.sendall(self.answer)
            if self.hang:
                self._over.wait(30)
            client.close()

    def close(self) -> None:
        self._over.set()
        self._listener.close()


@pytest.fixture
def host() -> Iterator[Callable[..., Host]]:
    started: list[Host] = []

    def start(*args: Any, **knobs: Any) -> Host:
        started.append(Host(*args, **knobs))
        return started[-1]

    yield start
    for each in started:
        each.close()


def ok(body: bytes, head: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s" % (len(body), head, body)


class Harness:
    """Links that may go to loopback, where the hostile host of a test is."""

    def __init__(
        self,
        *hosts: str,
        resolve: Any = None,
        permits: Callable[[str], bool] = lambda address: address == "127.0.0.1",
        tls: ssl.SSLContext | None = None,
        **knobs: Any,
    ) -> None:
        self.metrics = Metrics()
        self.asked: list[str] = []
        self._resolve = resolve or (lambda host: ["127.0.0.1"])
        knobs = {"allow_image_urls": True, "allow_http_image_urls": True} | knobs
        settings = Settings(image_url_hosts=hosts, **knobs)
        self.links = ImageFetcher(settings, self.metrics, self.resolve, permits, tls)

    async def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        found: list[str] = self._resolve(host)
        return found

    def fetch(self, url: str) -> bytes:
        return asyncio.run(self.links.fetch(ImageURL(url)))

    def refusal(self, url: str, kind: type[ServiceError] = Unprocessable) -> str:
        with pytest.raises(kind) as caught:
            self.fetch(url)
        return caught.value.message

    def outcome(self, name: str) -> float | None:
        labels = {"outcome": name}
        return self.metrics.registry.get_sample_value("tapt_image_fetches_total", labels)


def test_an_image_comes_from_a_listed_host(host: Any) -> None:
    there = host(ok(b"picture"))
    harness = Harness(f"pictures.test:{there.port}")
    assert harness.fetch(f"http://pictures.test:{there.port}/a%20b?x=1#part") == b"picture"
    head = there.requests[0].decode()
    assert head.startswith("GET /a%20b?x=1 HTTP/1.1\r\n")
    assert f"\r\nHost: pictures.test:{there.port}\r\n" in head
    assert "authorization" not in head.lower()
    assert "cookie" not in head.lower()
    assert harness.outcome("fetched") == 1


def test_chunks_and_an_end_without_a_length_are_read(host: Any) -> None:
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    for answer, body in ((chunked, b"abcde"), (b"HTTP/1.0 200 OK\r\n\r\nabc", b"abc")):
        there = host(answer)
        assert Harness(f"a.test:{there.port}").fetch(f"http://a.test:{there.port}/") == body


ADDRESSES = {
    "private": ["10.0.0.1", "172.16.5.5", "192.168.1.1", "fd00::1"],
    "loopback": ["127.0.0.1", "127.8.8.8", "::1"],
    "link-local and metadata": ["169.254.169.254", "fe80::1", "fe80::1%eth0", "fd00:ec2::254"],
    "metadata at a global address": ["168.63.129.16"],
    "carrier-grade NAT": ["100.64.0.1", "100.127.255.254"],
    "this network": ["0.0.0.0", "0.1.2.3", "::"],
    "multicast": ["224.0.0.1", "239.1.1.1", "ff02::1", "ff0e::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "2001:db8::1"],
    "mapped": ["::ffff:127.0.0.1", "::ffff:93.184.216.34", "::127.0.0.1"],
    "tunnels": ["2002:7f00:1::", "2002:a00:1::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"],
    "translated": ["64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b:1::1"],
    "old site-local": ["fec0::1"],
}


@pytest.mark.parametrize("addresses", ADDRESSES.values(), ids=ADDRESSES)
def test_only_public_addresses_are_spoken_to(addresses: list[str]) -> None:
    for address in addresses:
        assert not is_public(address), address
        harness = Harness("a.test", resolve=lambda host, a=address: [a], permits=is_public)
        assert harness.refusal("http://a.test/") == "The image could not be fetched."
        # One bad address among good ones is one too many: the next answer may bring it first.
        harness = Harness("a.test", resolve=lambda host, a=address: [PUBLIC, a], permits=is_public)
        assert harness.refusal("http://a.test/") == "The image could not be fetched."


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses_are(address: str) -> None:
    assert is_public(address)


def test_the_address_that_was_checked_is_the_one_connected_to(host: Any) -> None:
    """DNS rebinding: a second look at the name would find the neighbour."""
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]])
    there = host(ok(b"public"))
    neighbour = host(ok(b"secret"), address="127.0.0.2", port=there.port)
    harness = Harness(f"a.test:{there.port}", resolve=lambda host: next(answers))
    assert harness.fetch(f"http://a.test:{there.port}/") == b"public"
    assert harness.asked == ["a.test"]
    assert harness.refusal(f"http://a.test:{there.port}/") == "The image could not be fetched."
    assert neighbour.connections == 0


def test_the_peer_is_checked_again_before_a_byte_is_sent(host: Any) -> None:
    there = host(ok(b"x"))
    verdicts = iter([True, False])
    harness = Harness(f"a.test:{there.port}", permits=lambda address: next(verdicts))
    assert harness.refusal(f"http://a.test:{there.port}/") == "The image could not be fetched."
    assert there.requests == []


URLS = [
    "http://b.test/",
    "http://xa.test/",
    "http://a.test.b.test/",
    "http://a.test:81/",
    "http://a.test:0/",
    "http://a.test:99999/",
    "http://user@a.test/",
    "http://a.test@b.test/",
    "http://b.test#@a.test/",
    "http://b.test\\@a.test/",
    "http://a.test\\.b.test/",
    "http://a.test /",
    "http://a.test/\r\nHost: b.test",
    "http://a.test/é",
    "http://ａ.test/",
    "http://a.test./",
    "http://[::1]/",
    "http://127.0.0.1/",
    "http://2130706433/",
    "http:///",
    "http:/a.test/",
    "http://a.test/" + "x" * 3000,
    "file:///etc/passwd",
    "ftp://a.test/",
    "gopher://a.test/",
    "//a.test/",
]


@pytest.mark.parametrize("url", URLS)
def test_other_addresses_are_refused_before_their_name_is_looked_up(url: str) -> None:
    harness = Harness("a.test", "*.example.test")
    assert harness.refusal(url) == "This server fetches no images from this URL."
    assert harness.asked == []


@pytest.mark.parametrize(
    ("listed", "url", "let"),
    [
        ("a.test", "https://a.test/", True),
        ("a.test", "HTTPS://A.test:443/", True),
        ("a.test:8443", "https://a.test:8443/", True),
        ("a.test:8443", "https://a.test/", False),
        ("*.a.test", "https://b.a.test/", True),
        ("*.a.test", "https://a.test/", False),
        ("*.a.test", "https://xa.test/", False),
        ("a.test", "http://a.test/", False),
    ],
)
def test_hosts_are_listed_with_port_and_scheme(listed: str, url: str, let: bool) -> None:
    harness = Harness(listed, allow_http_image_urls=False, resolve=lambda host: [])
    harness.refusal(url)
    assert bool(harness.asked) == let


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(host: Any, status: int) -> None:
    neighbour = host(ok(b"secret"))
    location = b"Location: http://a.test:%d/\r\n" % neighbour.port
    there = host(b"HTTP/1.1 %d Moved\r\nContent-Length: 0\r\n%s\r\n" % (status, location))
    harness = Harness(f"a.test:{there.port}", f"a.test:{neighbour.port}")
    assert "redirects are not followed" in harness.refusal(f"http://a.test:{there.port}/")
    assert neighbour.connections == 0
    assert harness.outcome("refused") == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n" + b"x" * 5000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"fff\r\n%s\r\n" % (4095 * b"x"),
        b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 5000,
    ],
    ids=["length", "chunks", "close"],
)
def test_bytes_are_capped(host: Any, answer: bytes) -> None:
    there = host(answer, hang=True)
    harness = Harness(f"a.test:{there.port}", max_body_bytes=2000)
    harness.refusal(f"http://a.test:{there.port}/", TooLarge)


HOSTILE = {
    "garbage": b"\x16\x03\x01 what",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 10_000,
    "nothing": b"",
    "cut short": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
    "bad length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "not there": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "switch": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_host_is_one_sentence(host: Any, answer: bytes) -> None:
    there = host(answer)
    Harness(f"a.test:{there.port}").refusal(f"http://a.test:{there.port}/")


@pytest.mark.parametrize(
    "knobs",
    [{"hang": True}, {"answer": ok(b"x" * 100), "drip": 0.2}, {"answer": b"", "hang": True}],
    ids=["silent", "dripping", "empty"],
)
def test_seconds_are_capped(host: Any, knobs: dict[str, Any]) -> None:
    there = host(**knobs)
    harness = Harness(f"a.test:{there.port}", image_url_timeout_ms=300)
    began = time.monotonic()
    harness.refusal(f"http://a.test:{there.port}/")
    assert time.monotonic() - began < 8
    assert harness.outcome("failed") == 1


def test_fetches_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(name: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    harness = Harness("a.test")
    monkeypatch.setattr(harness.links, "_resolve", resolve)

    async def run() -> None:
        running = [asyncio.ensure_future(harness.links.fetch(LINK)) for _ in range(MAX_FETCHES)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await harness.links.fetch(LINK)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        with pytest.raises(TimeoutError):  # and not refused: the places are free again
            await asyncio.wait_for(harness.links.fetch(LINK), 0.01)

    asyncio.run(run())


def test_a_caller_cannot_keep_others_from_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(name: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    harness = Harness("a.test", image_url_timeout_ms=60_000)
    monkeypatch.setattr(harness.links, "_resolve", resolve)

    async def run() -> None:
        def start(caller: str) -> "asyncio.Task[bytes]":
            return asyncio.create_task(harness.links.fetch(LINK, caller))

        greedy = [start("greedy") for _ in range(MAX_FETCHES)]
        await asyncio.sleep(0.01)
        others = [start("other") for _ in range(MAX_FETCHES)]
        await asyncio.sleep(0.05)
        half = MAX_FETCHES // 2
        assert [fetch.done() for fetch in greedy] == [False] * half + [True] * half
        assert [fetch.done() for fetch in others] == [False] * half + [True] * half
        for fetch in (*greedy[half:], *others[half:]):
            with pytest.raises(QueueFull):
                await fetch
        assert harness.metrics.registry.get_sample_value(
            "tapt_rejected_total", {"reason": "fetches"}
        ) == len(greedy)
        for fetch in (*greedy[:half], *others[:half]):
            fetch.cancel()

    asyncio.run(run())


LINK = ImageURL("http://a.test/")


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl, to make a certificate")
@pytest.mark.parametrize(("name", "fetched"), [("a.test", True), ("b.test", False)])
def test_the_certificate_must_be_the_hosts(
    host: Any, tmp_path: Path, name: str, fetched: bool
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key)
    there = host(ok(b"picture"), tls=serving)
    trusting = ssl.create_default_context(cafile=str(certificate))
    harness = Harness(f"a.test:{there.port}", tls=trusting, allow_http_image_urls=False)
    url = f"https://a.test:{there.port}/"
    if fetched:
        assert harness.fetch(url) == b"picture"
    else:
        harness.refusal(url)
        assert there.requests == []


def test_a_url_is_no_base64() -> None:
    assert read_source("HTTPS://a.test/") == ImageURL("HTTPS://a.test/")
    assert read_source("aGVsbG8=") == b"hello"


def test_hosts_must_be_named() -> None:
    with pytest.raises(ValueError, match="needs image_url_hosts"):
        Settings(allow_image_urls=True)
    for listed in ("*", "http://a.test", "a.test/x", "A.test", "", "[::1]"):
        with pytest.raises(ValueError, match="image_url_hosts"):
            Settings(image_url_hosts=(listed,))


@pytest.mark.parametrize("route", ["/v1/classify", "/"])
def test_over_http_an_image_by_url_is_classified_where_it_is_allowed(
    start: START, host: Any, photo: bytes, route: str
) -> None:
    there = host(ok(photo))
    url = f"http://localhost:{there.port}/cat.jpg"
    labels = {"candidate_labels": ["cat", "dog"]}
    native, hugging = {"image": url, **labels}, {"inputs": url, "parameters": labels}
    body = native if route == "/v1/classify" else hugging
    refused = start().http.post(route, json=body)
    assert refused.status_code == 422
    assert "send the file" in refused.json()["error"]
    assert there.connections == 0

    hosts = f"localhost:{there.port}"
    server = start(allow_image_urls=True, image_url_hosts=hosts, allow_http_image_urls=True)
    # Listed or not, a neighbour is no public host.
    assert server.http.post(route, json=body).json()["error"] == "The image could not be fetched."
    assert there.connections == 0
    server.app.state.intake.image_urls = Harness(hosts).links
    answer = server.http.post(route, json=body)
    assert answer.status_code == 200, answer.text
    assert server.worker.batches[-1][0].image.shape == (300, 451, 3)
    connections = there.connections
    labels["candidate_labels"] = [str(i) for i in range(1001)]
    refused = server.http.post(route, json=body | ({} if "inputs" in body else labels))
    assert (refused.status_code, there.connections) == (422, connections)  # refused before fetching
