"""Fetch images by URL, if the operator allows it: from listed hosts, at public addresses.

This prevents server-side request forgery. The host must be listed, its name is resolved once, and
all of its addresses must be public. The connection goes to the address that was checked and not to
the name, and the peer is checked again before a byte is sent. Redirects are not followed, proxies
are not used, and bytes and seconds are limited.
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
from service.intake.lookups import Lookups
from service.intake.places import Full, Places
from service.settings import Settings
from service.telemetry.metrics import Metrics

MAX_FETCHES = 16  # at once, shared among callers; each may hold max_body_bytes
MAX_URL = 2048  # characters
MAX_HEAD = 16_384  # bytes of a response's headers
PORTS = {"https": 443, "http": 80}
WIRE_SERVER = ipaddress.ip_address("168.63.129.16")
"""Azure's metadata service. Every virtual machine there reaches it at this global address, which no
firewall blocks, and it serves certificates and settings like 169.254.169.254 elsewhere."""

log = logging.getLogger("tapt.fetch")

Resolve = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True, slots=True)
class ImageURL:
    """The URL of an image."""

    url: str


@dataclass(frozen=True, slots=True)
class _Target:
    scheme: str
    host: str
    port: int
    path: str


def read_source(text: str) -> bytes | ImageURL:
    """The image of a JSON body: its URL, or its file from base64 as in `decode.from_base64`."""
    if text[:8].lower().startswith(("http://", "https://")):
        return ImageURL(text)
    return from_base64(text)


def is_public(address: str) -> bool:
    """Whether an address is public: global unicast, no cloud's metadata service, and no IPv6 form
    of an IPv4 address (mapped, 6to4, Teredo, NAT64), which may hide a private one."""
    ip = ipaddress.ip_address(address)
    if not ip.is_global or ip.is_multicast or ip == WIRE_SERVER:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return True
    embedded = ip.ipv4_mapped or ip.sixtofour or ip.teredo
    return not embedded and ip in ipaddress.ip_network("2000::/3")


class ImageFetcher:
    """Fetches images. Only tests pass `resolve`, `permits` and `tls`."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        resolve: Resolve | None = None,
        permits: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._resolve = resolve or Lookups().find
        self._permits = permits
        self._tls = tls or ssl.create_default_context()
        self._places = Places(MAX_FETCHES)

    async def fetch(self, image: ImageURL, caller: str = "") -> bytes:
        """Download an image file. Raises Unprocessable, TooLarge or QueueFull."""
        if not self._settings.allow_image_urls:
            raise Unprocessable("This server fetches no images by URL; send the file as base64.")
        target = self._check(image.url)
        try:
            async with self._places.hold(caller):
                file = await self._reach(target)
        except Full:
            self._metrics.rejected.labels("fetches").inc()
            raise QueueFull("Too many images are being fetched at once.", retry_after=1) from None
        except ServiceError:
            self._metrics.image_fetches.labels("refused").inc()
            raise
        except (OSError, ValueError, h11.ProtocolError) as error:
            # One sentence for all causes: different ones would help to map the internal network.
            self._metrics.image_fetches.labels("failed").inc()
            log.info("fetching an image failed: %s", type(error).__name__)
            raise Unprocessable("The image could not be fetched.") from None
        self._metrics.image_fetches.labels("fetched").inc()
        return file

    def _check(self, url: str) -> _Target:
        """Parse a URL. Raises Unprocessable unless it is unambiguous and its host is listed."""
        refused = Unprocessable("This server fetches no images from this URL.")
        # Parsers disagree about the host of a URL with white space, controls or backslashes.
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
            if not addresses or not all(map(self._permits, addresses)):
                raise ConnectionRefusedError("an address is not public")
            return await self._get(target, addresses[0])

    async def _get(self, target: _Target, address: str) -> bytes:
        loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as peer:
            peer.setblocking(False)
            await loop.sock_connect(peer, (address, target.port))
            if not self._permits(peer.getpeername()[0]):
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
        request = h11.Request(method="GET", target=target.path, headers=headers)
        writer.write((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
        limit = self._settings.max_body_bytes
        body = bytearray()
        while True:
            match http.next_event():
                case h11.NEED_DATA:
                    http.receive_data(await reader.read(65_536))
                case h11.Response(status_code=status) if status != 200:
                    hint = "; redirects are not followed" if 300 <= status < 400 else ""
                    raise Unprocessable(f"The image's host answered {status}{hint}.")
                case h11.Data(data=data):
                    body += data
                    if len(body) > limit:
                        raise TooLarge(f"The image is larger than {limit} bytes.")
                case h11.EndOfMessage():
                    return bytes(body)
                case h11.ConnectionClosed():
                    raise ConnectionResetError("no response")


def _matches(entry: str, host: str, port: int, scheme: str) -> bool:
    """Whether a host matches an entry: `example.org`, `*.example.org` or either with a port."""
    name, _, listed = entry.partition(":")
    if port != (int(listed) if listed else PORTS[scheme]):
        return False
    return host.endswith(name[1:]) if name.startswith("*.") else host == name
