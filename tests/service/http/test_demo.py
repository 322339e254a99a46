"""The attack demonstration: where it is offered, what it streams, what it does to a picture."""

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.attacks.demo import run_demo_attack
from models.classifier import DefendedClassifier, ImageQuery
from service.http.authentication import entry
from service.messages import (
    Answer,
    DemoAttack,
    Failure,
    Progress,
    ProgressEvent,
    Task,
    ViewReport,
)
from service.settings import Settings
from service.worker.demo import DEFENDED_ANSWERS, run_demo
from service.worker.runner import Runner
from tests import tiny
from tests.conftest import Server
from tests.fake_worker import FakeWorker, answer

LABELS = ["cat", "dog", "horse"]
START = Callable[..., Server]
BLACK = np.zeros((8, 8, 3), np.uint8)


def body(photo: bytes, **attack: Any) -> dict[str, Any]:
    asked = {"image": base64.b64encode(photo).decode(), "candidate_labels": LABELS}
    return {**asked, "attack": {"epsilon": 4, "steps": 3, **attack}}


def pixels(data_uri: str) -> NDArray[np.uint8]:
    assert data_uri.startswith("data:image/png;base64,")
    return np.array(Image.open(io.BytesIO(base64.b64decode(data_uri.partition(",")[2]))))


# Where it is offered.


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_a_loopback_host_may_offer_it(host: str) -> None:
    assert Settings(enable_attack_demo=True, host=host).enable_attack_demo


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_no_other_host_may(host: str) -> None:
    with pytest.raises(ValueError, match="for a loopback host only"):
        Settings(enable_attack_demo=True, host=host)


def test_it_does_not_go_with_hidden_scores() -> None:
    with pytest.raises(ValueError, match="expose must be full"):
        Settings(enable_attack_demo=True, expose="label")


def test_it_is_off_by_default(server: Server, photo: bytes) -> None:
    assert server.http.post("/demo/attack", json=body(photo)).status_code == 404
    assert server.http.get("/info").json()["policies"]["attack_demo"] is False


def test_it_takes_a_key_that_may_see_the_defense(start: START, photo: bytes) -> None:
    keys = ",".join([entry("plain"), entry("trusted", ["diagnostics"])])
    server = start(enable_attack_demo=True, api_keys=keys)
    asked = body(photo)
    del asked["attack"]
    for key, status in (("wrong", 401), ("plain", 401), ("trusted", 200)):
        headers = {"Authorization": f"Bearer {key}"}
        answered = server.http.post("/demo/classify", json=asked, headers=headers)
        assert answered.status_code == status
        answered = server.http.post("/demo/attack", json=body(photo), headers=headers)
        assert (answered.status_code == 401) == (status == 401)
        if key != "wrong":
            policies = server.http.get("/info", headers=headers).json()["policies"]
            assert policies["attack_demo"] is (key == "trusted")


# What the routes answer.


def test_the_views_are_shown(start: START, photo: bytes) -> None:
    seen = (ViewReport(BLACK, 0, 0.9, True), ViewReport(np.full_like(BLACK, 255), 2, 0.4, False))
    worker = FakeWorker(
        lambda work: replace(answer(work), view_reports=seen if work.return_views else ())
    )
    server = start(worker, enable_attack_demo=True)
    asked = body(photo)
    del asked["attack"]
    shown = server.http.post("/demo/classify", json=asked).json()["views"]
    assert [(view["label"], view["score"], view["kept"]) for view in shown] == [
        ("cat", 0.9, True),
        ("horse", 0.4, False),
    ]
    assert pixels(shown[1]["thumbnail"]).min() == 255
    assert "views" not in server.http.post("/v1/classify", json=asked).json()


class Play:
    """A server whose worker is played by the test, with one attack under way."""

    def __init__(self, start: START, asked: dict[str, Any]) -> None:
        self.worker = FakeWorker(automatic=False)
        self.server = start(self.worker, enable_attack_demo=True)
        self.server.call(self.worker.be_ready)
        self.stream = self.server.http.stream("POST", "/demo/attack", json=asked)

    def event(self, step: int) -> None:
        work = self.worker.batches[-1][0]
        scores = [0.0, 0.25, 0.75]
        news = ProgressEvent(step, np.full_like(BLACK, step), scores, None if step else scores)
        self.server.call(lambda: self.worker.deliver(Progress(work.id, news)))


