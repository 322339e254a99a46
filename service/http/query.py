"""Query parameters: the classification routes take none."""

from fastapi import Request

from service.errors import Unprocessable


async def refuse_query(request: Request) -> None:
    """Raises Unprocessable for any query parameter. An option that is ignored would give an answer
    to another question."""
    for name in request.query_params:
        raise Unprocessable(
            f"The query parameter `{name[:64]}` is unknown; options belong in the body."
        )
