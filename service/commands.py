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

from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.errors import ERRORS, InternalError
from service.http.response import build_response
from service.intake.decode import decode
from service.intake.intake import Outcome
from service.intake.options import resolve_options
from service.messages import Answer, Failure, ProgressEvent
from service.schemas import Choices, Classification, ScoredLabel
from service.settings import Settings
from service.worker.process import prepare_torch

if TYPE_CHECKING:
    from service.worker.process import Runner

BAR = 16  # characters of a full one
PATIENCE = 120.0  # seconds for a server's answer

screen = Console(highlight=False)
progress = Console(stderr=True)


class Comparison(Classification):
    """A defended answer and, beside it, what undefended CLIP says of the same image."""

    undefended: list[ScoredLabel] = Field(description="All labels, best first.")


def classify_here(path: Path, choices: Choices, settings: Settings) -> Comparison:
    """One image, by a model loaded into this process. Raises ServiceError, ModelError, OSError."""
    began = time.monotonic()
    image = decode(path.read_bytes(), settings.max_image_pixels)
    work = resolve_options(uuid.uuid4().hex, image, choices, settings, began)
    decode_seconds = time.monotonic() - began
    runner = _load(settings)
    settled: list[Answer | Failure | ProgressEvent] = []
    with progress.status("Adapting"):
        began = time.monotonic()
        work = replace(work, deadline=began + settings.request_timeout_ms / 1000)
        runner.run([work], lambda id, result: settled.append(result), lambda id: False)
        total = time.monotonic() - began + decode_seconds
    answer = settled[0]
    assert not isinstance(answer, ProgressEvent)
    if isinstance(answer, Failure):
        raise ERRORS.get(answer.error_type, InternalError)(answer.message)
    model = runner.ready.info["model"]["name"]
    outcome = Outcome(work, answer, model, choices.top_k, 0.0, decode_seconds, total)
    shown = build_response(outcome, "full", diagnostics=True)
    pairs = zip(work.labels, answer.undefended_scores, strict=True)
    undefended = [ScoredLabel(label=label, score=min(1.0, score)) for label, score in pairs]
    undefended.sort(key=lambda scored: -scored.score)
    return Comparison(**shown.model_dump(), undefended=undefended)


def classify_there(
    url: str, path: Path, choices: Mapping[str, Any], settings: Settings
) -> Comparison:
    """One image, by the server at `url`, which is asked twice. Raises OSError, with one
    sentence where the server refused."""
    body = {**choices, "image": base64.b64encode(path.read_bytes()).decode()}
    plain = {**body, "defense": {"method": "plain"}, "top_k": None}
    with progress.status(escape(f"Asking {url}")):
        undefended = _ask(url, "/v1/classify", settings, plain)["labels"]
        defended = _ask(url, "/v1/classify", settings, body)
    return Comparison.model_validate({**defended, "undefended": undefended})


def info_here(settings: Settings) -> dict[str, Any]:
    """The facts of the model that the settings name. Raises ModelError."""
    return _load(settings).ready.info


def info_there(url: str, settings: Settings) -> dict[str, Any]:
    """The facts of the server at `url`. Raises OSError."""
    answer: dict[str, Any] = _ask(url, "/info", settings)
    return answer


def show_classification(answer: Comparison) -> None:
    """A table of labels, the defended best first, with what was seen and spent below."""
    before = {scored.label: scored.score for scored in answer.undefended}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("label", overflow="fold")
    for name, colour in (("undefended", "dark_orange"), ("defended", "dark_cyan")):
        table.add_column(name, justify="right")
        table.add_column(style=colour, width=BAR, no_wrap=True)
    for scored in answer.labels:
        cells = [
            cell
            for score, first in (
                (before[scored.label], scored.label == answer.undefended[0].label),
                (scored.score, scored.label == answer.labels[0].label),
            )
            for cell in (f"[bold]{score:.3f}[/]" if first else f"{score:.3f}", _bar(score))
        ]
        table.add_row(escape(scored.label), *cells)
    screen.print(table)
    for line in (_said(answer), _seen(answer), _spent(answer)):
        if line:
            screen.print(escape(line))


def show_info(facts: Mapping[str, Any]) -> None:
    """A table of facts, nested ones with dotted names."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in _flatten("", facts):
        table.add_row(name, escape(value))
    screen.print(table)


def _bar(share: float) -> str:
    """Blocks, to an eighth of one."""
    eighths = round(8 * BAR * share)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _said(answer: Comparison) -> str:
    undefended, defended = answer.undefended[0].label, answer.labels[0].label
    if undefended == defended:
        return f"Both say {defended}."
    return f"Undefended CLIP says {undefended}, the defense says {defended}."


def _seen(answer: Comparison) -> str:
    """Empty where the server keeps it to itself."""
    seen = answer.defense
    if seen.entropy_before is None or seen.agreement is None or seen.suspicion is None:
        return ""
    line = (
        f"entropy {seen.entropy_before:.2f} to {seen.entropy_after:.2f} nats, "
        f"{seen.agreement:.0%} of the views agree, suspicion {seen.suspicion:.2f}"
    )
    return f"{line}: suspected adversarial" if seen.suspected else line


def _spent(answer: Comparison) -> str:
    spent, times = answer.defense, answer.timings_ms
    line = (
        f"{spent.method} ({spent.design}): {spent.steps} steps, {spent.views_kept} of "
        f"{spent.views} views kept; decode {times.decode:.0f}, adapt {times.adapt:.0f}, "
        f"predict {times.predict:.0f}, in all {times.total:.0f} ms"
    )
    return f"{line}, cut short by the {spent.truncated}" if spent.truncated else line


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
        prepare_torch()
        from service.worker.runner import Runner  # torch: seconds, and only here

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
