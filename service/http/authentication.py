"""Bearer keys: who may ask, and who may see how the defense fared.

A key is listed by its hash, `sha256:` and 64 hex digits, in the environment or in a file that is
read again when it changes; `tapt-serve key` makes one. Keys are random, so a plain hash tells
nothing of them and none has to be slow.
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
"""The scope that shows entropies, agreement, suspicion and the undefended label."""

SCOPES = frozenset({DIAGNOSTICS})
RELOAD = 1.0  # seconds between looks at the file
_LISTED = re.compile(r"sha256:([0-9a-f]{64})")

log = logging.getLogger("tapt.keys")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `id` is the head of the key's hash, for limits and the log."""

    id: str
    scopes: frozenset[str]

    @property
    def may_see_diagnostics(self) -> bool:
        return DIAGNOSTICS in self.scopes


ANYONE = Caller("", SCOPES)
"""Everybody, where the server has no keys."""

Table = dict[bytes, frozenset[str]]


class Keys:
    """The keys that are accepted now: those of the environment and those of the file.

    A file that goes missing or is malformed later changes nothing but a metric and the log: the
    keys read last stay, so that a slip in a rotation shuts nobody out. An empty file lets nobody
    in. Raises KeysError when either cannot be read at the start.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._given = _parse(settings.api_keys, "api_keys", plain=True)
        self._file = Path(settings.api_keys_file) if settings.api_keys_file else None
        self._listed: Table = {}
        self._looked = clock()
        self._seen: tuple[int, ...] = ()
        self.needed = bool(self._given or self._file)
        if plain := sum(not key.startswith("sha256:") for key in settings.api_keys):
            log.warning("%d keys are given as plain text; `tapt-serve key` hashes them", plain)
        if self._file:
            try:
                self._read(self._file)
            except OSError as error:
                raise KeysError(f"{self._file}: {error.strerror}.") from None

    def find(self, header: str) -> Caller | None:
        """Who sends this `Authorization` header, None for a stranger.

        Every hash is compared, so that the time taken tells neither which came close nor whose
        turn it was.
        """
        if not self.needed:
            return ANYONE
        self._refresh()
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

    def _refresh(self) -> None:
        now = self._clock()
        if self._file is None or now < self._looked + RELOAD:
            return
        self._looked = now
        try:
            self._read(self._file)
        except (OSError, KeysError) as error:
            self._metrics.key_file_errors.inc()
            log.error("the keys stay as they are: %s", error)

    def _read(self, file: Path) -> None:
        """Read the file if it is another than at the last look."""
        stat = file.stat()
        seen = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen == self._seen:
            return
        self._seen = seen  # also of a malformed one: to complain once is enough
        lines = (line.partition("#")[0] for line in file.read_text("utf-8", "replace").splitlines())
        self._listed = _parse((line for line in lines if line.strip()), file.name, plain=False)
        log.info("%s lists %d keys", file.name, len(self._listed))


class KeyCheck(HTTPBearer):
    """Notes the caller, and describes the header in the OpenAPI.

    Raises Unauthorized unless no keys are set, the request bears one, or the operator `opened`
    these routes to everybody.
    """

    def __init__(self, opened: str = "") -> None:
        super().__init__(
            scheme_name="HTTPBearer", description="Needed only where the server has keys."
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
    """The line that lists a key."""
    return " ".join([f"sha256:{sha256(key.encode()).hexdigest()}", *scopes])


def _parse(lines: Iterable[str], source: str, plain: bool) -> Table:
    """Hash to scopes. Errors name the line by its number, because its text may be a key."""
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
