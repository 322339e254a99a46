"""`POST /`: the wire format of Hugging Face's zero-shot-image-classification task.

The body of the answer is theirs, a bare list; the defense's report goes into headers.
"""

from functools import partial

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from service.errors import BadRequest
from service.http.authentication import check_key
from service.http.query import refuse_query
from service.http.response import ScoredLabel, report_headers
from service.http.routes.classify import respond
from service.http.routes.docs import ERROR_RESPONSES, REPORT, REQUEST_ID, describe_body
from service.intake.body import read_json
from service.intake.image_urls import ImageURL, read_source
from service.intake.intake import Intake
from service.intake.requests import ClassifyOptions, HFRequest, TextLimits

router = APIRouter(tags=["classification"])


@router.post(
    "/",
    summary="Classify an image, for Hugging Face clients",
    response_model=list[ScoredLabel],
    responses={200: {"headers": REQUEST_ID | REPORT}, **ERROR_RESPONSES},
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": describe_body(HFRequest)}}
    },
    dependencies=[Depends(check_key), Depends(refuse_query)],
)
async def classify(request: Request) -> JSONResponse:
    """For `InferenceClient(model=URL).zero_shot_image_classification(...)` and its counterparts in
    other languages. The older shapes `{"image": ...}`, `{"inputs": {"image": ...}}` and
    comma-separated labels are accepted too."""
    state = request.app.state
    intake: Intake = state.intake
    async with intake.admit(request) as ticket:
        if ticket.content_type.strip().lower().startswith("multipart/"):
            raise BadRequest("This route takes JSON; send forms to `/v1/classify`.")
        limits = TextLimits.of(state.settings)
        task, options = await intake.prepare(ticket, partial(_read, limits=limits))
        answer = await state.engine.submit(ticket.permit, task)
        shown = respond(request, ticket, task, answer, options.top_k)
    return JSONResponse([each.model_dump() for each in shown.labels], headers=report_headers(shown))


def _read(body: bytes, limits: TextLimits) -> tuple[bytes | ImageURL, ClassifyOptions]:
    asked = read_json(HFRequest, body, limits)
    return read_source(asked.inputs), asked.options
