"""Whether a request to a loopback address comes from this machine's own page.

Any page of the web can make its visitor's browser post to `http://127.0.0.1:8000`, and a name that
its owner points to 127.0.0.1 (DNS rebinding) even makes that address its own origin, so that it may
read the answers. A browser tells both: by `Origin`, and by `Host`.
"""

from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import Request

from service.errors import Forbidden


def is_loopback(host: str) -> bool:
    """Whether a host, without a port, names this machine whatever the DNS says."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


async def check_same_site(request: Request) -> None:
    """Raises Forbidden for a request in the name of another site, or under a name of its choice."""
    refused = Forbidden("This is for pages of this server, at its loopback address, only.")
    host = request.headers.get("host", "")
    if not is_loopback(_hostname(f"//{host}")):
        raise refused
    origin = request.headers.get("origin")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        raise refused
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise refused


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
