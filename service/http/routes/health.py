"""Health for those who watch from outside: live, ready, started. No key is asked for."""

from fastapi import APIRouter, Request

from service.engine.engine import Engine
from service.errors import NotReady
from service.http.routes.docs import errors_of
from service.schemas import Status

router = APIRouter(tags=["health"], responses=errors_of(503))

RETRY = 5.0  # seconds


@router.get("/livez", summary="Whether the process should go on living")
async def livez(request: Request) -> Status:
    """Fails only when no worker will ever be ready again; a recovery in progress is life."""
    return _status(_engine(request).alive, "The workers cannot be started any more.")


@router.get("/readyz", summary="Whether a request would be worked on now")
@router.get("/health", summary="The same as /readyz")
async def readyz(request: Request) -> Status:
    ready = _engine(request).ready and request.app.state.intake.decoders.ready
    return _status(ready, "The server is loading, recovering or shutting down.")


@router.get("/startupz", summary="Whether the model has been loaded once")
async def startupz(request: Request) -> Status:
    return _status(_engine(request).started, "The model is loading.")


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def _status(well: bool, otherwise: str) -> Status:
    if not well:
        raise NotReady(otherwise, retry_after=RETRY)
    return Status()
