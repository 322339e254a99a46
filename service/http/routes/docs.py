"""`GET /docs`: the OpenAPI description in a browser, with no resource from elsewhere.

Bodies are streamed by hand, so what FastAPI would describe by itself is described here.
"""

from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.errors import NotFound
from service.http.authentication import check_pages
from service.schemas import Choices, ClassifyRequest, DefenseOptions, ErrorBody, HFRequest

router = APIRouter(include_in_schema=False, dependencies=[Depends(check_pages)])

_REF = "#/components/schemas/{model}"
_PLAIN = ("top_k", "hypothesis_template")
_BODIES: tuple[type[BaseModel], ...] = (Choices, ClassifyRequest, HFRequest)


def _header(text: str, kind: str = "string") -> dict[str, Any]:
    return {"description": text, "schema": {"type": kind}}


REQUEST_ID = {"X-Request-Id": _header("The client's own, or a new one.")}
_RETRY = {"Retry-After": _header("Seconds after which to try again.", "integer")}
_CHALLENGE = {"WWW-Authenticate": _header("`Bearer`.")}

REPORT = {
    "x-defense-tier": _header("Tier that was granted."),
    "x-defense-method": _header("Defense that ran."),
    "x-defense-design": _header("Which prompts adapted."),
    "x-defense-steps": _header("Adaptation steps done.", "integer"),
    "x-defense-views": _header("Views taken.", "integer"),
    "x-defense-views-kept": _header("Views that the loss was taken over.", "integer"),
    "x-defense-readout": _header("Views that the prediction was read from."),
    "x-defense-truncated": _header("`deadline` when cut short, else absent."),
    "x-labels-truncated": _header("Labels cut to the model's context.", "integer"),
    "x-entropy-before": _header("Nats, before adapting.", "number"),
    "x-entropy-after": _header("Nats, after adapting.", "number"),
    "x-agreement": _header("Share of the views that agree with the answer.", "number"),
    "x-suspicion": _header("Grows with the signs of an attack.", "number"),
    "x-suspected": _header("Whether suspicion passed the threshold.", "boolean"),
    "x-undefended-label": _header("What plain CLIP would have answered, percent-encoded UTF-8."),
    "x-queue-time": _header("Milliseconds in the queue.", "number"),
    "x-inference-time": _header("Milliseconds of adapting and predicting.", "number"),
    "x-total-time": _header("Milliseconds in all.", "number"),
}
"""Headers of the Hugging Face route, which has no room for a report in its body."""

_MEANINGS = {
    400: "The body, its base64 or its image is malformed.",
    401: "The key is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "The body is too long, or the image has too many pixels.",
    415: "Not an image of a known format.",
    422: "The request makes no sense: labels, template or a value.",
    429: "The queue is full, or this key asks for too much.",
    500: "A fault of the server.",
    503: "Loading, recovering or shutting down.",
    504: "The deadline passed.",
}


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses for these statuses, all of one shape."""
    extra = {401: _CHALLENGE, 429: _RETRY, 503: _RETRY}
    return {
        status: {
            "model": ErrorBody,
            "description": _MEANINGS[status],
            "headers": REQUEST_ID | extra.get(status, {}),
        }
        for status in statuses
    }


ERRORS = errors_of(*_MEANINGS)


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": _REF.format(model=model.__name__)}}


def _form() -> dict[str, Any]:
    """The multipart form: a file, the fields of `Choices`, those of its defense laid out flat."""
    flat = {name: Choices.model_json_schema()["properties"][name] for name in _PLAIN}
    flat |= DefenseOptions.model_json_schema()["properties"]
    for field in flat.values():
        field |= field.pop("anyOf")[0]  # a form leaves out what JSON may set to null
        field.pop("default", None)
    labels = {
        "type": "array",
        "items": {"type": "string"},
        "description": "Repeated, or once with a JSON array or a comma-separated list; "
        "`candidate_labels` is read as well.",
        "example": ["cat", "dog"],
    }
    properties = {
        "image": {"type": "string", "format": "binary"},
        "labels": labels,
        "defense": {
            "type": "string",
            "description": "DefenseOptions as JSON, instead of the single fields.",
        },
        **flat,
    }
    schema = {"type": "object", "required": ["image", "labels"], "properties": properties}
    # Without `explode`, a browser would send the labels as one field.
    return {"schema": schema, "encoding": {"labels": {"style": "form", "explode": True}}}


FORM = _form()


def complete(app: FastAPI) -> None:
    """Add to the app's OpenAPI the bodies that FastAPI cannot see."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(
                title=app.title, summary=app.summary, version=app.version, routes=app.routes
            )
            models = [(model, "validation") for model in _BODIES]
            _, described = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
            app.openapi_schema["components"]["schemas"] |= described["$defs"]
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


# Addresses relative to the page, so that a proxy may put the service under a prefix.
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>tapt-serve API</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="data:,">
<div id="api"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
"""
_START = (
    'SwaggerUIBundle({url: "openapi.json", dom_id: "#api", deepLinking: true, '
    "displayRequestDuration: true});"
)
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "connect-src 'self'; img-src 'self' data: blob:; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}


@router.get("/openapi.json")
async def openapi(request: Request) -> JSONResponse:
    return JSONResponse(request.app.openapi())


@router.get("/docs")
async def page() -> Response:
    return Response(_PAGE, headers=_HEADERS, media_type="text/html")


@router.get("/docs/{name}")
async def asset(name: str) -> Response:
    kinds = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
    if name == "start.js":
        return Response(_START, headers=_HEADERS, media_type="text/javascript")
    if name not in kinds:
        raise NotFound("There is nothing at this address.")
    body = files("fastapi_offline").joinpath("static", name).read_bytes()
    headers = _HEADERS | {"Cache-Control": "max-age=86400"}
    return Response(body, headers=headers, media_type=kinds[name])
