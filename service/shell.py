"""`tapt-serve classify` and `tapt-serve info`: one image, or the model's facts, in a terminal.

By themselves they load the model into this process; with a URL they ask a running server.
"""

import base64
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.door import Outcome
from service.errors import ERRORS, InternalError
from service.exposure import present
from service.plan import plan
from service.process import share_cores
from service.schemas import Choices, Classification
from service.settings import Settings
from service.work import Answer, Failure, Glimpse

if TYPE_CHECKING:
    from service.process import Runner

PATIENCE = 120.0  # seconds for a server's answer

screen = Console(highlight=False)
progress = Console(stderr=True)


def classify_here(
    path: Path, choices: Choices, settings: Settings
) -> tuple[Classification, list[float]]:
    """One image, by a model loaded into this process, and the scores without a defense.

    Raises ServiceError, ModelError, OSError.
    """
    began = time.monotonic()
    work = plan(uuid.uuid4().hex, path.read_bytes(), choices, settings, began)
    decode_seconds = time.monotonic() - began
    runner = _load(settings)
    settled: list[Answer | Failure | Glimpse] = []
    with progress.status("Adapting"):
        began = time.monotonic()
        work = replace(work, deadline=began + settings.request_timeout_ms / 1000)
        runner.run([work], lambda id, result: settled.append(result), lambda id: False)
        total = time.monotonic() - began + decode_seconds
    answer = settled[0]
    assert not isinstance(answer, Glimpse)
    if isinstance(answer, Failure):
        raise ERRORS.get(answer.error_type, InternalError)(answer.message)
    model = runner.ready.info["model"]["name"]
    outcome = Outcome(work, answer, model, choices.top_k, 0.0, decode_seconds, total)
    undefended = dict(zip(work.labels, answer.undefended_scores, strict=True))
    shown = present(outcome, "full", diagnostics=True)
    return shown, [undefended[scored.label] for scored in shown.labels]


def classify_there(
    url: str, path: Path, choices: Mapping[str, Any], settings: Settings
) -> Classification:
    """One image, by the server at `url`. Raises OSError, with one
    sentence where the server refused."""
    body = {**choices, "image": base64.b64encode(path.read_bytes()).decode()}
    with progress.status(escape(f"Asking {url}")):
        return Classification.model_validate(_ask(url, "/v1/classify", settings, body))


def info_here(settings: Settings) -> dict[str, Any]:
    """The facts of the model that the settings name. Raises ModelError."""
    return _load(settings).ready.info


def info_there(url: str, settings: Settings) -> dict[str, Any]:
    """The facts of the server at `url`. Raises OSError."""
    answer: dict[str, Any] = _ask(url, "/info", settings)
    return answer


def show_classification(answer: Classification, undefended: list[float] | None) -> None:
    """A table of labels, best first, and a line with what was spent."""
    table = Table()
    table.add_column("label", overflow="fold")
    if undefended:
        table.add_column("undefended", justify="right")
    table.add_column("defended", justify="right", style="bold")
    for index, scored in enumerate(answer.labels):
        before = [f"{undefended[index]:.3f}"] if undefended else []
        table.add_row(escape(scored.label), *before, f"{scored.score:.3f}")
    screen.print(table)
    screen.print(escape(_spent(answer)))


def show_info(facts: Mapping[str, Any]) -> None:
    """A table of facts, nested ones with dotted names."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in _flatten("", facts):
        table.add_row(name, escape(value))
    screen.print(table)


def _spent(answer: Classification) -> str:
    spent, timings = answer.defense, answer.timings_ms
    line = (
        f"{spent.method} ({spent.design}): {spent.steps} steps, {spent.views_kept} of "
        f"{spent.views} views kept, {timings.total:.0f} ms"
    )
    if spent.undefended_label is not None:
        line += f"; undefended: {spent.undefended_label}"
    return f"{line}; suspected adversarial" if spent.suspected else line


def _flatten(prefix: str, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flatten(f"{prefix}{name}.", value)
        else:
            rows.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return rows


def _load(settings: Settings) -> "Runner":
    with progress.status(escape(f"Loading {settings.model}")):
        share_cores()
        from service.runner import Runner  # torch: seconds, and only here

        runner: Runner = Runner(settings, 0)
        return runner


def _ask(url: str, path: str, settings: Settings, body: Mapping[str, Any] | None = None) -> Any:
    request = urllib.request.Request(url.rstrip("/") + path)
    # A server may hold hashes only; whoever asks holds the key itself.
    if key := next((key for key in settings.api_keys if not key.startswith("sha256:")), None):
        request.add_header("Authorization", f"Bearer {key.split()[0]}")
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            raise ConnectionError(
                _reason(error.read()) or f"{url} answered {error.code}."
            ) from None
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"{url} cannot be asked: {getattr(error, 'reason', error)}."
        ) from None


def _reason(body: bytes) -> str | None:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return None
