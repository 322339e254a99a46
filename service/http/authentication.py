"""API keys: who may send requests, and who may see diagnostics.

A key is listed by its hash, `sha256:` and 64 hex digits, in the environment or in a file that is
reloaded when it changes. `tapt-serve key` makes one. Keys are random, so a fast hash without salt
reveals nothing about them.
"""

import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fastapi.requests import HTTPConnection
from fastapi.security import HTTPBearer

from service.errors import KeysError, Unauthorized
from service.settings import Settings
from service.telemetry.metrics import Metrics

DIAGNOSTICS = "diagnostics"
"""The scope of keys that may see entropies, agreement, suspicion and the undefended label."""

SCOPES = frozenset({DIAGNOSTICS})
RELOAD = 1.0  # seconds between checks of the file
_LISTED = re.compile(r"sha256:([0-9a-f]{64})")

log = logging.getLogger("tapt.keys")


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request. `id` is the start of the key's hash, for limits and the log."""

    id: str
    scopes: frozenset[str]

    @property
    def may_see_diagnostics(self) -> bool:
        return DIAGNOSTICS in self.scopes


ANYONE = Caller("", SCOPES)
"""Every caller of a server without keys."""

Table = dict[bytes, frozenset[str]]


class Keys:
    """The accepted keys, from the environment and the file.

    If the file disappears or is malformed later, the last keys stay valid, so that a mistake in a
    rotation locks nobody out. Then `tapt_key_file_ok` is 0 and the log says why. An empty file
    admits nobody. Raises KeysError if the keys cannot be read at the start.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        metrics.key_file_ok.set(1)  # also without a file
        self._clock = clock
        self._given = _parse(settings.api_keys, "api_keys", plain=True)
        self._file = Path(settings.api_keys_file) if settings.api_keys_file else None
        self._listed: Table = {}
        self._checked = clock()
        self._seen: tuple[int, ...] = ()
        self.needed = bool(self._given or self._file)
        if plain := sum(not key.startswith("sha256:") for key in settings.api_keys):
            log.warning("%d keys are in plain text; `tapt-serve key --stdin` hashes them", plain)
        if self._file:
            try:
                self._read(self._file)
            except OSError as error:
                raise KeysError(f"{self._file}: {error.strerror}.") from None

    def find(self, header: str) -> Caller | None:
        """The caller with this `Authorization` header; None if the key is unknown.

        All hashes are always compared, in constant time, so that timing reveals nothing about them.
        """
        if not self.needed:
            return ANYONE
        self.refresh()
        kind, _, given = header.partition(" ")
        digest = sha256(given.strip().encode("latin-1")).digest()
        scopes: frozenset[str] | None = None
        for table in (self._given, self._listed):
            for known, allowed in table.items():
                if hmac.compare_digest(digest, known):
                    scopes = allowed | (scopes or frozenset())
        if kind.lower() != "bearer" or scopes is None:
            return None
        return Caller(digest.hex()[:8], scopes)

    def refresh(self) -> None:
        """Read the file again if it has changed; at most once a second."""
        now = self._clock()
        if self._file is None or now < self._checked + RELOAD:
            return
        self._checked = now
        try:
            self._read(self._file)
        except (OSError, KeysError) as error:
            self._metrics.key_file_ok.set(0)
            self._metrics.key_file_errors.inc()
            if isinstance(error, OSError):
                self._seen = ()  # read it once it is back, even if it is the same file
            log.error("the keys were not reloaded: %s", error)

    def _read(self, file: Path) -> None:
        """Read the file if it has changed."""
        stat = file.stat()
        seen = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen == self._seen:
            return
        self._seen = seen  # of a malformed file too, so that it is reported once
        lines = (line.partition("#")[0] for line in file.read_text("utf-8", "replace").splitlines())
        self._listed = _parse((line for line in lines if line.strip()), file.name, plain=False)
        self._metrics.key_file_ok.set(1)
        log.info("%s lists %d keys", file.name, len(self._listed))


class KeyCheck(HTTPBearer):
    """Finds the caller of a request, and describes the header in the OpenAPI.

    Raises Unauthorized, unless the server has no keys, the request has a valid one, or
    `open_routes` lists `opened`.
    """

    def __init__(self, opened: str = "") -> None:
        super().__init__(
            scheme_name="HTTPBearer", description="Needed only if the server has keys."
        )
        self._opened = opened

    async def __call__(self, request: HTTPConnection) -> None:
        if self._opened in request.app.state.settings.open_routes:
            return
        keys: Keys = request.app.state.keys
        caller = keys.find(request.headers.get("authorization", ""))
        if caller is None:
            raise Unauthorized("A valid API key is needed.")
        request.state.caller = caller
        if caller.id:
            request.state.log["key"] = caller.id


check_key = KeyCheck()
check_pages = KeyCheck("pages")
check_metrics = KeyCheck("metrics")


def make_key() -> str:
    """A new key of 256 random bits."""
    return f"tapt_{secrets.token_urlsafe(32)}"


def entry(key: str, scopes: Iterable[str] = ()) -> str:
    """The line that lists a key in a file."""
    return " ".join([f"sha256:{sha256(key.encode()).hexdigest()}", *scopes])


def _parse(lines: Iterable[str], source: str, plain: bool) -> Table:
    """The scopes by hash. Errors give a line's number and not its text, which may be a key."""
    table: Table = {}
    for number, line in enumerate(lines, 1):
        head, *scopes = line.split()
        if found := _LISTED.fullmatch(head.lower()):
            digest = bytes.fromhex(found[1])
        elif plain and not head.startswith("sha256:"):
            digest = sha256(head.encode()).digest()
        else:
            raise KeysError(f"Entry {number} of {source} is not `sha256:` and 64 hex digits.")
        if not SCOPES.issuperset(scopes):
            known = ", ".join(sorted(SCOPES))
            raise KeysError(f"Entry {number} of {source} has an unknown scope; known: {known}.")
        table[digest] = table.get(digest, frozenset()) | frozenset(scopes)
    return table
