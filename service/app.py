"""The ASGI application: its parts, its lifespan and its error responses."""

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route

from service.engine.engine import Engine
from service.errors import BadRequest, MethodNotAllowed, NotFound, ServiceError, Unauthorized
from service.http.access_log import AccessLog, error_body
from service.http.authentication import Keys
from service.http.routes import classify, demo, docs, health, huggingface, info, page
from service.intake.intake import Intake
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.telemetry.traces import TELEMETRY
from service.worker.supervisor import Backend, WorkerProcess

ROUTERS = [module.router for module in (classify, huggingface, health, info, docs, page)]


def create_app(settings: Settings, backend: Backend | None = None) -> FastAPI:
    """The ASGI application. Tests pass a `backend` in place of the worker processes.

    The engine is `app.state.engine`.
    """
    backends: Sequence[Backend] = (
        [WorkerProcess(settings, index) for index in range(settings.workers)]
        if backend is None
        else [backend]
    )
    metrics = Metrics(settings.latency_objective_ms / 1000)
    engine = Engine(settings, metrics, backends)
    intake = Intake(settings, metrics, engine)
    keys = Keys(settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        await intake.start()
        yield
        await engine.stop(settings.drain_timeout_s)
        await intake.stop()

    app = FastAPI(
        title="tapt-serve",
        summary="Zero-shot image classification that defends itself at test time.",
        version=version("tapt-serve"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        telemetry=TELEMETRY,
    )
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.engine = engine
    app.state.intake = intake
    app.state.keys = keys
    for router in ROUTERS:
        app.include_router(router)
    if settings.enable_attack_demo:
        app.include_router(demo.router)
    docs.add_bodies(app)
    app.add_exception_handler(ServiceError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "Content-Encoding", "X-Request-Id"],
            expose_headers=[*docs.REQUEST_ID, *docs.REPORT, "Retry-After"],
        )
    app.add_middleware(AccessLog, metrics=metrics)  # the last one is the outermost
    return app


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    request.state.log["error"] = error.error_type
    return JSONResponse(error_body(error, request.state.request_id), error.status, headers)


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Errors of the router, in the same format as all others."""
    assert isinstance(error, HTTPException)
    known: ServiceError
    match error.status_code:
        case 404:
            known = NotFound("There is nothing at this URL.")
        case 405:
            known = MethodNotAllowed("This URL does not support that method.")
        case _:
            known = BadRequest("The request is malformed.")
    answer = await _answer_error(request, known)
    answer.headers.update(error.headers or {})
    if error.status_code == 405:
        # The router names the methods of the first route at this path only.
        answer.headers["Allow"] = ", ".join(_methods(request))
    return answer


def _methods(request: Request) -> list[str]:
    """The methods of all routes at a request's path."""
    found: set[str] = set()
    for router in (*ROUTERS, demo.router):
        for route in router.routes:
            if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
                found |= route.methods or set()
    return sorted(found)
