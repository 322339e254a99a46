"""`GET /info` and `GET /metrics`."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from prometheus_client.exposition import choose_encoder

from models.images.decode import FORMATS, MAX_ASPECT, MAX_LONG_SIDE, MAX_SHORT_SIDE
from service.http.authentication import ANYONE, Caller, check_key, check_metrics
from service.http.routes.docs import describe_errors
from service.http.routes.health import is_ready
from service.settings import Settings
from service.telemetry.metrics import Metrics

router = APIRouter(tags=["operation"], responses=describe_errors(401))

DEFAULTS = ("tier", "method", "steps", "views", "readout", "hypothesis_template")
LIMITS = (
    "max_tier",
    "max_steps",
    "max_views",
    "max_labels",
    "max_label_chars",
    "max_body_bytes",
    "max_image_pixels",
    "max_queue_size",
    "max_batch_size",
    "request_timeout_ms",
    "upload_timeout_ms",
)
POLICIES = ("allow_client_seed", "allow_image_urls", "expose")


@router.get("/info", summary="Model, limits, defaults, versions", dependencies=[Depends(check_key)])
async def info(request: Request) -> dict[str, Any]:
    """The model (once a worker has loaded it), and the settings that concern a client."""
    settings: Settings = request.app.state.settings
    values = settings.model_dump()
    images = {
        "formats": FORMATS,
        "shorter_side": MAX_SHORT_SIDE,
        "longer_side": MAX_LONG_SIDE,
        "max_aspect": MAX_ASPECT,
    }
    return {
        **_hide_thresholds(request.app.state.engine.info, request.state.caller),
        "service": {"name": "tapt-serve", "version": version("tapt-serve")},
        "defaults": {name: values[name] for name in DEFAULTS},
        "limits": {name: values[name] for name in LIMITS},
        "policies": {name: values[name] for name in POLICIES}
        | {
            "keys": request.app.state.keys.needed,
            "attack_demo": settings.enable_attack_demo and request.state.caller.may_see_diagnostics,
        },
        "images": images,
    }


def _hide_thresholds(info: dict[str, Any], caller: Caller) -> dict[str, Any]:
    """An attacker who knows when an answer counts as suspected can stay below."""
    if caller.may_see_diagnostics or not info.get("bundle"):
        return info
    hidden = {"suspicion", "false_positive_rate"}
    shown = {name: value for name, value in info["bundle"].items() if name not in hidden}
    return info | {"bundle": shown}


@router.head("/metrics", include_in_schema=False, dependencies=[Depends(check_metrics)])
@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    dependencies=[Depends(check_metrics)],
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Metrics of the API process and its workers; those of DIAGNOSTICS only for keys with the scope
    `diagnostics`."""
    metrics: Metrics = request.app.state.metrics
    metrics.ready.set(is_ready(request))
    request.app.state.keys.refresh()  # for its metrics, also while no request checks a key
    caller = getattr(request.state, "caller", ANYONE)  # none where the operator opened the route
    registry = metrics.registry if caller.may_see_diagnostics else metrics.open_registry
    try:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
    except (ValueError, TypeError):  # a version that is no number; the header is only a wish
        encode, content_type = choose_encoder("")
    return Response(encode(registry), headers={"Content-Type": content_type})
