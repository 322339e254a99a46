"""The seed of an image's random views.

It is a keyed hash of the decoded pixels. The same image always gets the same views, so that an
answer is repeatable and asking again reveals nothing new. Without the secret nobody can predict the
views, and any changed pixel draws others.
"""

import hashlib
import hmac
import secrets

import numpy as np

from models.images.decode import DecodedImage
from service.intake.requests import SEED_LIMIT
from service.settings import Settings


class ViewSeeds:
    """Seeds under one secret: `view_secret`, or a random one that ends with the process."""

    def __init__(self, settings: Settings) -> None:
        given = settings.view_secret.encode()
        self._key = hashlib.blake2b(given).digest() if given else secrets.token_bytes(64)

    def of(self, image: DecodedImage) -> int:
        """The seed of an image; at least 0, below SEED_LIMIT."""
        # Processors compute SHA-256 in hardware, so it is faster than BLAKE2.
        digest = hmac.new(self._key, digestmod="sha256")
        for pixels in (image.pixels, image.view):
            if pixels is not None:
                digest.update(repr(pixels.shape).encode())
                digest.update(np.ascontiguousarray(pixels).data)
        return int.from_bytes(digest.digest()[:8]) % SEED_LIMIT
