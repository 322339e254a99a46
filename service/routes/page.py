"""`GET /`: the playground, a page that asks the API in the browser. It loads nothing from
elsewhere, and its policy lets nothing else in."""

from importlib.resources import files

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from service.errors import NotFound
from service.keys import check_pages

router = APIRouter(include_in_schema=False, dependencies=[Depends(check_pages)])

FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    return _file("index.html")


@router.get("/playground/{name}")
async def file(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    if name not in FILES:
        raise NotFound("There is nothing at this address.")
    body = files("service.playground").joinpath(name).read_bytes()
    return Response(body, headers=HEADERS, media_type=FILES[name])
