"""`POST /demo/...`: what the page needs to show an attack and the views. Mounted only where
`enable_attack_demo` is on, which is never anywhere but on a loopback address."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse
from numpy.typing import NDArray
from PIL import Image

from service.errors import InternalError, QueueFull, ServiceError, Unauthorized
from service.http.access_log import error_body
from service.http.authentication import check_key
from service.http.response import build_response
from service.intake.decode import from_base64
from service.intake.intake import Intake, Outcome
from service.messages import DemoAttack, ProgressEvent, Task
from service.schemas import (
    AttackRequest,
    AttackStage,
    Choices,
    ClassifyRequest,
    ExhibitedClassification,
    ScoredLabel,
    View,
)

MAX_EPSILON = 16  # levels of 255
MAX_STEPS = 40
MAX_ADAPTIVE_STEPS = 20  # one costs as much as several answers
THUMBNAIL = 96  # pixels
AGAIN = 3.0  # seconds after which a refused attack may try again


async def check_insight(request: Request) -> None:
    """Raises Unauthorized unless the caller may see how the defense fared: all of this shows it."""
    await check_key(request)
    if not request.state.caller.may_see_diagnostics:
        raise Unauthorized("This key lacks the scope `diagnostics`, which the demonstration needs.")


router = APIRouter(prefix="/demo", include_in_schema=False, dependencies=[Depends(check_insight)])


@router.post("/classify")
async def classify(request: Request) -> JSONResponse:
    """As `POST /v1/classify` with JSON; the answer shows the views too."""
    intake: Intake = request.app.state.intake

    def parse(body: bytes, content_type: str) -> tuple[bytes, Choices]:
        asked = ClassifyRequest.model_validate_json(body)
        return from_base64(asked.image), asked

    outcome = await intake.classify(request, parse, lambda work: replace(work, return_views=True))
    return JSONResponse(_exhibit(outcome).model_dump())


@router.post("/attack")
async def attack(request: Request) -> StreamingResponse:
    """Attack the picture and answer as it goes: a line of JSON for each stage, then one with the
    answer about the last, or with an error. One attack at a time."""
    state, intake = request.app.state, request.app.state.intake
    if getattr(state, "attacking", False):
        raise QueueFull("Another attack is running; there is one at a time.", retry_after=AGAIN)
    state.attacking = True
    news: asyncio.Queue[ProgressEvent | None] = asyncio.Queue()
    assaults: list[DemoAttack] = []
    works: list[Task] = []

    def parse(body: bytes, content_type: str) -> tuple[bytes, Choices]:
        asked = AttackRequest.model_validate_json(body)
        assaults.append(_plan(asked))
        return from_base64(asked.image), asked

    def amend(work: Task) -> Task:
        works.append(replace(work, attack=assaults[0]))
        return works[0]

    def finish(task: "asyncio.Task[Outcome]") -> None:
        state.attacking = False
        news.put_nowait(None)

    task: asyncio.Task[Outcome] = asyncio.create_task(
        intake.classify(request, parse, amend, news.put_nowait)
    )
    task.add_done_callback(finish)
    try:
        first = await news.get()
    except asyncio.CancelledError:
        task.cancel()
        raise
    if first is None:
        task.result()  # a refusal before anything began has a status of its own
        raise InternalError("The attack ended before it began.")

    async def tell() -> AsyncIterator[str]:
        event: ProgressEvent | None = first
        try:
            while event:
                stage = _stage(event, works[0])
                yield _line({"stage": stage.model_dump()})
                event = await news.get()
            yield _line(_end(task, assaults[0], request.state.request_id))
        finally:
            task.cancel()

    return StreamingResponse(tell(), media_type="application/x-ndjson")


def _plan(asked: AttackRequest) -> DemoAttack:
    wanted = asked.attack
    target = None if wanted.target is None else asked.candidate_labels.index(wanted.target)
    limit = MAX_ADAPTIVE_STEPS if wanted.adaptive else MAX_STEPS
    return DemoAttack(
        min(wanted.epsilon, MAX_EPSILON), min(wanted.steps, limit), target, wanted.adaptive
    )


def _stage(event: ProgressEvent, work: Task) -> AttackStage:
    def scored(scores: list[float]) -> list[ScoredLabel]:
        pairs = zip(work.labels, scores, strict=True)
        return [ScoredLabel(label=label, score=min(1.0, max(0.0, s))) for label, s in pairs]

    assert work.attack is not None
    defended = event.defended_scores
    return AttackStage(
        step=event.step,
        steps=work.attack.steps,
        image=_data_uri(event.image),
        undefended=scored(event.undefended_scores),
        defended=None if defended is None else scored(defended),
    )


def _end(task: "asyncio.Task[Outcome]", attack: DemoAttack, request_id: str) -> dict[str, Any]:
    try:
        outcome = task.result()
    except ServiceError as error:
        return error_body(error, request_id)
    return {
        "answer": _exhibit(outcome).model_dump(),
        "threat": "adaptive" if attack.adaptive else "transfer",
        "epsilon": attack.epsilon,
        "truncated": outcome.answer.truncated,
    }


def _exhibit(outcome: Outcome) -> ExhibitedClassification:
    labels = outcome.work.labels
    views = [
        View(
            label=labels[seen.best],
            score=seen.score,
            kept=seen.kept,
            thumbnail=_data_uri(seen.image, THUMBNAIL),
        )
        for seen in outcome.answer.view_reports
    ]
    shown = build_response(outcome, "full", diagnostics=True)
    return ExhibitedClassification(**shown.model_dump(), views=views)


def _data_uri(image: NDArray[np.uint8], side: int | None = None) -> str:
    """A lossless PNG, scaled down to a side of so many pixels if it is larger."""
    picture = Image.fromarray(image)
    if side:
        picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"