def begin(start: START, asked: dict[str, Any]) -> tuple[Play, Iterator[str], httpx.Response]:
    """Play until the first stage is on its way."""
    play = Play(start, asked)
    import threading

    def first() -> None:
        play.server.wait(lambda: play.worker.batches)
        play.event(0)

    thread = threading.Thread(target=first)
    thread.start()
    response = play.stream.__enter__()
    thread.join()
    return play, response.iter_lines(), response


def test_stages_come_while_the_attack_goes_on(start: START, photo: bytes) -> None:
    play, lines, response = begin(start, body(photo, target="horse", adaptive=True))
    work = play.worker.batches[0][0]
    assert work.attack == DemoAttack(epsilon=4, steps=3, target=2, adaptive=True)
    stage = json.loads(next(lines))["stage"]
    assert (stage["step"], stage["steps"]) == (0, 3)
    assert stage["defended"][2] == {"label": "horse", "score": 0.75}
    play.event(1)
    stage = json.loads(next(lines))["stage"]
    assert stage["undefended"][1] == {"label": "dog", "score": 0.25}
    assert stage["defended"] is None
    assert (pixels(stage["image"]) == 1).all()
    play.server.call(play.worker.finish)
    end = json.loads(next(lines))
    assert end["answer"]["labels"][0]["label"] == "cat"
    assert (end["threat"], end["epsilon"], end["truncated"]) == ("adaptive", 4, None)
    assert next(lines, None) is None
    response.close()


def test_there_is_one_attack_at_a_time(start: START, photo: bytes) -> None:
    play, lines, response = begin(start, body(photo))
    refused = play.server.http.post("/demo/attack", json=body(photo))
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    play.server.call(play.worker.finish)
    assert "answer" in list(map(json.loads, lines))[-1]
    response.close()
    play.server.wait(lambda: not play.server.app.state.attacking)


def test_whoever_leaves_stops_the_attack(start: START, photo: bytes) -> None:
    play, lines, response = begin(start, body(photo))
    next(lines)
    response.close()
    play.server.wait(lambda: play.worker.cancelled == {play.worker.batches[0][0].id})
    play.server.wait(lambda: not play.server.app.state.attacking)


def test_a_failure_on_the_way_is_the_last_line(start: START, photo: bytes) -> None:
    play, lines, response = begin(start, body(photo))
    play.worker.reply = lambda work: Failure("internal", "The request could not be worked on.")
    play.server.call(play.worker.finish)
    last = json.loads(list(lines)[-1])
    assert last["error_type"] == "internal"
    assert last["request_id"] == response.headers["x-request-id"]
    response.close()


@pytest.mark.parametrize(
    "attack",
    [{"target": "zebra"}, {"epsilon": 0}, {"steps": -1}, {"epsilon": 1.5}, {"colour": "red"}],
)
def test_attacks_that_make_no_sense_are_refused(
    start: START, photo: bytes, attack: dict[str, Any]
) -> None:
    server = start(enable_attack_demo=True)
    refused = server.http.post("/demo/attack", json=body(photo, **attack))
    assert refused.status_code == 422, refused.text
    assert refused.json()["error_type"] == "unprocessable"


@pytest.mark.parametrize(("adaptive", "steps"), [(False, 40), (True, 20)])
def test_what_an_attack_may_spend_is_bounded(
    start: START, photo: bytes, adaptive: bool, steps: int
) -> None:
    worker = FakeWorker()
    server = start(worker, enable_attack_demo=True)
    asked = body(photo, epsilon=200, steps=10**6, adaptive=adaptive)
    server.http.post("/demo/attack", json=asked)
    assert worker.batches[0][0].attack == DemoAttack(16, steps, None, adaptive)


# How it is told, without a model.


