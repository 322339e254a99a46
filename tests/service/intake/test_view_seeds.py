"""The same image gets the same views, and nobody without the secret can predict them."""

import io
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.defenses.catalog import DEFENSES
from models.images.decode import MAX_SHORT_SIDE, DecodedImage
from models.images.preprocess import BICUBIC, Preprocessing, prepare
from service.intake.requests import SEED_LIMIT
from service.intake.view_seeds import ViewSeeds
from service.messages import Answer, Task
from service.settings import Settings
from tests.conftest import Server
from tests.fake_worker import READY, FakeWorker, answer

IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
DECODED = DecodedImage(IMAGE)
SECRET = "a secret of replicas"


def test_a_seed_depends_on_every_pixel_and_on_the_shape() -> None:
    seeds = ViewSeeds(Settings())

    def of(pixels: NDArray[np.uint8], view: NDArray[np.uint8] | None = None) -> int:
        return seeds.of(DecodedImage(pixels, view))

    changed = IMAGE.copy()
    changed[3, 5, 2] ^= 1
    assert of(IMAGE) == of(IMAGE.copy())
    assert 0 <= of(IMAGE) < SEED_LIMIT
    others = [changed, IMAGE.reshape(6, 4, 3), IMAGE.reshape(2, 12, 3), np.zeros_like(IMAGE)]
    assert len({of(IMAGE), *map(of, others)}) == 5
    # Views of a large image are cut from fewer pixels than its first view.
    assert len({of(IMAGE), of(IMAGE, IMAGE), of(IMAGE, changed)}) == 3
    assert of(IMAGE[:, ::-1]) == of(np.ascontiguousarray(IMAGE[:, ::-1]))


def test_replicas_agree_if_they_share_the_secret() -> None:
    first, second = (ViewSeeds(Settings(view_secret=SECRET)) for _ in range(2))
    other = ViewSeeds(Settings(view_secret=SECRET + "!"))
    assert first.of(DECODED) == second.of(DECODED) != other.of(DECODED)


def test_without_a_secret_each_process_draws_its_own() -> None:
    assert ViewSeeds(Settings()).of(DECODED) != ViewSeeds(Settings()).of(DECODED)


def test_the_secret_is_not_shown() -> None:
    assert SECRET not in repr(Settings(view_secret=SECRET))


def test_asking_again_gets_the_same_views_from_any_file_of_the_same_pixels(
    start: Callable[..., Server],
) -> None:
    seeds: list[int] = []

    def note(task: Task) -> Answer:
        seeds.append(task.seed)
        return answer(task)

    server = start(FakeWorker(note), view_secret=SECRET)
    changed = IMAGE.copy()
    changed[0, 0, 0] ^= 1
    for kind, image in (("PNG", IMAGE), ("BMP", IMAGE), ("PNG", changed)):
        file = io.BytesIO()
        Image.fromarray(image).save(file, kind)
        form = {"labels": ["cat", "dog"]}
        reply = server.http.post("/v1/classify", files={"image": file.getvalue()}, data=form)
        assert reply.status_code == 200
    assert seeds[0] == seeds[1] != seeds[2]
    assert SECRET not in server.http.get("/info").text


def test_pixels_are_hashed_only_for_a_defense_that_draws(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, hashed = FakeWorker(), Mock(return_value=5)
    monkeypatch.setattr(ViewSeeds, "of", hashed)
    server, file = start(worker, allow_client_seed=True), io.BytesIO()
    Image.fromarray(IMAGE).save(file, "PNG")
    drawing = {name for name, spec in DEFENSES.items() if spec.random}
    assert {"plain", "tapt"} - drawing == {"plain"}
    for method in DEFENSES:
        form = {"labels": "cat,dog", "method": method}
        for more in ({}, {"seed": "7"}):
            reply = server.http.post(
                "/v1/classify", files={"image": file.getvalue()}, data={**form, **more}
            )
            assert reply.status_code == 200
    seeds: dict[str, list[int]] = {name: [] for name in DEFENSES}
    for (task,) in worker.batches:
        seeds[task.method].append(task.seed)
    assert seeds == {name: [5 if name in drawing else 0, 7] for name in DEFENSES}
    assert hashed.call_count == len(drawing)


@pytest.mark.parametrize("side", [300, 900])
def test_an_image_comes_with_its_first_view(start: Callable[..., Server], side: int) -> None:
    prepared = Preprocessing(64, 70, None, BICUBIC, (0.5,) * 3, (0.5,) * 3)
    worker = FakeWorker(ready=replace(READY, preprocessing=prepared))
    server = start(worker)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side + 50, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.save(file, "PNG")
    reply = server.http.post(
        "/v1/classify", files={"image": file.getvalue()}, data={"labels": "a,b"}
    )
    assert reply.status_code == 200
    ((task,),) = worker.batches
    assert task.view is not None
    np.testing.assert_array_equal(task.view, prepare(image, side, side + 50, prepared))
    if side == 300:
        np.testing.assert_array_equal(task.image, pixels)
    else:
        assert min(task.image.shape[:2]) == MAX_SHORT_SIDE
    plain = {"labels": "a,b", "method": "plain"}
    files = {"image": file.getvalue()}
    assert server.http.post("/v1/classify", files=files, data=plain).status_code == 200
    ((alone,),) = worker.batches[1:]
    np.testing.assert_array_equal(alone.image, task.view)  # the only view, and no other pixels
    np.testing.assert_array_equal(alone.view, task.view)
