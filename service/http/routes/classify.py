"""`POST /v1/classify`: an image and labels in, ranked labels and the defense's report out."""

import time
from functools import partial

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from service.http.authentication import check_key
from service.http.query import refuse_query
from service.http.response import Classification, build_response
from service.http.routes.docs import ERROR_RESPONSES, FORM, REQUEST_ID, describe_body
from service.intake.body import read_json, validate
from service.intake.image_urls import ImageURL, read_source
from service.intake.intake import Intake, Ticket
from service.intake.multipart import read_form
from service.intake.requests import ClassifyOptions, ClassifyRequest, TextLimits
from service.messages import Answer, Task

router = APIRouter(tags=["classification"])


@router.post(
    "/v1/classify",
    summary="Classify an image",
    response_model=Classification,
    responses={200: {"headers": REQUEST_ID}, **ERROR_RESPONSES},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": describe_body(ClassifyRequest),
                "multipart/form-data": FORM,
            },
        }
    },
    dependencies=[Depends(check_key), Depends(refuse_query)],
)
async def classify(request: Request) -> Response:
    """Send a form with the file, or JSON with the file as base64. The labels come back best
    first, together with what the defense did and measured."""
    state = request.app.state
    intake: Intake = state.intake
    async with intake.admit(request) as ticket:
        limits = TextLimits.of(state.settings)
        read = partial(_read, content_type=ticket.content_type, limits=limits)
        task, options = await intake.prepare(ticket, read)
        answer = await state.engine.submit(ticket.permit, task)
        shown = respond(request, ticket, task, answer, options.top_k)
    return Response(shown.model_dump_json(), media_type="application/json")


def respond(
    request: Request, ticket: Ticket, task: Task, answer: Answer, top_k: int | None
) -> Classification:
    """The answer as the caller of this request may see it."""
    state = request.app.state
    # Logged beside the key's id: only there can an operator see that a surge has one caller.
    ticket.log["suspected"] = answer.suspected
    return build_response(
        task,
        answer,
        model=state.engine.info["model"]["name"],
        queue_seconds=ticket.permit.waited,
        decode_seconds=ticket.decode_seconds,
        total_seconds=time.monotonic() - ticket.started,
        top_k=top_k,
        expose=state.settings.expose,
        diagnostics=request.state.caller.may_see_diagnostics,
    )


def _read(
    body: bytes, content_type: str, limits: TextLimits
) -> tuple[bytes | ImageURL, ClassifyOptions]:
    if content_type.lower().startswith("multipart/form-data"):
        file, fields = read_form(body, content_type, limits.labels)
        return file, validate(ClassifyOptions, fields, limits)
    asked = read_json(ClassifyRequest, body, limits)
    return read_source(asked.image), asked.without_image()