def play_out(steps: int, deadline: float = 60.0, cancel_at: int | None = None) -> list[Any]:
    """What is settled for an attack of so many steps, in order."""
    told: list[Any] = []
    work = make_work(DemoAttack(4, steps, None, False), time.monotonic() + deadline)
    pictures = (np.full_like(BLACK, step) for step in range(steps + 1))
    run_demo(
        work,
        pictures,
        lambda one: answer(one),
        lambda id, result: told.append(result),
        lambda id: cancel_at is not None and len(told) == cancel_at,
    )
    return told


def make_work(attack: DemoAttack | None, deadline: float, **changes: Any) -> Task:
    work = Task(
        id="attacked",
        image=tiny.draw_image(1),
        labels=tiny.LABELS[:5],
        template=None,
        method="tapt",
        steps=1,
        views=8,
        readout="all",
        seed=3,
        deadline=deadline,
        attack=attack,
    )
    return replace(work, **changes)


def test_the_first_view_of_the_image_is_not_that_of_the_attacked_one() -> None:
    asked: list[Task] = []

    def ask(one: Task) -> Answer:
        asked.append(one)
        return answer(one)

    work = make_work(DemoAttack(4, 1, None, False), time.monotonic() + 60, view=BLACK)
    run_demo(work, iter([BLACK, BLACK]), ask, lambda id, result: None, lambda id: False)
    assert len(asked) > 1
    assert all(one.view is None for one in asked)


@pytest.mark.parametrize("steps", [1, 3, 10, 40])
def test_each_step_is_told_and_the_defense_asked_now_and_then(steps: int) -> None:
    *glimpses, last = play_out(steps)
    assert isinstance(last, Answer)
    assert [event.step for event in glimpses] == list(range(steps + 1))
    asked = [event.step for event in glimpses if event.defended_scores]
    assert (asked[0], asked[-1], len(asked)) == (0, steps, min(DEFENDED_ANSWERS, steps) + 1)


def test_short_of_time_it_stops_early_and_says_so() -> None:
    *glimpses, last = play_out(40, deadline=-1.0)
    assert [event.step for event in glimpses] == [0]
    assert last.truncated == "deadline"


def test_a_cancelled_one_stops_at_the_next_step() -> None:
    *glimpses, last = play_out(40, cancel_at=3)
    assert len(glimpses) == 3
    assert isinstance(last, Failure)


# What it does to a picture, on a tiny CLIP.


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.save_checkpoint(tmp_path_factory.mktemp("clip"))
    tiny.make_bundle(tiny.load(directory)).save(directory / "bundle")
    return directory


@pytest.fixture(scope="module")
def runner(directory: Path) -> Runner:
    return Runner(Settings(model=str(directory), device="cpu"), 0)


def test_every_picture_is_within_reach_of_the_first(runner: Runner) -> None:
    pictures = list(run_attack(runner.classifier, target=None, adaptive=False))
    assert len(pictures) == 7
    assert {picture.shape for picture in pictures} == {(32, 32, 3)}
    first = pictures[0].astype(int)
    far = [int(np.abs(picture - first).max()) for picture in pictures]
    assert far[0] == 0
    assert all(0 < reach <= 8 for reach in far[1:])


# The ensemble's gradient is exact, where TAPT's holds the prompts that a step adapted.
@pytest.mark.parametrize(("adaptive", "method"), [(False, "plain"), (True, "ensemble")])
def test_the_way_goes_where_it_is_told(runner: Runner, adaptive: bool, method: str) -> None:
    def scores(picture: NDArray[np.uint8]) -> list[float]:
        work = make_work(None, time.monotonic() + 60, image=picture, method=method)
        return settle(runner, work)[-1].scores

    clean, *_, away = run_attack(runner.classifier, None, adaptive, method=method)
    named = int(np.argmax(scores(clean)))
    assert scores(away)[named] < scores(clean)[named]
    wanted = int(np.argmin(scores(clean)))
    *_, towards = run_attack(runner.classifier, wanted, adaptive, method=method)
    assert scores(towards)[wanted] > scores(clean)[wanted]


def run_attack(
    classifier: DefendedClassifier,
    target: int | None,
    adaptive: bool,
    template: str | None = None,
    method: str = "tapt",
) -> Iterator[NDArray[np.uint8]]:
    query = ImageQuery(tiny.draw_image(1), tiny.LABELS[:5], template, "all", 3)
    return run_demo_attack(
        classifier, query, method, 8, epsilon=8, attack_steps=6, target=target, adaptive=adaptive
    )


