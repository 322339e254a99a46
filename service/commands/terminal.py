"""`tapt-serve classify` and `tapt-serve info`: an answer or the model's facts in a terminal.

Without a URL they load the model into this process; with one they use a running server.
"""

import base64
import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.commands.client import Client
from service.errors import make_error
from service.http.response import Classification, ScoredLabel, build_response, clamp
from service.intake.decode import decode
from service.intake.options import check_options, resolve_options
from service.intake.requests import ClassifyOptions
from service.intake.view_seeds import ViewSeeds
from service.messages import Answer, Failure, ProgressEvent
from service.settings import Settings
from service.worker.process import prepare_torch

if TYPE_CHECKING:
    from service.worker.process import Runner

BAR = 16  # characters

screen = Console(highlight=False)
progress = Console(stderr=True)


class Comparison(Classification):
    """A defended answer together with that of undefended CLIP."""

    undefended: list[ScoredLabel] = Field(description="All labels, best first.")


def classify_here(path: Path, options: ClassifyOptions, settings: Settings) -> Comparison:
    """Classify an image in this process. Raises ServiceError, ModelError, OSError."""
    check_options(options, settings)
    file = path.read_bytes()
    runner = _load(settings)
    began = time.monotonic()
    prepared = runner.ready.preprocessing
    image = decode(file, settings.max_image_pixels, preprocessing=prepared)
    decode_seconds = time.monotonic() - began
    settled: list[Answer | Failure | ProgressEvent] = []
    with progress.status("Adapting"):
        began = time.monotonic()
        seed = ViewSeeds(settings).of(image)
        task = resolve_options(uuid.uuid4().hex, image, options, settings, seed=seed, since=began)
        runner.run([task], lambda id, result: settled.append(result), lambda id: False)
        total_seconds = time.monotonic() - began + decode_seconds
    answer = settled[0]
    assert not isinstance(answer, ProgressEvent)
    if isinstance(answer, Failure):
        raise make_error(answer.error_type, answer.message)
    shown = build_response(
        task,
        answer,
        model=runner.ready.info["model"]["name"],
        queue_seconds=0.0,
        decode_seconds=decode_seconds,
        total_seconds=total_seconds,
        top_k=options.top_k,
    )
    pairs = zip(task.labels, answer.undefended_scores, strict=True)
    undefended = [ScoredLabel(label=label, score=clamp(score)) for label, score in pairs]
    undefended.sort(key=lambda scored: -scored.score)
    return Comparison(**shown.model_dump(), undefended=undefended)


def classify_there(url: str, key: str, path: Path, body: Mapping[str, Any]) -> Comparison:
    """Classify an image by the server at `url`, defended and not. Raises the errors of
    `Client.request`, and OSError for the file."""
    body = {**body, "image": base64.b64encode(path.read_bytes()).decode()}
    plain = {**body, "defense": {"method": "plain"}, "top_k": None}
    with progress.status(escape(f"Asking {url}")), Client(url, key) as client:
        undefended = client.request("/v1/classify", plain)["labels"]
        defended = client.request("/v1/classify", body)
    return Comparison.model_validate({**defended, "undefended": undefended})


def info_here(settings: Settings) -> dict[str, Any]:
    """Describe the model of the settings. Raises ModelError."""
    return _load(settings).ready.info


def info_there(url: str, key: str) -> dict[str, Any]:
    """Describe the server at `url`. Raises the errors of `Client.request`."""
    with Client(url, key) as client:
        answer: dict[str, Any] = client.request("/info")
    return answer


def show_classification(answer: Comparison) -> None:
    """Print a table of the labels, best first, and the defense's report."""
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
    for line in (_summary(answer), _diagnostics(answer), _cost(answer)):
        if line:
            screen.print(escape(line))


def show_info(facts: Mapping[str, Any]) -> None:
    """Print a line for each fact: its name, dotted where nested, and its value on one line, so
    that a hash can be copied."""
    rows = _flatten("", facts)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def _bar(share: float) -> str:
    """A bar of block characters, to an eighth of a block."""
    eighths = round(8 * BAR * share)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _summary(answer: Comparison) -> str:
    undefended, defended = answer.undefended[0].label, answer.labels[0].label
    if undefended == defended:
        return f"Both say {defended}."
    return f"Undefended CLIP says {undefended}, the defense says {defended}."


def _diagnostics(answer: Comparison) -> str:
    """The diagnostics; empty if the server does not show them."""
    report = answer.defense
    if report.entropy_before is None or report.agreement is None or report.suspicion is None:
        return ""
    line = (
        f"entropy {report.entropy_before:.2f} to {report.entropy_after:.2f} nats, "
        f"{report.agreement:.0%} of the views agree, suspicion {report.suspicion:.2f}"
    )
    return f"{line}, above the threshold" if report.suspected else line


def _cost(answer: Comparison) -> str:
    report, times = answer.defense, answer.timings_ms
    line = (
        f"{report.method} ({report.design}): {report.steps} steps, {report.views_kept} of "
        f"{report.views} views kept; decode {times.decode:.0f}, adapt {times.adapt:.0f}, "
        f"predict {times.predict:.0f}, in all {times.total:.0f} ms"
    )
    return f"{line}, cut short by the {report.truncated}" if report.truncated else line


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
        from service.worker.runner import Runner  # takes seconds, so only when needed

        runner: Runner = Runner(settings, 0)
        return runner
