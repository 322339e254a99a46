"""Inside the worker, on a tiny CLIP: every request settles once, and alone where it fails."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.blocks import run_block
from models.clip import PromptedCLIP
from models.defenses import gate, tapt
from models.defenses.defense import DefenseInput
from models.labels import tokenize
from models.views import make_views
from service.errors import ModelError
from service.messages import Answer, Failure, Task
from service.settings import Settings
from service.worker.runner import CLIENT_GONE, LATE, Runner
from tests import tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.save_checkpoint(tmp_path_factory.mktemp("clip"))
    tiny.make_bundle(tiny.load(directory)).save(directory / "bundle")
    return directory


@pytest.fixture(scope="module")
def runner(directory: Path) -> Runner:
    return Runner(Settings(model=str(directory), device="cpu"), 0)


def make_work(number: int, **changes: object) -> Task:
    work = Task(
        id=f"work-{number}",
        image=tiny.draw_image(number),
        labels=tiny.LABELS[: 2 + number % 5],
        template=None,
        method="tapt",
        steps=1,
        views=8,
        readout="all",
        seed=number,
        deadline=time.monotonic() + 60,
    )
    return replace(work, **changes)  # type: ignore[arg-type]


def run(
    runner: Runner, batch: list[Task], cancelled: tuple[str, ...] = ()
) -> tuple[dict[str, Answer | Failure], dict[str, int]]:
    settled: dict[str, Answer | Failure] = {}

    def settle(id: str, result: Answer | Failure) -> None:
        assert id not in settled, "settled twice"
        settled[id] = result

    counts = runner.run(batch, settle, lambda id: id in cancelled)
    assert settled.keys() == {work.id for work in batch}
    return settled, counts


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"method": "plain"}, ("plain", 0, 1)),
        ({"method": "tapt"}, ("tapt", 2, 16)),
        ({"method": "tapt", "tier": "deep"}, ("tapt", 4, 64)),
        ({"method": "tapt", "tier": "fast"}, ("ensemble", 0, 8)),
    ],
    ids=["plain", "standard", "deep", "fast"],
)
def test_the_warm_up_measures_a_request_with_the_servers_defaults(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    knobs: dict[str, Any],
    expected: tuple[str, int, int],
) -> None:
    tasks: list[Task] = []
    original = Runner.run

    def record(self: Runner, batch: list[Task], *rest: Any) -> dict[str, int]:
        tasks.extend(batch)
        return original(self, batch, *rest)

    monkeypatch.setattr(Runner, "run", record)
    Runner(Settings(model=str(directory), device="cpu", steps=2, **knobs), 0)
    assert tasks[0].method == "tapt"
    for task in tasks[1:]:
        assert (task.method, task.steps, task.views) == expected


def test_an_answer_says_what_was_spent(runner: Runner) -> None:
    settled, counts = run(runner, [make_work(1)])
    answer = settled["work-1"]
    assert isinstance(answer, Answer)
    assert sum(answer.scores) == pytest.approx(1, abs=1e-5)
    assert sum(answer.undefended_scores) == pytest.approx(1, abs=1e-5)
    assert (answer.design, answer.steps, answer.views, answer.truncated) == ("vli", 1, 8, None)
    assert (counts["text_cache_misses"], counts["text_cache_hits"]) == (2, 0)
    _, again = run(runner, [make_work(1)])
    assert (again["text_cache_misses"], again["text_cache_hits"]) == (0, 2)


def test_steps_that_differ_are_each_given(runner: Runner) -> None:
    settled, _ = run(runner, [make_work(i, steps=i) for i in range(4)])
    assert [settled[f"work-{i}"].steps for i in range(4)] == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_a_near_deadline_stops_at_a_step_boundary(runner: Runner) -> None:
    run(runner, [make_work(0)])  # its labels are known then
    late = make_work(0, steps=8, deadline=time.monotonic())
    settled, _ = run(runner, [late, make_work(1, steps=2)])
    answer, other = settled["work-0"], settled["work-1"]
    assert isinstance(answer, Answer)
    assert (answer.truncated, answer.steps) == ("deadline", 0)
    assert isinstance(other, Answer)
    assert (other.truncated, other.steps) == (None, 2)


def test_a_cancelled_request_leaves_and_the_others_do_not_notice(runner: Runner) -> None:
    batch = [make_work(i, steps=2) for i in range(3)]
    settled, _ = run(runner, batch, cancelled=("work-1",))
    undisturbed, _ = run(runner, batch)
    assert isinstance(settled["work-1"], Failure)
    for id in ("work-0", "work-2"):
        one, other = settled[id], undisturbed[id]
        assert isinstance(one, Answer)
        assert isinstance(other, Answer)
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


@pytest.fixture
def watch_blocks(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[], None]], None]:
    """Make chunks small and call a function before each transformer block."""
    monkeypatch.setattr(runner.classifier.checkpoint.clip, "chunk_tokens", 8)

    def watch(seen: Callable[[], None]) -> None:
        def run_seen(*arguments: Any, **options: Any) -> Any:
            seen()
            return run_block(*arguments, **options)

        monkeypatch.setattr("models.clip.run_block", run_seen)

    return watch


@pytest.mark.parametrize(
    "method", ["plain", "apt-ensemble", "tapt", "rtpt", "ttc", "mac", "thrift"]
)
def test_nothing_is_computed_for_a_client_that_left(
    runner: Runner, watch_blocks: Callable[[Callable[[], None]], None], method: str
) -> None:
    """It leaves before the first label, at every chunk, and at every step boundary."""
    events: list[str] = []
    watch_blocks(lambda: events.append("block"))
    leaves_at = 0
    while True:
        leaves_at += 1
        labels = tuple(f"{label} {method} {leaves_at}" for label in tiny.LABELS[:4])  # in no cache
        work, settled = make_work(0, method=method, steps=2, labels=labels), {}
        events.clear()

        def cancelled(_: str, leaves_at: int = leaves_at) -> bool:
            events.append("left?")
            return events.count("left?") >= leaves_at

        runner.run([work], settled.__setitem__, cancelled)
        if events.count("left?") < leaves_at:
            break
        asked = [place for place, event in enumerate(events) if event == "left?"]
        assert "block" not in events[asked[leaves_at - 1] :]
        assert settled == {"work-0": CLIENT_GONE}
    assert isinstance(settled["work-0"], Answer)
    computed = "".join("?" if event == "left?" else "-" for event in events).split("?")
    assert max(map(len, computed)) == 2 * 3  # a chunk of labels: its shared tokens and its rows


def test_leaving_during_label_encoding_changes_nothing_for_the_next(
    runner: Runner, watch_blocks: Callable[[Callable[[], None]], None]
) -> None:
    blocks: list[int] = []
    watch_blocks(lambda: blocks.append(1))
    leaver = make_work(0, labels=tuple(f"{label} left" for label in tiny.LABELS))
    neighbor = make_work(1, labels=("cat there", "dog there"), steps=2)
    alone, _ = run(runner, [neighbor])
    blocks.clear()
    settled: dict[str, object] = {}
    computed = {}

    def settle(id: str, result: object) -> None:
        settled[id], computed[id] = result, len(blocks)

    runner.run([leaver, neighbor], settle, lambda id: id == leaver.id and len(blocks) >= 10)
    assert settled[leaver.id] == CLIENT_GONE
    assert computed[leaver.id] == 12  # to the end of the second chunk, of six
    answer, expected = settled[neighbor.id], alone[neighbor.id]
    assert isinstance(answer, Answer)
    assert isinstance(expected, Answer)
    assert answer.scores == expected.scores
    assert answer.entropy_after == expected.entropy_after


def test_a_deadline_that_passes_during_label_encoding_fails_alone(
    runner: Runner, watch_blocks: Callable[[Callable[[], None]], None]
) -> None:
    watch_blocks(lambda: time.sleep(0.005))
    labels = tuple(f"{label} late" for label in tiny.LABELS)
    late = make_work(0, labels=labels, deadline=time.monotonic() + 0.05)
    settled, _ = run(runner, [late, make_work(1)])
    assert settled["work-0"] == LATE
    assert isinstance(settled["work-1"], Answer)
    again, _ = run(runner, [replace(late, deadline=time.monotonic() + 60)])
    assert isinstance(again["work-0"], Answer)


def test_a_long_encoding_of_labels_counts_as_progress(
    runner: Runner, watch_blocks: Callable[[Callable[[], None]], None]
) -> None:
    instants = []
    watch_blocks(lambda: instants.append(runner.progress))
    labels = tuple(f"{label} long" for label in tiny.LABELS)
    run(runner, [make_work(0, method="plain", labels=labels, views=1)])
    assert len(set(instants)) > 4


def test_a_poisoned_request_fails_alone(runner: Runner) -> None:
    poison = make_work(1, image=np.zeros((0, 0, 3), np.uint8))
    settled, counts = run(runner, [make_work(0), poison, make_work(2)])
    assert isinstance(settled["work-1"], Failure)
    assert settled["work-1"].error_type == "internal"
    assert isinstance(settled["work-0"], Answer)
    assert isinstance(settled["work-2"], Answer)
    assert counts["error_splits"] == 1


def test_out_of_memory_halves_the_batch(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    defend = tapt.defend
    sizes: list[int] = []

    def starved(clip: PromptedCLIP, inputs: DefenseInput) -> object:
        sizes.append(len(inputs.views))
        if len(inputs.views) > 2:
            raise torch.OutOfMemoryError("for a test")
        return defend(clip, inputs)

    monkeypatch.setattr(tapt, "defend", starved)
    settled, counts = run(runner, [make_work(i) for i in range(5)])
    assert all(isinstance(result, Answer) for result in settled.values())
    assert sizes == [5, 3, 2, 1, 2]
    assert counts["oom_splits"] == 2


def test_a_device_that_fails_ends_the_worker_and_settles_nothing(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After such an error every call to the device fails, so another process has to go on; what
    was not settled is tried again there."""

    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        assert status != 0
        raise Ended

    def broken(self: Runner, *arguments: object) -> None:
        raise torch.AcceleratorError("an illegal memory access, for a test")

    monkeypatch.setattr(Runner, "_run", broken)
    monkeypatch.setattr("os._exit", end)
    settled: dict[str, object] = {}
    with pytest.raises(Ended):
        runner.run([make_work(0), make_work(1)], settled.__setitem__, lambda _: False)
    assert not settled


