"""Fingerprints: what is alike, what a key may send of it, and what is kept."""

import base64
import io
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from benchmarks.ordinary import STREAMS, send
from models.images.preprocess import BICUBIC, Preprocessing
from service.errors import RateLimited
from service.intake.similarity import CALLERS, CODES, RECENT, WINDOW, Similarity
from service.settings import Settings
from service.telemetry.metrics import NEAR, Metrics
from tests.conftest import Server
from tests.fake_worker import READY, FakeWorker

START = Callable[..., Server]
Pixels = NDArray[np.uint8]
PHOTOS = [data.chelsea(), data.coffee(), data.astronaut(), data.rocket()]


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the same secrets in every run, another for each `Similarity`."""
    seeds = itertools.count(1)
    monkeypatch.setattr("service.intake.similarity.secrets.randbits", lambda bits: next(seeds))


class Harness:
    """Fingerprints with a clock that the test turns."""

    def __init__(self, limit: int = 0) -> None:
        self.now = 1000.0
        self.metrics = Metrics()
        settings = Settings(key_similar_per_hour=limit)
        self.similarity = Similarity(settings, self.metrics, lambda: self.now)

    def send(self, image: Pixels, caller: str = "a") -> float | None:
        """None when the image was let in, else the seconds to wait."""
        try:
            self.similarity.check(caller, self.similarity.fingerprint(image, image.tobytes()))
        except RateLimited as refusal:
            return refusal.retry_after
        return None

    def likeness(self, one: Pixels, other: Pixels) -> float:
        first, second = (self.similarity.fingerprint(image, b"") for image in (one, other))
        return float((first.codes == second.codes).mean())

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"tapt_{name}", labels) or 0.0


def perturb(image: Pixels, epsilon: int, seed: int) -> Pixels:
    """A step of the Square attack: stripes at the edge of the ball, and squares upon them."""
    source = np.random.default_rng(seed)
    height, width, _ = image.shape
    moved = image + epsilon * source.choice([-1, 1], (1, width, 3))
    for _ in range(8):
        side = min(height, width) // 2
        top, left = source.integers(0, height - side), source.integers(0, width - side)
        square = (slice(top, top + side), slice(left, left + side))
        moved[square] = image[square] + epsilon * source.choice([-1, 1], 3)
    return np.clip(moved, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("epsilon", [1, 2, 4, 8])
def test_queries_of_an_attack_are_alike(epsilon: int) -> None:
    harness = Harness()
    for seed, photo in enumerate(PHOTOS):
        one, other = perturb(photo, epsilon, seed), perturb(photo, epsilon, 100 + seed)
        assert harness.likeness(one, other) > NEAR


def test_a_picture_sent_in_another_size_or_quality_is_alike() -> None:
    harness = Harness()
    for photo in PHOTOS:
        small = Image.fromarray(photo).resize((200, 150), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        small.save(out, "JPEG", quality=60)
        assert harness.likeness(photo, np.asarray(Image.open(out))) > NEAR


def test_different_pictures_are_not_alike() -> None:
    harness = Harness()
    for i, one in enumerate(PHOTOS):
        for other in PHOTOS[:i]:
            assert harness.likeness(one, other) < NEAR - 0.1


def test_a_throttle_holds_the_attack_and_nobody_else() -> None:
    harness = Harness(limit=5)
    attack = [perturb(PHOTOS[0], 4, seed) for seed in range(10)]
    waits = [harness.send(image) for image in attack]
    assert waits == [None] * 5 + [WINDOW] * 5
    assert harness.sample("rejected_total", reason="similar") == 5
    for photo in PHOTOS[1:]:
        assert harness.send(photo) is None
    assert harness.send(attack[7], caller="b") is None


def test_whoever_waits_as_told_is_let_in_again() -> None:
    harness = Harness(limit=3)
    attack = iter(perturb(PHOTOS[0], 4, seed) for seed in range(20))
    for _ in range(3):
        assert harness.send(next(attack)) is None
        harness.now += 10
    wait = harness.send(next(attack))
    assert wait is not None
    assert wait == pytest.approx(WINDOW - 30)
    harness.now += wait - 1
    assert harness.send(next(attack)) is not None
    harness.now += 1.001
    assert harness.send(next(attack)) is None
    assert harness.send(next(attack)) == pytest.approx(10, abs=0.1)


def test_a_retry_of_the_same_pixels_is_free() -> None:
    harness = Harness(limit=2)
    for _ in range(50):
        assert harness.send(PHOTOS[0]) is None
    assert harness.sample("query_similarity_count") == 1
    # Nor is it a way around: a change of one level in one pixel is another picture.
    moved = PHOTOS[0].copy()
    for level in range(3):
        moved[0, 0, 0] = level
        wait = harness.send(moved.copy())
    assert wait is not None


def test_a_file_and_its_draws_are_told_apart_wherever_one_ends() -> None:
    take = Harness().similarity.fingerprint
    prints = [take(PHOTOS[0], b"abc"[cut:], b"abc"[:cut]).exact for cut in range(4)]
    assert len(set(prints)) == 4


def test_the_metric_tells_attacks_from_ordinary_traffic() -> None:
    def near(harness: Harness) -> float:
        below = harness.sample("query_similarity_bucket", le=str(NEAR))
        return harness.sample("query_similarity_count") - below

    harness = Harness()
    for photo in PHOTOS:
        harness.send(photo)
    assert near(harness) == 0
    for seed in range(20):
        harness.send(perturb(PHOTOS[0], 4, seed))
    assert near(harness) == 20


def test_memory_is_bounded_in_pictures_and_keys() -> None:
    harness = Harness(limit=5)
    for number in range(RECENT + 10):
        harness.send(np.full((8, 8, 3), number % 256, np.uint8), caller="busy")
    for number in range(CALLERS + 10):
        harness.send(PHOTOS[0], caller=str(number))
    state = harness.similarity._callers
    assert len(state) == CALLERS
    assert len(pickle.dumps(state)) < CALLERS * RECENT * (CODES + 16) * 1.01


def test_nothing_kept_holds_the_picture() -> None:
    """With other secrets the same picture leaves other codes: alike by chance only."""
    one, other = Harness().similarity, Harness().similarity
    shares = []
    for photo in PHOTOS:
        first, second = (each.fingerprint(photo, b"file") for each in (one, other))
        assert first.exact != second.exact
        shares.append((first.codes == second.codes).mean())
        assert first.codes.nbytes == CODES
    assert np.mean(shares) < 0.5


def test_odd_shapes_have_fingerprints() -> None:
    harness = Harness()
    for shape in [(1, 1, 3), (1, 50, 3), (50, 1, 3), (4096, 82, 3)]:
        print = harness.similarity.fingerprint(np.zeros(shape, np.uint8), b"")
        assert print.codes.shape == (CODES,)


def test_over_http_similar_images_are_429(start: START) -> None:
    server = start(key_similar_per_hour=3, api_keys="alpha,beta")

    def post(image: Pixels, key: str = "alpha") -> Any:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "PNG")
        body = {
            "image": base64.b64encode(out.getvalue()).decode(),
            "candidate_labels": ["cat", "dog"],
        }
        header = {"Authorization": f"Bearer {key}"}
        return server.http.post("/v1/classify", json=body, headers=header)

    small = np.asarray(Image.fromarray(PHOTOS[0]).resize((64, 64)))
    answers = [post(perturb(small, 4, seed)) for seed in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[-1].json()["error_type"] == "rate_limited"
    assert 3500 < int(answers[-1].headers["retry-after"]) <= 3600
    assert post(perturb(small, 4, 9), "beta").status_code == 200
    assert len(server.worker.batches) == 4


def test_the_same_file_with_other_draws_is_no_retry(start: START) -> None:
    """Each number of views, readout or method averages other draws of the same image."""
    server = start(key_similar_per_hour=4)
    out = io.BytesIO()
    Image.fromarray(PHOTOS[0]).resize((64, 64)).save(out, "PNG")

    def ask(labels: str = "cat,dog", **options: Any) -> int:
        form = {"labels": labels, **options}
        reply = server.http.post("/v1/classify", files={"image": out.getvalue()}, data=form)
        status: int = reply.status_code
        return status

    asked: list[dict[str, Any]] = [
        {},
        {"views": 3},
        {"views": 3, "readout": "kept"},
        {"method": "ensemble"},
    ]
    assert [ask(**options) for options in asked] == [200] * 4
    # Retries: the same again, with less time, other labels, or a default by its name.
    assert [ask(**options) for options in asked] == [200] * 4
    assert ask("horse,cat", deadline_ms=9000, hypothesis_template="a {}") == 200
    assert ask(views=16) == 200
    others: list[dict[str, Any]] = [
        {"views": 4},
        {"method": "apt-ensemble"},
        {"steps": 2},
    ]
    assert [ask(**options) for options in others] == [429] * 3


def test_all_defenses_count_against_one_limit(start: START) -> None:
    """Also one that needs nothing but view 0, here the middle third of the image."""
    prepared = Preprocessing(64, 64, None, BICUBIC, (0.5,) * 3, (0.5,) * 3)
    worker = FakeWorker(ready=replace(READY, preprocessing=prepared))
    server = start(worker, key_similar_per_hour=1)
    wide = np.asarray(Image.fromarray(PHOTOS[0]).resize((192, 64)))
    statuses = []
    for seed, method in enumerate(("tapt", "plain")):
        out = io.BytesIO()
        Image.fromarray(perturb(wide, 4, seed)).save(out, "PNG")
        form = {"labels": "cat,dog", "method": method}
        reply = server.http.post("/v1/classify", files={"image": out.getvalue()}, data=form)
        statuses.append(reply.status_code)
    assert statuses == [200, 429]


def test_ordinary_traffic_is_not_refused_but_where_nothing_changes() -> None:
    photos = [np.asarray(Image.fromarray(photo).resize((96, 96))) for photo in PHOTOS]
    source = np.random.default_rng(0)
    refused = {
        name: send(stream(photos, source), limit=50)["refused"] for name, stream in STREAMS.items()
    }
    assert refused.pop("video, static scene") > 0.5
    assert set(refused) == set(STREAMS) - {"video, static scene"}
    assert max(refused.values()) < 0.5
    assert refused["different photographs"] == refused["retries of the same file"] == 0
