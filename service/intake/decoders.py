"""Image decoding off the event loop."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from service.errors import DeadlineExceeded
from service.intake.decode import decode
from service.settings import Settings

MAX_DECODERS = min(4, os.cpu_count() or 1)


class Decoders:
    """A pool that decodes a few images at once."""

    def __init__(self, settings: Settings) -> None:
        self._max_pixels = settings.max_image_pixels
        self._timeout = settings.request_timeout_ms / 1000
        self._threads = ThreadPoolExecutor(MAX_DECODERS, thread_name_prefix="decode")

    async def decode(self, file: bytes) -> NDArray[np.uint8]:
        """Decode an image file to uint8 RGB [height, width, 3].

        Raises DeadlineExceeded after `request_timeout_ms`, and the errors of `decode.decode`.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout):
                return await loop.run_in_executor(self._threads, decode, file, self._max_pixels)
        except TimeoutError:
            raise DeadlineExceeded("The image was not decoded in time.") from None

    def close(self) -> None:
        """Drop the files that wait to be decoded."""
        self._threads.shutdown(wait=False, cancel_futures=True)
