"""The path prefix that a proxy serves this server under."""

from starlette.types import ASGIApp, Receive, Scope, Send


def mount(app: ASGIApp, root_path: str) -> ASGIApp:
    """The app under a prefix. Starlette's routes match whether the proxy strips it or not.

    uvicorn's own `root_path` serves a proxy that strips the prefix only, FastAPI's is deprecated.
    """
    if not root_path:
        return app

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": root_path}, receive, send)

    return call
