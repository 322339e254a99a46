"""The shape of the log lines: one a request, as text or as JSON."""

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


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(shape: Literal["text", "json"]) -> None:
    """Log to standard error, ours from INFO on, other packages' from WARNING on."""
    handler = logging.StreamHandler()
    text = _Text("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(_Json() if shape == "json" else text)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("tapt").setLevel(logging.INFO)
    # Of damage in what clients send; that is no news for an operator, and there is no end of it.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for reader in ("PIL", "python_multipart"):
        logging.getLogger(reader).setLevel(logging.CRITICAL)


def _pairs(fields: dict[str, object]) -> str:
    shown = {name: value for name, value in fields.items() if name not in {"method", "route"}}
    return " ".join(f"{name}={value}" for name, value in shown.items() if name != "status")