@pytest.mark.parametrize("method", ["apt", "tapt", "tpt", "rtpt", "ttc", "mac", "gate"])
def test_whoever_knows_the_defense_finds_a_way_through_each(runner: Runner, method: str) -> None:
    clean, *_, last = run_attack(runner.classifier, None, True, method=method)
    assert (clean != last).any()


def settle(runner: Runner, work: Task) -> list[Any]:
    told: list[Any] = []
    runner.run([work], lambda id, result: told.append(result), lambda id: False)
    return told


def test_the_answer_is_the_one_about_the_last_picture(runner: Runner) -> None:
    work = make_work(DemoAttack(8, 4, None, False), time.monotonic() + 60)
    *glimpses, last = settle(runner, work)
    assert [event.step for event in glimpses] == [0, 1, 2, 3, 4]
    again = settle(runner, replace(work, attack=None, image=glimpses[-1].image))[0]
    assert last.scores == pytest.approx(again.scores, abs=1e-5)
    assert last.undefended_scores == pytest.approx(glimpses[-1].undefended_scores, abs=1e-5)
    assert len(last.view_reports) == 8
    assert sum(view.kept for view in last.view_reports) == last.views_kept


def test_a_template_of_the_clients_is_attacked_as_it_is_read(runner: Runner) -> None:
    *_, own = run_attack(runner.classifier, None, False)
    *_, other = run_attack(runner.classifier, None, False, template="a drawing of {}, upside down")
    assert (own != other).any()


def test_views_are_shown_as_they_were_drawn(runner: Runner) -> None:
    work = make_work(None, time.monotonic() + 60, return_views=True)
    (shown,) = settle(runner, work)
    assert len(shown.view_reports) == shown.views == 8
    assert len({view.image.tobytes() for view in shown.view_reports}) == 8
    whole, *_ = run_attack(runner.classifier, None, False)
    assert (shown.view_reports[0].image == whole).all()
    assert not settle(runner, replace(work, return_views=False))[0].view_reports


# From where it is driven.

FOREIGN: dict[str, dict[str, str]] = {
    "a page elsewhere": {"Origin": "https://evil.example"},
    "a sandboxed page": {"Origin": "null"},
    "another port here": {"Origin": "http://127.0.0.1:1"},
    "a name that leads here": {"Host": "evil.example:8000"},
    "a name that leads here, and its page": {
        "Host": "evil.example",
        "Origin": "http://evil.example",
    },
    "a name that begins as this machine's": {"Host": "127.0.0.1.evil.example"},
    "a name that ends as this machine's": {"Host": "evillocalhost"},
    "an address of the network": {"Host": "10.0.0.1"},
    "every address": {"Host": "0.0.0.0"},
    "no name": {"Host": ""},
    "half an address": {"Host": "[::1"},
    "a form elsewhere, by an older browser": {"Sec-Fetch-Site": "cross-site"},
    "another subdomain": {"Sec-Fetch-Site": "same-site"},
}


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("path", ["/demo/attack", "/demo/classify"])
def test_another_site_cannot_drive_it(
    start: START, photo: bytes, path: str, headers: dict[str, str]
) -> None:
    server = start(enable_attack_demo=True)
    asked = {**headers, "Content-Type": "text/plain"}  # as a form of another site posts it
    answered = server.http.post(path, content=json.dumps(body(photo)), headers=asked)
    assert answered.status_code == 403
    assert answered.json()["error_type"] == "forbidden"
    assert not server.worker.batches


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost:8000", "Origin": "http://localhost:8000"},
        {"Host": "LOCALHOST", "Sec-Fetch-Site": "same-origin"},
        {"Host": "[::1]:8000", "Origin": "http://[::1]:8000"},
        {"Host": "127.9.9.9", "Sec-Fetch-Site": "none"},
    ],
)
def test_this_machine_can(start: START, photo: bytes, headers: dict[str, str]) -> None:
    server = start(enable_attack_demo=True)
    asked = body(photo)
    del asked["attack"]
    assert server.http.post("/demo/classify", json=asked, headers=headers).status_code == 200
