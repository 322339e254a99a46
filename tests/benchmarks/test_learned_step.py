"""The learned step: its gradient is exact, it resumes, and it is compared fairly."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.learned_step import __main__ as command
from benchmarks.learned_step import comparison, experts, learning
from benchmarks.learned_step.comparison import (
    THREATS,
    Trial,
    judge,
    tabulate_accuracies,
    tabulate_differences,
)
from benchmarks.learned_step.frozen import Frozen, freeze
from benchmarks.learned_step.step import (
    LEARNING_RATES,
    LearnedStep,
    answer_after_step,
    begin,
    measure_units,
)
from models.attacks.threats import transfer
from models.bundle import DefenseBundle
from models.classifier import DefendedClassifier
from models.evaluation.sample import Subject
from tests import tiny

NAMES = tiny.LABELS[:4]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def classifier(directory: Path) -> DefendedClassifier:
    checkpoint = tiny.load(directory)
    return DefendedClassifier(checkpoint, tiny.make_bundle(checkpoint)).without_resize()


@pytest.fixture(scope="module")
def bundle(classifier: DefendedClassifier) -> DefenseBundle:
    assert classifier.bundle is not None
    return classifier.bundle


@pytest.fixture(scope="module")
def frozen(classifier: DefendedClassifier) -> Frozen:
    return freeze(classifier, NAMES)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    drawn = [torch.from_numpy(tiny.draw_image(number)[:32, :32].copy()) for number in range(4)]
    return torch.stack(drawn).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def step(frozen: Frozen, bundle: DefenseBundle, pixels: Tensor) -> LearnedStep:
    vision = bundle.prompts.tensors["vision"]
    units = measure_units(frozen, frozen.cut(pixels, 3, range(4)), vision)
    return LearnedStep(vision, torch.tensor([1.0, 0.5, 0.0, 0.0]), torch.tensor([0.05, 0.1]), units)


@torch.no_grad()
def test_without_length_the_step_is_the_mean_over_views(
    frozen: Frozen, step: LearnedStep, pixels: Tensor
) -> None:
    seeds = range(4)
    still = replace(step, rates=torch.zeros(2))
    mean = frozen.answer_by_mean(step.vision, 3)(pixels, seeds)
    found = answer_after_step(frozen, still, 3)(pixels, seeds)
    torch.testing.assert_close(found, mean, atol=1e-4, rtol=1e-4)
    moved = answer_after_step(frozen, step, 3)(pixels, seeds)
    assert float((moved - mean).abs().max()) > 1e-2


@torch.no_grad()
def test_an_image_does_not_depend_on_its_company(
    frozen: Frozen, step: LearnedStep, pixels: Tensor
) -> None:
    answer = answer_after_step(frozen, step, 3)
    together = answer(pixels, range(4))
    alone = torch.cat([answer(pixels[row : row + 1], [row]) for row in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)


def test_the_gradient_passes_through_the_step_exactly(
    frozen: Frozen, step: LearnedStep, pixels: Tensor
) -> None:
    """Against finite differences; a gradient that holds the step's result is another."""
    views, step = frozen.cut(pixels, 3, range(4)), replace(step, rates=3 * step.rates)
    direction = torch.randn(views.shape, generator=torch.Generator().manual_seed(0))

    def value(shifted: Tensor, through: bool) -> Tensor:
        moved = step(frozen, shifted, through)
        return frozen.logits(shifted, moved).log_softmax(dim=-1)[..., 0].sum()

    slopes = []
    for through in (True, False):
        leaf = views.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf, through), leaf)
        slopes.append(float((gradient * direction).sum()))
    size = 1e-3
    ahead, behind = (float(value(views + s * direction, False).detach()) for s in (size, -size))
    expected = (ahead - behind) / (2 * size)
    assert slopes[0] == pytest.approx(expected, rel=0.05)
    assert abs(slopes[1] - expected) > 2 * abs(slopes[0] - expected)


@torch.no_grad()
def test_the_gate_mixes_the_experts_by_the_first_views(
    frozen: Frozen, bundle: DefenseBundle, pixels: Tensor
) -> None:
    vision = bundle.prompts.tensors["vision"]
    values = experts.begin(vision, 0)
    same = values | {"vision": vision.repeat(experts.EXPERTS, 1, 1, 1)}
    mean = frozen.answer_by_mean(vision, 5)(pixels, range(4))
    found = experts.answer_by_experts(frozen, same, 2, 5)(pixels, range(4))
    torch.testing.assert_close(found, mean, atol=1e-4, rtol=1e-4)
    # A gate that is sure reads the later views with one expert.
    apart = {"vision": values["vision"] + torch.randn(values["vision"].shape) / 4}
    chosen = torch.zeros(experts.EXPERTS, 5)
    chosen[2, -1] = 100
    found = experts.answer_by_experts(frozen, apart | {"gate": chosen}, 2, 5)(pixels, range(4))
    alone = frozen.answer_by_mean(apart["vision"][2:3], 5)(pixels, range(4))
    torch.testing.assert_close(found[:, 2:], alone[:, 2:], atol=1e-3, rtol=1e-4)
    assert float((found[:, :2] - alone[:, :2]).abs().max()) > 1e-2


