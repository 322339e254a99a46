"""Bearer keys: who may ask."""

import hmac
from hashlib import sha256

from fastapi import Request
from fastapi.security import HTTPBearer

from service.errors import Unauthorized

scheme = HTTPBearer(auto_error=False, description="Needed only where the server has keys.")
"""Describes the header in the OpenAPI; the check is `check_key`."""


def check_key(request: Request) -> None:
    """Raises Unauthorized unless no keys are set or the request bears one of them.

    Digests are compared, all of them, so that the time taken tells neither length nor prefix.
    """
    keys = request.app.state.settings.api_keys
    if not keys:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    digest = sha256(given.strip().encode("latin-1")).digest()
    matches = [hmac.compare_digest(digest, sha256(key.encode()).digest()) for key in keys]
    if kind.lower() != "bearer" or not any(matches):
        raise Unauthorized("A valid API key is needed.")
