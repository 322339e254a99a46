"""Images by URL, where the operator allows it: from listed hosts, at public addresses only.

A URL from a stranger must not make this machine speak to its own neighbours. So the host must be
listed, its name is resolved once, every address found must be public, the connection goes to the
address that was checked and not to the name, and the peer is checked again before a byte is sent.
Redirects are not followed, proxies not asked, and bytes and seconds are capped.
"""

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11

from service.errors import QueueFull, ServiceError, TooLarge, Unprocessable
from service.intake.decode import from_base64
from service.settings import Settings
from service.telemetry.metrics import Metrics

FETCHES = 16  # at once; each may hold max_body_bytes
MAX_URL = 2048  # characters
MAX_HEAD = 16_384  # bytes of an answer's header
PORTS = {"https": 443, "http": 80}
WIRE_SERVER = ipaddress.ip_address("168.63.129.16")
"""Azure's host, which every machine there reaches at this global address, behind no firewall, and
which hands out the machine's certificates and settings: metadata like those at 169.254.169.254."""

log = logging.getLogger("tapt.fetch")

Resolve = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True, slots=True)
class ImageURL:
    """An image that is elsewhere."""

    url: str


@dataclass(frozen=True, slots=True)
class _Target:
    scheme: str
    host: str
    port: int
    path: str


def read_source(text: str) -> bytes | ImageURL:
    """The `image` of a JSON body: a URL, or base64 as in `images.from_base64`."""
    if text[:8].lower().startswith(("http://", "https://")):
        return ImageURL(text)
    return from_base64(text)


def is_public(address: str) -> bool:
    """Whether an address belongs to the internet at large: global unicast, no cloud's own host, and
    no wrapping of an IPv4 address (mapped, 6to4, Teredo, NAT64), behind which anything may be."""
    ip = ipaddress.ip_address(address)
    if not ip.is_global or ip.is_multicast or ip == WIRE_SERVER:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return True
    wraps = ip.ipv4_mapped or ip.sixtofour or ip.teredo
    return not wraps and ip in ipaddress.ip_network("2000::/3")


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class ImageFetcher:
    """Fetches images. `resolve`, `permit` and `tls` are other than the defaults in tests only."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        resolve: Resolve = resolve,
        permit: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._resolve = resolve
        self._permit = permit
        self._tls = tls or ssl.create_default_context()
        self._running = 0

    async def fetch(self, link: ImageURL) -> bytes:
        """The file behind a link. Raises Unprocessable, TooLarge or QueueFull."""
        if not self._settings.allow_image_urls:
            raise Unprocessable("Images are not fetched by URL; send the file as base64.")
        target = self._check(link.url)
        if self._running >= FETCHES:
            self._metrics.rejected.labels("fetches").inc()
            raise QueueFull("Too many images are being fetched at once.", retry_after=1)
        self._running += 1
        try:
            file = await self._reach(target)
        except ServiceError:
            self._metrics.image_fetches.labels("refused").inc()
            raise
        except (OSError, ValueError, h11.ProtocolError) as error:
            # The sentence is the same for all: what differs would map the network behind.
            self._metrics.image_fetches.labels("failed").inc()
            log.info("an image could not be fetched: %s", type(error).__name__)
            raise Unprocessable("The image could not be fetched.") from None
        finally:
            self._running -= 1
        self._metrics.image_fetches.labels("fetched").inc()
        return file

    def _check(self, url: str) -> _Target:
        """Raises Unprocessable unless the URL is plain and its host is listed."""
        refused = Unprocessable("Images are not fetched from this address.")
        # Blanks, controls and backslashes are where two parsers read two different hosts.
        if len(url) > MAX_URL or not re.fullmatch(r"[!-~]+", url) or "\\" in url:
            raise refused
        try:
            parts = urlsplit(url)
            port = PORTS[parts.scheme] if parts.port is None else parts.port
        except (ValueError, KeyError):
            raise refused from None
        allowed = {"https", "http"} if self._settings.allow_http_image_urls else {"https"}
        host = parts.hostname or ""
        if parts.scheme not in allowed or "@" in parts.netloc or not host:
            raise refused
        listed = self._settings.image_url_hosts
        if not any(_matches(entry, host, port, parts.scheme) for entry in listed):
            raise refused
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Target(parts.scheme, host, port, path)

    async def _reach(self, target: _Target) -> bytes:
        async with asyncio.timeout(self._settings.image_url_timeout_ms / 1000):
            addresses = await self._resolve(target.host, target.port)
            if not addresses or not all(map(self._permit, addresses)):
                raise ConnectionRefusedError("an address is not public")
            return await self._get(target, addresses[0])

    async def _get(self, target: _Target, address: str) -> bytes:
        loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as peer:
            peer.setblocking(False)
            await loop.sock_connect(peer, (address, target.port))
            if not self._permit(peer.getpeername()[0]):
                raise ConnectionRefusedError("the peer is not public")
            secure = target.scheme == "https"
            reader, writer = await asyncio.open_connection(
                sock=peer,
                ssl=self._tls if secure else None,
                server_hostname=target.host if secure else None,
            )
            try:
                return await self._read(target, reader, writer)
            finally:
                writer.transport.abort()

    async def _read(
        self, target: _Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes:
        host = f"[{target.host}]" if ":" in target.host else target.host
        if target.port != PORTS[target.scheme]:
            host += f":{target.port}"
        headers = [("Host", host), ("Accept", "image/*"), ("Connection", "close")]
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        asked = h11.Request(method="GET", target=target.path, headers=headers)
        writer.write((http.send(asked) or b"") + (http.send(h11.EndOfMessage()) or b""))
        limit = self._settings.max_body_bytes
        body = bytearray()
        while True:
            match http.next_event():
                case h11.NEED_DATA:
                    http.receive_data(await reader.read(65_536))
                case h11.Response(status_code=status) if status != 200:
                    moved = "; redirects are not followed" if 300 <= status < 400 else ""
                    raise Unprocessable(f"The image's host answered {status}{moved}.")
                case h11.Data(data=data):
                    body += data
                    if len(body) > limit:
                        raise TooLarge(f"The image is larger than {limit} bytes.")
                case h11.EndOfMessage():
                    return bytes(body)
                case h11.ConnectionClosed():
                    raise ConnectionResetError("no answer")


def _matches(entry: str, host: str, port: int, scheme: str) -> bool:
    """Whether a listed host, `example.org`, `*.example.org` or either with a port, is meant."""
    name, _, listed = entry.partition(":")
    if port != (int(listed) if listed else PORTS[scheme]):
        return False
    return host.endswith(name[1:]) if name.startswith("*.") else host == name
