"""`GET /`: the playground, a page that calls the API from the browser.

It loads nothing from other hosts, and its content security policy forbids it.
"""

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from service.errors import NotFound
from service.http.authentication import check_pages
from service.http.content_policy import content_policy

router = APIRouter(include_in_schema=False, dependencies=[Depends(check_pages)])

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = {
    file.name: file.read_bytes()
    for file in files("service.playground").iterdir()
    if Path(file.name).suffix in TYPES
}
"""All files by name, in memory: a client's path never reaches the file system."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.head("/")
@router.get("/")
async def page(request: Request) -> Response:
    return _file("index.html", request)


@router.get("/playground/{name}")
async def file(name: str, request: Request) -> Response:
    return _file(name, request)


def _file(name: str, request: Request) -> Response:
    if name not in FILES:
        raise NotFound("There is nothing at this URL.")
    headers = HEADERS | content_policy(request, POLICY)
    return Response(FILES[name], headers=headers, media_type=TYPES[Path(name).suffix])
