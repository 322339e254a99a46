"""What the fingerprints of `service.intake.similarity` make of ordinary traffic, and their cost."""

import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import RateLimited
from service.intake.similarity import RECENT, WINDOW, Similarity
from service.settings import Settings
from service.telemetry.metrics import NEAR, Metrics

FRAMES = 300  # of a stream

Pixels = NDArray[np.uint8]
Stream = Callable[[Sequence[Pixels], np.random.Generator], Iterator[Pixels]]


def different(photos: Sequence[Pixels], source: np.random.Generator) -> Iterator[Pixels]:
    yield from photos


def retries(photos: Sequence[Pixels], source: np.random.Generator) -> Iterator[Pixels]:
    """Each image five times, the same."""
    for photo in photos[: FRAMES // 5]:
        for _ in range(5):
            yield photo


def copies(photos: Sequence[Pixels], source: np.random.Generator) -> Iterator[Pixels]:
    """Each image as five files: other qualities, other sizes."""
    for photo in photos[: FRAMES // 5]:
        for quality, scale in ((95, 1.0), (75, 1.0), (50, 1.0), (85, 0.75), (85, 0.5)):
            yield encode(photo, quality, scale)


def still(photos: Sequence[Pixels], source: np.random.Generator) -> Iterator[Pixels]:
    """A camera that looks at nothing new: noise of two grey levels, and JPEG."""
    for _ in range(FRAMES):
        noisy = photos[0] + source.normal(0, 2, photos[0].shape)
        yield encode(np.clip(noisy, 0, 255).astype(np.uint8), 85)


def passing(photos: Sequence[Pixels], source: np.random.Generator) -> Iterator[Pixels]:
    """The same camera, before which something as large as a tenth of the image moves about."""
    height, width, _ = photos[0].shape
    side = int((height * width / 10) ** 0.5)
    for frame in range(FRAMES):
        thing = Image.fromarray(photos[1 + frame // 60 % (len(photos) - 1)]).resize((side, side))
        view = photos[0].copy()
        left = frame * 7 % (width - side)
        top = frame * 3 % (height - side)
        view[top : top + side, left : left + side] = np.asarray(thing)
        yield encode(view, 85)


def panning(photos: Sequence[Pixels], source: np.random.Generator) -> Iterator[Pixels]:
    """A camera that turns by three percent of its view a frame, over one image after another."""
    for frame in range(FRAMES):
        photo = photos[frame // 20 % len(photos)]
        width = photo.shape[1]
        left = int(frame % 20 * 0.03 * 0.6 * width)
        yield encode(np.ascontiguousarray(photo[:, left : left + int(0.6 * width)]), 85)


STREAMS: dict[str, Stream] = {
    "different photographs": different,
    "retries of the same file": retries,
    "five versions of each photograph": copies,
    "video, static scene": still,
    "video, a tenth of the frame moves": passing,
    "video, the camera pans": panning,
}


def send(stream: Iterator[Pixels], limit: int) -> dict[str, Any]:
    """A stream from one key within an hour: what looked like an attack, and what was refused."""
    metrics, now = Metrics(), [0.0]
    settings = Settings(key_similar_per_hour=limit)
    similarity = Similarity(settings, metrics, lambda: now[0])
    sent = refused = 0
    for image in stream:
        sent += 1
        now[0] += WINDOW / (2 * RECENT)
        try:
            similarity.check("key", similarity.fingerprint(image, image.tobytes()))
        except RateLimited:
            refused += 1

    def count(suffix: str, **labels: str) -> float:
        name = f"tapt_query_similarity_{suffix}"
        return metrics.registry.get_sample_value(name, labels) or 0.0

    near = count("count") - count("bucket", le=str(NEAR))
    return {"n": sent, "alike": near / sent, "refused": refused / sent}


def clock() -> dict[str, float]:
    """Median microseconds of processor time: of a fingerprint, by the image's side, and of a
    look at a full hour."""
    similarity = Similarity(Settings(key_similar_per_hour=1000), Metrics(), lambda: 0.0)
    source = np.random.default_rng(0)
    for _ in range(RECENT):
        image = source.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        similarity.check("key", similarity.fingerprint(image, b""))

    def median(act: Callable[[], object]) -> float:
        spent = []
        for _ in range(200):
            began = time.thread_time()
            act()
            spent.append(time.thread_time() - began)
        return 1e6 * statistics.median(spent)

    found = {}
    for side in (64, 224, 512):
        image = source.integers(0, 256, (side, side, 3)).astype(np.uint8)
        found[f"fingerprint_{side}"] = median(partial(similarity.fingerprint, image, b""))
    prints = iter(
        [
            similarity.fingerprint(source.integers(0, 256, (16, 16, 3)).astype(np.uint8), b"")
            for _ in range(200)
        ]
    )
    found["check"] = median(lambda: similarity.check("key", next(prints)))
    return found


def encode(image: Pixels, quality: int, scale: float = 1.0) -> Pixels:
    """As it comes out of a JPEG file."""
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    out = io.BytesIO()
    Image.fromarray(image).resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=quality)
    return np.asarray(Image.open(out))
