"""The same image gets the same views, and nobody without the secret can predict them."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from service.intake.requests import SEED_LIMIT
from service.intake.view_seeds import ViewSeeds
from service.messages import Answer, Task
from service.settings import Settings
from tests.conftest import Server
from tests.fake_worker import FakeWorker, answer

IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
SECRET = "a secret of replicas"


def test_a_seed_depends_on_every_pixel_and_on_the_shape() -> None:
    seeds = ViewSeeds(Settings())
    changed = IMAGE.copy()
    changed[3, 5, 2] ^= 1
    assert seeds.of(IMAGE) == seeds.of(IMAGE.copy())
    assert 0 <= seeds.of(IMAGE) < SEED_LIMIT
    others = [changed, IMAGE.reshape(6, 4, 3), IMAGE.reshape(2, 12, 3), np.zeros_like(IMAGE)]
    assert len({seeds.of(IMAGE), *map(seeds.of, others)}) == 5
    assert seeds.of(IMAGE[:, ::-1]) == seeds.of(np.ascontiguousarray(IMAGE[:, ::-1]))


def test_replicas_agree_if_they_share_the_secret() -> None:
    first, second = (ViewSeeds(Settings(view_secret=SECRET)) for _ in range(2))
    other = ViewSeeds(Settings(view_secret=SECRET + "!"))
    assert first.of(IMAGE) == second.of(IMAGE) != other.of(IMAGE)


def test_without_a_secret_each_process_draws_its_own() -> None:
    assert ViewSeeds(Settings()).of(IMAGE) != ViewSeeds(Settings()).of(IMAGE)


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
