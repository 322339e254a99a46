"""Which sites may show a page of this server in a frame."""

from fastapi import Request

from service.settings import Settings


def content_policy(request: Request, policy: str) -> dict[str, str]:
    """The header with this content security policy and the operator's frame ancestors."""
    settings: Settings = request.app.state.settings
    ancestors = " ".join(settings.frame_ancestors) or "'none'"
    return {"Content-Security-Policy": f"{policy}; frame-ancestors {ancestors}"}
