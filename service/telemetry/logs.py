"""The format of the log, one line per record, as text or JSON."""

import json
import logging
import time
import warnings
from typing import Literal


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        line = super().format(record)
        return line if not fields else f"{line} {_pairs(fields)}"


class JSONFormatter(logging.Formatter):
    """A record as one line of JSON, with the record's `fields` beside the usual ones."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class OncePerMinute(logging.Filter):
    """Lets each message through once a minute: asyncio repeats one for every connection that it
    cannot accept, thousands a second, with a traceback each."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        message = str(record.msg).partition("\n")[0][:200]
        now = time.monotonic()
        if now < self._last.get(message, float("-inf")) + 60:
            return False
        if len(self._last) > 100:
            self._last.clear()
        self._last[message] = now
        return True


def configure(log_format: Literal["text", "json"]) -> None:
    """Log to standard error: our loggers from INFO, those of other packages from WARNING."""
    handler = logging.StreamHandler()
    text = _Text("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JSONFormatter() if log_format == "json" else text)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("tapt").setLevel(logging.INFO)
    for repetitive in ("asyncio", "uvicorn.error"):
        logging.getLogger(repetitive).filters[:] = [OncePerMinute()]
    # About damaged input from clients: of no use to the operator, and clients could flood the log.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for reader in ("PIL", "python_multipart"):
        logging.getLogger(reader).setLevel(logging.CRITICAL)


def _pairs(fields: dict[str, object]) -> str:
    shown = {name: value for name, value in fields.items() if name not in {"method", "route"}}
    return " ".join(f"{name}={value}" for name, value in shown.items() if name != "status")
