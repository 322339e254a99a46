"""`GET /docs`: the OpenAPI description in a browser, served without resources from other hosts.

The routes read their bodies themselves, so the parts of the description that FastAPI would derive
from its parameters are built here.
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
from service.http.content_policy import content_policy
from service.http.response import INFERENCE_HEADER, DefenseReport, ErrorBody, Timings, header_names
from service.intake.requests import ClassifyOptions, ClassifyRequest, DefenseOptions, HFRequest

router = APIRouter(include_in_schema=False, dependencies=[Depends(check_pages)])

_REF = "#/components/schemas/{model}"
_TOP_LEVEL = ("top_k", "hypothesis_template")
_BODIES: tuple[type[BaseModel], ...] = (ClassifyOptions, ClassifyRequest, HFRequest)


def _header(text: str, kind: str = "string") -> dict[str, Any]:
    return {"description": text, "schema": {"type": kind}}


REQUEST_ID = {"X-Request-Id": _header("The client's own id, or a new one.")}
_RETRY = {"Retry-After": _header("Seconds to wait before trying again.", "integer")}
_CHALLENGE = {"WWW-Authenticate": _header("`Bearer`.")}


def _report() -> dict[str, Any]:
    """The headers of the Hugging Face route, described by the fields that they return."""
    headers = {INFERENCE_HEADER: _header("Adapting and predicting, milliseconds.", "number")}
    for model in (DefenseReport, Timings):
        fields = model.model_json_schema()["properties"]
        for name, header in header_names(model).items():
            kind = fields[name].get("type") or fields[name]["anyOf"][0]["type"]  # the other is null
            headers[header] = _header(fields[name]["description"], kind)
    return headers


REPORT = _report()

_DESCRIPTIONS = {
    400: "The body, its base64 or its image is malformed.",
    401: "The key is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "The body is too large, or the image has too many pixels.",
    415: "The image is in no supported format, or the body in no supported encoding.",
    422: "The labels, the template or another value are invalid.",
    429: "The queue is full, or this key has reached a limit.",
    500: "The server failed.",
    503: "The server is loading, recovering or shutting down.",
    504: "The deadline passed.",
}


def describe_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these statuses."""
    extra = {401: _CHALLENGE, 429: _RETRY, 503: _RETRY}
    return {
        status: {
            "model": ErrorBody,
            "description": _DESCRIPTIONS[status],
            "headers": REQUEST_ID | extra.get(status, {}),
        }
        for status in statuses
    }


ERROR_RESPONSES = describe_errors(*_DESCRIPTIONS)


def describe_body(model: type[BaseModel]) -> dict[str, Any]:
    """An OpenAPI request body; `add_bodies` adds the model's schema."""
    return {"schema": {"$ref": _REF.format(model=model.__name__)}}


def _form() -> dict[str, Any]:
    """The multipart form: the file, the fields of `ClassifyOptions` and, flat, of its defense."""
    flat = {name: ClassifyOptions.model_json_schema()["properties"][name] for name in _TOP_LEVEL}
    flat |= DefenseOptions.model_json_schema()["properties"]
    for field in flat.values():
        field |= field.pop("anyOf")[0]  # a form omits what JSON may set to null
        field.pop("default", None)
    labels = {
        "type": "array",
        "items": {"type": "string"},
        "description": "Repeated, or once with a JSON array or a comma-separated list. "
        "`candidate_labels` is accepted too.",
        "example": ["cat", "dog"],
    }
    properties = {
        "image": {"type": "string", "format": "binary"},
        "labels": labels,
        "defense": {
            "type": "string",
            "description": "DefenseOptions as JSON, instead of single fields.",
        },
        **flat,
    }
    schema = {"type": "object", "required": ["image", "labels"], "properties": properties}
    # Without `explode`, Swagger UI sends the labels as one field.
    return {"schema": schema, "encoding": {"labels": {"style": "form", "explode": True}}}


FORM = _form()


def add_bodies(app: FastAPI) -> None:
    """Add the request bodies to the app's OpenAPI."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            prefix = app.state.settings.root_path
            app.openapi_schema = get_openapi(
                title=app.title,
                summary=app.summary,
                version=app.version,
                routes=app.routes,
                servers=[{"url": prefix}] if prefix else None,
            )
            models = [(model, "validation") for model in _BODIES]
            _, described = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
            app.openapi_schema["components"]["schemas"] |= described["$defs"]
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


# Relative URLs, so that a proxy may serve this under a prefix.
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
    'const dark = matchMedia("(prefers-color-scheme: dark)"); '
    'const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches); '
    'dark.addEventListener("change", follow); follow(); '
    'SwaggerUIBundle({url: "openapi.json", dom_id: "#api", deepLinking: true, '
    "displayRequestDuration: true});"
)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data: blob:; base-uri 'none'"
)
_HEADERS = {"X-Content-Type-Options": "nosniff"}


@router.get("/openapi.json")
async def openapi(request: Request) -> JSONResponse:
    return JSONResponse(request.app.openapi())


@router.get("/docs")
async def page(request: Request) -> Response:
    headers = _HEADERS | content_policy(request, _POLICY)
    return Response(_PAGE, headers=headers, media_type="text/html")


@router.get("/docs/{name}")
async def asset(name: str, request: Request) -> Response:
    kinds = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
    if name == "start.js":
        headers = _HEADERS | content_policy(request, _POLICY)
        return Response(_START, headers=headers, media_type="text/javascript")
    if name not in kinds:
        raise NotFound("There is nothing at this URL.")
    body = files("fastapi_offline").joinpath("static", name).read_bytes()
    headers = _HEADERS | content_policy(request, _POLICY) | {"Cache-Control": "max-age=86400"}
    return Response(body, headers=headers, media_type=kinds[name])