def test_running_out_after_the_last_answer_harms_nobody(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_group = Runner._run

    def late(self: Runner, *arguments: object) -> None:
        run_group(self, *arguments)  # type: ignore[arg-type]
        raise torch.OutOfMemoryError("for a test")

    monkeypatch.setattr(Runner, "_run", late)
    settled, _ = run(runner, [make_work(0), make_work(1)])
    assert all(isinstance(result, Answer) for result in settled.values())


@pytest.mark.parametrize(("threshold", "readout"), [(-2.0, "single"), (2.0, "kept")])
def test_an_answer_names_the_readout_that_was_used(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, threshold: float, readout: str
) -> None:
    monkeypatch.setattr(gate, "THRESHOLD", threshold)  # a cosine: all images pass, or none
    settled, _ = run(runner, [make_work(0, method="gate", readout="kept")])
    result = settled["work-0"]
    assert isinstance(result, Answer)
    assert result.readout == readout


def test_without_a_bundle_zero_steps_equal_plain_and_one_step_adapts(tmp_path: Path) -> None:
    directory = tiny.save_checkpoint(tmp_path)
    runner = Runner(Settings(model=str(directory), device="cpu", learning_rate=1e-2), 0)
    assert runner.ready.info["bundle"] is None
    single = {"views": 1, "readout": "single"}
    works = [make_work(i, steps=s, **single) for i, s in ((6, 0), (6, 3))]
    works = [replace(work, id=f"{work.id}-{work.steps}") for work in works]
    plain, _ = run(runner, [make_work(6, method="plain", views=1)])
    settled, _ = run(runner, works)
    answer, still, moved = plain["work-6"], settled["work-6-0"], settled["work-6-3"]
    assert isinstance(answer, Answer)
    assert isinstance(still, Answer)
    assert isinstance(moved, Answer)
    assert still.scores == pytest.approx(answer.scores, abs=1e-6)
    assert moved.scores != pytest.approx(answer.scores, abs=1e-3)
    assert moved.design == "text"


def test_learned_prompts_without_a_bundle_are_refused(tmp_path: Path) -> None:
    directory = tiny.save_checkpoint(tmp_path)
    runner = Runner(Settings(model=str(directory), device="cpu"), 0)
    assert "apt" not in runner.ready.info["defenses"]
    settled, _ = run(runner, [make_work(i, method="apt", views=1) for i in range(2)])
    for result in settled.values():
        assert isinstance(result, Failure)
        assert (result.error_type, "bundle" in result.message) == ("unprocessable", True)
    with pytest.raises(ModelError, match="apt-ensemble needs a defense bundle"):
        Runner(Settings(model=str(directory), device="cpu", method="apt-ensemble"), 0)


@pytest.mark.parametrize(
    ("method", "design", "steps"),
    [
        ("plain", "none", 0),
        ("apt", "vli", 0),
        ("tapt", "vli", 2),
        ("tpt", "text", 2),
        ("rtpt", "text", 2),
        ("ttc", "none", 2),
    ],
)
def test_every_defense_says_what_it_spent(
    runner: Runner, method: str, design: str, steps: int
) -> None:
    settled, _ = run(runner, [make_work(i, method=method, steps=2) for i in range(2)])
    answer = settled["work-1"]
    assert isinstance(answer, Answer)
    assert (answer.design, answer.steps) == (design, steps)
    assert sum(answer.scores) == pytest.approx(1, abs=1e-5)


def test_templates_without_leading_words_run_beside_others(tmp_path: Path) -> None:
    """Without a bundle their prompts have other shapes, and there is nothing to adapt in `{}`."""
    runner = Runner(Settings(model=str(tiny.save_checkpoint(tmp_path)), device="cpu"), 0)
    templates = ["{}", "a photo of a {}.", "a {}"]
    settled, counts = run(
        runner, [make_work(i, template=template) for i, template in enumerate(templates)]
    )
    steps = [settled[f"work-{i}"].steps for i in range(3)]  # type: ignore[union-attr]
    assert steps == [0, 1, 1]
    assert counts.get("error_splits", 0) == 0


def test_a_bundle_of_another_checkpoint_is_refused(directory: Path, tmp_path: Path) -> None:
    other = tiny.save_checkpoint(tmp_path, seed=5)
    with pytest.raises(ModelError, match="was learned on checkpoint"):
        Runner(Settings(model=str(other), bundle=str(directory / "bundle"), device="cpu"), 0)


def test_a_bundle_of_another_design_is_refused(directory: Path) -> None:
    with pytest.raises(ModelError, match=r"of design vli, the settings ask for vlj"):
        Runner(Settings(model=str(directory), design="vlj", device="cpu"), 0)


@pytest.mark.parametrize("device", ["cuda:7", "toaster", "meta"])
def test_a_device_that_is_not_there_is_one_sentence(directory: Path, device: str) -> None:
    with pytest.raises(ModelError, match=device):
        Runner(Settings(model=str(directory), device=device), 0)


def test_several_templates_where_the_words_adapt_are_refused_alone(runner: Runner) -> None:
    several = ("a photo of a {}.", "a {}")
    works = [make_work(i, method="rtpt", template=several if i == 1 else None) for i in range(3)]
    settled, counts = run(runner, works)
    refused = settled["work-1"]
    assert isinstance(refused, Failure)
    assert refused.error_type == "unprocessable"
    assert refused.message == (
        "The defense rtpt adapts the words of one template, but the request has several. Name one, "
        "or choose one of the defenses plain, ensemble, apt, apt-ensemble, tapt, ttc, mac, gate, "
        "thrift."
    )
    assert isinstance(settled["work-0"], Answer)
    assert isinstance(settled["work-2"], Answer)
    assert not counts.get("error_splits")
    settled, _ = run(runner, [make_work(0, method="tapt", template=several, steps=1)])
    assert isinstance(settled["work-0"], Answer)


SEVERAL = ("a photo of a {}.", "{} seen from afar", "a drawing of the {}")


def score_by_hand(runner: Runner, work: Task, templates: Sequence[str]) -> list[float]:
    """Undefended CLIP, with the mean of a label's normalized features in each template."""
    checkpoint = runner.classifier.checkpoint
    clip, end = checkpoint.clip, checkpoint.clip.model.config.text_config.eos_token_id
    means = []
    for label in work.labels:
        texts = [template.replace("{}", label) for template in templates]
        rows = tokenize(checkpoint.tokenizer, end, texts, clip.context_length, 0)
        each = clip.encode_labels(rows, None)
        mean = (each / each.norm(dim=-1, keepdim=True)).mean(dim=0)
        means.append(mean / mean.norm())
    pixels = make_views(work.image, 1, 0, checkpoint.preprocessing, torch.device("cpu"))
    with torch.no_grad():
        image = clip.encode_images(pixels[None]).features[0, 0]
        scores: list[float] = (clip.logit_scale * torch.stack(means) @ image).softmax(-1).tolist()
    return scores


def test_several_default_templates_are_averaged_where_no_learned_prompts_are_read(
    directory: Path,
) -> None:
    knobs: dict[str, Any] = {"model": str(directory), "device": "cpu"}
    several = Runner(Settings(**knobs, hypothesis_template=SEVERAL), 0)
    single = Runner(Settings(**knobs), 0)
    plain, defended = make_work(1, method="plain", steps=0, views=1), make_work(1, id="tapt")
    answers, _ = run(several, [plain])
    by_hand = pytest.approx(score_by_hand(several, plain, SEVERAL), abs=1e-5)
    assert answers[plain.id].scores == by_hand  # type: ignore[union-attr]
    assert score_by_hand(several, plain, SEVERAL[:1]) != by_hand
    (ours,), (theirs,) = (run(one, [defended])[0].values() for one in (several, single))
    assert isinstance(ours, Answer)
    assert isinstance(theirs, Answer)
    assert ours.scores == theirs.scores  # the bundle's text
    assert ours.undefended_scores == by_hand
    named, _ = run(several, [replace(plain, template="a {}")])
    expected = pytest.approx(score_by_hand(several, plain, ["a {}"]), abs=1e-5)
    assert named[plain.id].scores == expected  # type: ignore[union-attr]


def test_a_defense_that_adapts_the_words_of_several_default_templates_is_refused(
    directory: Path,
) -> None:
    runner = Runner(
        Settings(model=str(directory), device="cpu", hypothesis_template=SEVERAL, method="ttc"), 0
    )
    works = [
        make_work(0, method="tpt"),
        make_work(1, method="tpt", template="a photo of a {}."),
        make_work(2, method="tpt", steps=0),
    ]
    settled, _ = run(runner, works)
    assert settled["work-0"] == Failure(
        "unprocessable",
        "The defense tpt adapts the words of one template, but this server's default has several. "
        "Name one `hypothesis_template`, or choose one of the defenses plain, ensemble, apt, "
        "apt-ensemble, tapt, ttc, mac, gate, thrift.",
    )
    assert isinstance(settled["work-1"], Answer)
    assert isinstance(settled["work-2"], Answer)


@pytest.mark.parametrize(
    ("method", "bundle", "adapts", "served"),
    [
        ("rtpt", True, "vision", False),
        ("tapt", False, "vision", False),
        ("tapt", True, "all", True),  # the bundle has a text of its own
        ("ensemble", False, "vision", True),
    ],
)
def test_a_default_method_that_cannot_take_the_default_templates_is_refused_at_the_start(
    directory: Path, tmp_path: Path, method: str, bundle: bool, adapts: Any, served: bool
) -> None:
    model = directory if bundle else tiny.save_checkpoint(tmp_path)
    knobs: dict[str, Any] = {"model": str(model), "device": "cpu", "method": method}
    settings = Settings(**knobs, adapts=adapts, hypothesis_template=SEVERAL)
    if served:
        Runner(settings, 0)
        return
    with pytest.raises(ModelError) as caught:
        Runner(settings, 0)
    assert str(caught.value) == (
        f"method {method} adapts the words of one template, but hypothesis_template has 3"
    )
    Runner(settings.model_copy(update={"steps": 0}), 0)


def test_the_first_view_of_a_large_image_is_the_decoders(runner: Runner) -> None:
    view = np.ascontiguousarray(tiny.draw_image(5)[:32, :32])
    work = make_work(4, method="plain", steps=0, views=1)
    (with_view, alone, without) = (
        run(runner, [replace(work, **changes)])[0][work.id]
        for changes in ({"view": view}, {"image": view}, {})
    )
    assert isinstance(with_view, Answer)
    assert isinstance(alone, Answer)
    assert isinstance(without, Answer)
    assert with_view.scores == pytest.approx(alone.scores, abs=1e-5)
    assert with_view.scores != pytest.approx(without.scores, abs=1e-3)
    (shown,) = run(runner, [replace(work, view=view, return_views=True)])[0].values()
    assert isinstance(shown, Answer)
    np.testing.assert_array_equal(shown.view_reports[0].image, view)


def test_the_decoders_are_told_the_preprocessing(runner: Runner) -> None:
    assert runner.ready.preprocessing == runner.classifier.checkpoint.preprocessing
