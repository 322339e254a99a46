"""Health checks: live, ready, started. They need no key."""

from fastapi import APIRouter, Request

from service.engine.engine import Engine
from service.errors import NotReady
from service.http.response import Status
from service.http.routes.docs import describe_errors

router = APIRouter(tags=["health"], responses=describe_errors(503))

RETRY_AFTER = 5.0  # seconds


@router.head("/livez", include_in_schema=False)
@router.get("/livez", summary="Whether the process should keep running")
async def livez(request: Request) -> Status:
    """Fails only when no worker can be started; the process is about to end. A server that recovers
    is alive."""
    return _status(_engine(request).alive, "No worker can be started.")


@router.head("/readyz", include_in_schema=False)
@router.head("/health", include_in_schema=False)
@router.get("/readyz", summary="Whether requests are served now")
@router.get("/health", summary="The same as /readyz")
async def readyz(request: Request) -> Status:
    return _status(is_ready(request), "The server is loading, recovering or shutting down.")


@router.head("/startupz", include_in_schema=False)
@router.get("/startupz", summary="Whether the model has been loaded")
async def startupz(request: Request) -> Status:
    return _status(_engine(request).model is not None, "The model is loading.")


def is_ready(request: Request) -> bool:
    """Whether the server can classify: a worker has loaded the model, a decoder process is ready,
    and no shutdown has begun."""
    return _engine(request).ready and bool(request.app.state.intake.decoders.ready)


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def _status(ok: bool, problem: str) -> Status:
    if not ok:
        raise NotReady(problem, retry_after=RETRY_AFTER)
    return Status()
