"""`POST /v1/classify`: an image and labels in, ranked labels and the defense's report out."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from service.http.authentication import check_key
from service.http.response import build_response
from service.http.routes.docs import ERRORS, FORM, REQUEST_ID, body_of
from service.intake.image_urls import ImageURL, read_source
from service.intake.intake import Intake
from service.intake.multipart import read_form
from service.schemas import Choices, Classification, ClassifyRequest

router = APIRouter(tags=["classification"])


@router.post(
    "/v1/classify",
    summary="Classify an image",
    response_model=Classification,
    responses={200: {"headers": REQUEST_ID}, **ERRORS},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": body_of(ClassifyRequest), "multipart/form-data": FORM},
        }
    },
    dependencies=[Depends(check_key)],
)
async def classify(request: Request) -> Response:
    """Send a form with the file, or JSON with the file as base64. The labels come back best
    first, with what the defense spent and what it saw."""
    state = request.app.state
    intake: Intake = state.intake
    max_labels: int = state.settings.max_labels

    def parse(body: bytes, content_type: str) -> tuple[bytes | ImageURL, Choices]:
        if content_type.lower().startswith("multipart/form-data"):
            file, rest = read_form(body, content_type, max_labels)
            return file, Choices.model_validate(rest)
        asked = ClassifyRequest.model_validate_json(body)
        return read_source(asked.image), asked

    outcome = await intake.classify(request, parse)
    answer = build_response(
        outcome, state.settings.expose, request.state.caller.may_see_diagnostics
    )
    return Response(answer.model_dump_json(), media_type="application/json")