@pytest.mark.parametrize("way", ["step", "experts"])
def test_learning_goes_on_where_it_was_stopped(
    frozen: Frozen,
    bundle: DefenseBundle,
    pixels: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    plan = learning.Plan(steps=3, batch=4, views=3)
    levels = (pixels * 255).round().byte().repeat(3, 1, 1, 1)
    targets = torch.tensor([0, 1, 2, 3] * 3)
    vision = bundle.prompts.tensors["vision"]
    start = experts.begin(vision, 0)
    rates = experts.LEARNING_RATES
    if way == "step":
        start, rates = begin(frozen, vision, pixels, 3), LEARNING_RATES

    def make(values: learning.Values) -> learning.Answer:
        if way == "step":
            return answer_after_step(frozen, LearnedStep(**values), 3)
        return experts.answer_by_experts(frozen, values, 2, 4)

    def learn(name: str, **settings: Any) -> learning.Values:
        path = tmp_path / name
        return learning.learn(make, start, rates, levels, targets, plan, path, settings)

    whole = learn("whole")
    assert all(torch.equal(whole[name], start[name]) != (name in rates) for name in start)
    monkeypatch.setattr(learning, "SAVE_SECONDS", -1)
    gradients, taken = learning._gradients, list[int]()

    def fails_at(last: int) -> None:
        def give(*given: Any) -> Any:
            if given[-1] == last:
                raise KeyboardInterrupt
            taken.append(given[-1])
            return gradients(*given)

        monkeypatch.setattr(learning, "_gradients", give)

    fails_at(2)
    with pytest.raises(KeyboardInterrupt):
        learn("cut")
    fails_at(9)
    again = learn("cut")
    assert taken == [0, 1, 2]
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    learn("cut", model="another")
    assert taken == [0, 1, 2, 0, 1, 2]


def test_an_answer_is_attacked_within_the_ball_and_judged_on_every_picture(
    classifier: DefendedClassifier, pixels: Tensor, tmp_path: Path
) -> None:
    levels = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
    subjects = [Subject(np.ascontiguousarray(levels[i % 4]), i % 4, i) for i in range(12)]
    shown: list[float] = []

    def fragile(images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Right on a picture as it is, and on nothing else."""
        gaps = (images.unsqueeze(1) - pixels).abs().amax(dim=(2, 3, 4))
        nearest = gaps.argmin(dim=1)
        if not torch.is_grad_enabled():
            shown.append(float(gaps.amin(dim=1).max()))
        named = torch.where(gaps.amin(dim=1) < 1e-4, nearest, (nearest + 1) % 4)
        return F.one_hot(named, 4).unsqueeze(1) + 0 * images.sum()

    def sturdy(images: Tensor, seeds: Sequence[int]) -> Tensor:
        return -(images.unsqueeze(1) - pixels).square().sum(dim=(2, 3, 4)).unsqueeze(1)

    trial, journal = Trial(attack_steps=2), tmp_path / "outcomes.jsonl"

    def run(answer: learning.Answer, trial: Trial = trial) -> comparison.Outcomes:
        undefended = transfer(classifier, NAMES)
        return judge(answer, undefended, subjects, trial, journal, {"answer": answer.__name__})

    assert run(sturdy) == dict.fromkeys(THREATS, [True] * 12)
    found = run(fragile)
    assert found["clean"] == [True] * 12
    assert found["adaptive"] == found["transfer"] == [False] * 12
    assert max(shown) <= trial.epsilon + 1e-6
    # The same command computes nothing again; a journal that was cut off is filled up.
    asked = len(shown)
    assert run(fragile) == found
    assert len(shown) == asked
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:2]))
    assert run(fragile) == found
    assert asked < len(shown) < 2 * asked
    run(fragile, replace(trial, seed=1))
    assert json.loads(journal.read_text().splitlines()[0])["trial"]["seed"] == 1


def test_the_tables_show_accuracies_and_paired_differences() -> None:
    right, wrong = [True] * 8 + [False] * 2, [True] * 4 + [False] * 6
    rows = {"new": dict.fromkeys(THREATS, right), "old": dict.fromkeys(THREATS, wrong)}
    assert "| new | 16 | 80" in tabulate_accuracies(rows, {"new": 16, "old": 4})
    assert "| old, against new | -40.0 (" in tabulate_differences(rows, [("old", "new")])


def test_the_command_learns_compares_and_resumes(
    directory: Path,
    bundle: DefenseBundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, name in enumerate(NAMES):
        (tmp_path / "data" / name).mkdir(parents=True)
        for picture in range(3):
            image = Image.fromarray(tiny.draw_image(10 * number + picture))
            image.save(tmp_path / "data" / name / f"{picture}.png")
    bundle.save(tmp_path / "bundle")
    flags = f"--model {directory} --bundle {tmp_path}/bundle --data {tmp_path}/data --steps 2"
    flags += f" --test {tmp_path}/data --out {tmp_path}/out --batch 4 --views 3 --limit 6"
    arguments = [*flags.split(), "--attack-steps", "1", "--dry"]
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    command.main()
    page = capsys.readouterr().out
    assert "the same 6 images of `data`" in page
    assert str(tmp_path) not in page
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["n"] == 6
    assert len(figures["outcomes"]["gated experts, 3 and 9 views"]["adaptive"]) == 6
    monkeypatch.setattr(comparison, "_judge", None)
    monkeypatch.setattr(learning, "_gradients", None)
    command.main()
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == figures
