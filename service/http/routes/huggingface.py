"""`POST /`: the wire format of Hugging Face's zero-shot-image-classification task.

The body of the answer is theirs, a bare list; what the native route adds goes into headers.
"""

from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from service.http.authentication import check_key
from service.http.response import build_response
from service.http.routes.docs import ERRORS, REPORT, REQUEST_ID, body_of
from service.intake.image_urls import ImageURL, read_source
from service.intake.intake import Intake
from service.schemas import Choices, Classification, HFRequest, ScoredLabel

router = APIRouter(tags=["classification"])


@router.post(
    "/",
    summary="Classify an image, for Hugging Face clients",
    response_model=list[ScoredLabel],
    responses={200: {"headers": REQUEST_ID | REPORT}, **ERRORS},
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": body_of(HFRequest)}}
    },
    dependencies=[Depends(check_key)],
)
async def classify(request: Request) -> JSONResponse:
    """For `InferenceClient(model=URL).zero_shot_image_classification(...)` and its kin in other
    languages. The older shapes `{"image": ...}`, `{"inputs": {"image": ...}}` and comma-separated
    labels are read too."""
    state = request.app.state
    intake: Intake = state.intake
    outcome = await intake.classify(request, _parse)
    answer = build_response(
        outcome, state.settings.expose, request.state.caller.may_see_diagnostics
    )
    return JSONResponse([label.model_dump() for label in answer.labels], headers=_report(answer))


def _parse(body: bytes, content_type: str) -> tuple[bytes | ImageURL, Choices]:
    asked = HFRequest.model_validate_json(body)
    return read_source(asked.inputs), asked.choices


def _report(answer: Classification) -> dict[str, str]:
    """The headers of `docs.REPORT`; those without a value are left out."""
    defense, timings = answer.defense, answer.timings_ms
    undefended = defense.undefended_label
    values = {
        "x-defense-tier": defense.tier,
        "x-defense-method": defense.method,
        "x-defense-design": defense.design,
        "x-defense-steps": defense.steps,
        "x-defense-views": defense.views,
        "x-defense-views-kept": defense.views_kept,
        "x-defense-readout": defense.readout,
        "x-defense-truncated": defense.truncated,
        "x-labels-truncated": defense.labels_truncated,
        "x-entropy-before": defense.entropy_before,
        "x-entropy-after": defense.entropy_after,
        "x-agreement": defense.agreement,
        "x-suspicion": defense.suspicion,
        "x-suspected": None if defense.suspected is None else str(defense.suspected).lower(),
        "x-undefended-label": None if undefended is None else quote(undefended, safe=""),
        "x-queue-time": timings.queue,
        "x-inference-time": round(timings.adapt + timings.predict, 3),
        "x-total-time": timings.total,
    }
    return {name: str(value) for name, value in values.items() if value is not None}
