"""`POST /demo/...`: an attack step by step, and the views of an image, for the playground.

Mounted only with `enable_attack_demo`, which needs a loopback `host`.
"""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse
from numpy.typing import NDArray
from PIL import Image

from service.engine.engine import Engine
from service.errors import InternalError, QueueFull, ServiceError, Unauthorized
from service.http.access_log import error_body
from service.http.authentication import check_key
from service.http.query import refuse_query
from service.http.response import AttackStage, DemoClassification, ScoredLabel, View, clamp
from service.http.routes.classify import respond
from service.http.same_site import check_same_site
from service.intake.body import read_json
from service.intake.decode import from_base64
from service.intake.intake import Intake, Ticket
from service.intake.requests import AttackRequest, ClassifyRequest, TextLimits
from service.messages import Answer, DemoAttack, ProgressEvent, Task

MAX_EPSILON = 16  # levels of 255
MAX_STEPS = 40
MAX_ADAPTIVE_STEPS = 20  # one costs as much as several answers
THUMBNAIL = 96  # pixels
RETRY_AFTER = 3.0  # seconds, while another attack runs


async def check_diagnostics(request: Request) -> None:
    """Raises Unauthorized unless the caller may see diagnostics: every answer here shows them."""
    await check_key(request)
    if not request.state.caller.may_see_diagnostics:
        raise Unauthorized("This key lacks the scope `diagnostics`, which the demonstration needs.")


router = APIRouter(
    prefix="/demo",
    include_in_schema=False,
    dependencies=[Depends(check_same_site), Depends(check_diagnostics), Depends(refuse_query)],
)


@router.post("/classify")
async def classify(request: Request) -> JSONResponse:
    """Like `POST /v1/classify` with JSON, and the answer shows the views."""
    state = request.app.state
    intake: Intake = state.intake
    async with intake.admit(request) as ticket:
        limits = TextLimits.of(state.settings)
        task, asked = await intake.prepare(ticket, partial(_read_classify, limits=limits))
        task = replace(task, return_views=True)
        answer = await state.engine.submit(ticket.permit, task)
        shown = _with_views(request, ticket, task, answer, asked.top_k)
    return JSONResponse(shown.model_dump())


@router.post("/attack")
async def attack(request: Request) -> StreamingResponse:
    """Attack the image and stream lines of JSON: one for each stage, then one with the answer for
    the last image or with an error. One attack runs at a time."""
    state = request.app.state
    if getattr(state, "attacking", False):
        raise QueueFull("Another attack is running; only one may run.", retry_after=RETRY_AFTER)
    state.attacking = True
    lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    running = asyncio.create_task(_attack(request, lines))

    def finish(running: "asyncio.Task[None]") -> None:
        state.attacking = False
        lines.put_nowait(None)

    running.add_done_callback(finish)
    try:
        first = await lines.get()
    except asyncio.CancelledError:
        running.cancel()
        raise
    if first is None:
        await running  # an error before the first stage has its own status
        raise InternalError("The attack ended before its first stage.")
    stream = _stream(first, lines, running, request.state.request_id)
    return StreamingResponse(stream, media_type="application/x-ndjson")


async def _attack(request: Request, lines: asyncio.Queue[dict[str, Any] | None]) -> None:
    """Run the attack and put each stage and the answer on `lines`.

    A task of its own: its admission must end in the task in which it began, and the response is
    streamed by another one.
    """
    intake: Intake = request.app.state.intake
    engine: Engine = request.app.state.engine
    async with intake.admit(request) as ticket:
        limits = TextLimits.of(request.app.state.settings)
        task, asked = await intake.prepare(ticket, partial(_read_attack, limits=limits))
        attack = _limit(asked)
        task = replace(task, attack=attack)
        async with aclosing(engine.stream(ticket.permit, task)) as events:
            async for event in events:
                if isinstance(event, ProgressEvent):
                    stage = _stage(event, task.labels, attack.steps)
                    lines.put_nowait({"stage": stage.model_dump()})
                    continue
                shown = _with_views(request, ticket, task, event, asked.top_k)
                lines.put_nowait(
                    {
                        "answer": shown.model_dump(),
                        "threat": "adaptive" if attack.adaptive else "transfer",
                        "epsilon": attack.epsilon,
                        "truncated": event.truncated,
                    }
                )


async def _stream(
    first: dict[str, Any],
    lines: asyncio.Queue[dict[str, Any] | None],
    running: "asyncio.Task[None]",
    request_id: str,
) -> AsyncIterator[str]:
    line: dict[str, Any] | None = first
    try:
        while line is not None:
            yield _to_line(line)
            line = await lines.get()
        await running
    except ServiceError as error:
        yield _to_line(error_body(error, request_id))
    finally:
        running.cancel()


def _read_classify(body: bytes, limits: TextLimits) -> tuple[bytes, ClassifyRequest]:
    asked = read_json(ClassifyRequest, body, limits)
    return from_base64(asked.image), asked.without_image()


def _read_attack(body: bytes, limits: TextLimits) -> tuple[bytes, AttackRequest]:
    asked = read_json(AttackRequest, body, limits)
    return from_base64(asked.image), asked.without_image()


def _limit(asked: AttackRequest) -> DemoAttack:
    """The attack asked for, within the limits."""
    wanted = asked.attack
    target = None if wanted.target is None else asked.candidate_labels.index(wanted.target)
    limit = MAX_ADAPTIVE_STEPS if wanted.adaptive else MAX_STEPS
    return DemoAttack(
        min(wanted.epsilon, MAX_EPSILON), min(wanted.steps, limit), target, wanted.adaptive
    )


def _stage(event: ProgressEvent, labels: tuple[str, ...], steps: int) -> AttackStage:
    def scored(scores: list[float]) -> list[ScoredLabel]:
        pairs = zip(labels, scores, strict=True)
        return [ScoredLabel(label=label, score=clamp(score)) for label, score in pairs]

    defended = event.defended_scores
    return AttackStage(
        step=event.step,
        steps=steps,
        image=_data_uri(event.image),
        undefended=scored(event.undefended_scores),
        defended=None if defended is None else scored(defended),
    )


def _with_views(
    request: Request, ticket: Ticket, task: Task, answer: Answer, top_k: int | None
) -> DemoClassification:
    views = [
        View(
            label=task.labels[view.best],
            score=view.score,
            kept=view.kept,
            thumbnail=_data_uri(view.image, THUMBNAIL),
        )
        for view in answer.view_reports
    ]
    shown = respond(request, ticket, task, answer, top_k)
    return DemoClassification(**shown.model_dump(), views=views)


def _data_uri(image: NDArray[np.uint8], max_side: int | None = None) -> str:
    """An image as a lossless PNG, scaled down to at most `max_side` pixels a side."""
    picture = Image.fromarray(image)
    if max_side:
        picture.thumbnail((max_side, max_side))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _to_line(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"
