"""What every defense in the table owes: isolation, honest starting points, a way out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.classifier import DefendedClassifier, Finding, Picture
from models.defenses import DEFENSES, gate, rtpt, thrift, ttc
from models.objective import Objective
from models.tapt import entropies, gradients
from service.intake import options, requests
from service.settings import Settings
from tests import tiny
from tests.tiny import make_pictures

VIEWS = 10
ADAPTING = [name for name, method in DEFENSES.items() if method.adapts]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny.load(tiny.save_checkpoint(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def guard(checkpoint: Checkpoint) -> DefendedClassifier:
    bundle = tiny.make_bundle(checkpoint)
    objective = Objective(reference=bundle.statistics, layers=2, learning_rate=5e-3)
    return DefendedClassifier(checkpoint, bundle, objective, selection_ratio=0.3)


@pytest.fixture(autouse=True)
def _parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds at which a random model's pictures fall on both sides."""
    monkeypatch.setattr(gate, "THRESHOLD", 0.5)
    monkeypatch.setattr(ttc, "PUBLISHED", replace(ttc.PUBLISHED, tau=0.05))


def classify(
    guard: DefendedClassifier, pictures: Sequence[Picture], method: str, steps: Sequence[int]
) -> list[Finding]:
    def leaving(taken: int, rows: list[int]) -> set[int]:
        return {row for row in rows if taken >= steps[row]}

    findings = guard.classify(pictures, method, VIEWS, leaving)
    return sorted(findings, key=lambda finding: finding.verdict.row)


def probabilities(findings: list[Finding]) -> list[Tensor]:
    return [finding.verdict.probabilities for finding in findings]


def largest_gap(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("method", DEFENSES)
def test_eight_together_equal_the_eight_alone(guard: DefendedClassifier, method: str) -> None:
    pictures, steps = make_pictures(8), [1, 3, 0, 2, 1, 2, 3, 1]
    together = classify(guard, pictures, method, steps)
    alone = [classify(guard, [p], method, [s])[0] for p, s in zip(pictures, steps, strict=True)]
    assert [f.verdict.steps for f in together] == [f.verdict.steps for f in alone]
    assert largest_gap(probabilities(together), probabilities(alone)) < 1e-5
    undefended = [finding.undefended for finding in together]
    assert largest_gap(undefended, probabilities(classify(guard, pictures, "plain", steps))) < 1e-6
    if method in ADAPTING:  # the steps did something that company could have disturbed
        before = probabilities(classify(guard, pictures, method, [0] * 8))
        assert largest_gap(probabilities(together), before) > 1e-4


@pytest.mark.parametrize("method", DEFENSES)
def test_the_same_seed_gives_the_same_answer(guard: DefendedClassifier, method: str) -> None:
    picture = make_pictures(7)[6]
    answers = [
        probabilities(classify(guard, [replace(picture, seed=seed)], method, [1]))[0]
        for seed in (5, 5, 6)
    ]
    assert torch.equal(answers[0], answers[1])
    if method not in ("plain", "apt"):  # which draw nothing
        assert not torch.equal(answers[0], answers[2])


@pytest.mark.parametrize(("still", "readout"), [("apt", "single"), ("apt-ensemble", "all")])
def test_zero_steps_are_the_learned_prompts(
    guard: DefendedClassifier, still: str, readout: str
) -> None:
    pictures = [replace(picture, readout=readout) for picture in make_pictures(4)]
    loop = probabilities(classify(guard, pictures, "tapt", [0] * 4))
    assert largest_gap(probabilities(classify(guard, pictures, still, [0] * 4)), loop) < 1e-6
    assert largest_gap(probabilities(classify(guard, pictures, "plain", [0] * 4)), loop) > 0.01


def test_tpt_and_rtpt_start_from_plain_words_beside_a_bundle(guard: DefendedClassifier) -> None:
    pictures = make_pictures(4)
    plain = classify(guard, pictures, "plain", [0] * 4)
    assert (
        largest_gap(probabilities(classify(guard, pictures, "tpt", [0] * 4)), probabilities(plain))
        < 1e-6
    )
    views = [f.verdict.views for f in classify(guard, pictures, "ensemble", [0] * 4)]
    first = [f.verdict.views for f in classify(guard, pictures, "rtpt", [1] * 4)]
    assert largest_gap(views, first) < 1e-6


def test_only_what_a_method_needs_is_encoded(checkpoint: Checkpoint) -> None:
    guard = DefendedClassifier(checkpoint, tiny.make_bundle(checkpoint))
    for method, encoded in {"plain": 1, "ensemble": 0, "ttc": 0, "rtpt": 1, "tapt": 1}.items():
        before = guard.encoder.misses
        classify(guard, make_pictures(1), method, [0])
        assert guard.encoder.misses - before == encoded, method


@pytest.mark.parametrize("method", ADAPTING)
def test_the_cancelled_leave_and_the_others_do_not_notice(
    guard: DefendedClassifier, method: str
) -> None:
    pictures = make_pictures(6)
    asked: list[int] = []

    def leaving(taken: int, rows: list[int]) -> set[int]:
        asked.append(taken)
        return set(rows) if taken == 2 else {2, 3} & set(rows)

    cut = {f.verdict.row: f.verdict for f in guard.classify(pictures, method, VIEWS, leaving)}
    assert asked == [0, 1, 2]
    assert (cut[2].steps, cut[3].steps) == (0, 0)
    full = classify(guard, pictures, method, [2] * 6)
    for row in (0, 1, 4, 5):
        assert largest_gap([cut[row].probabilities], [full[row].verdict.probabilities]) < 1e-5


def test_the_mean_of_entropies_is_another_loss_than_the_entropy_of_the_mean(
    guard: DefendedClassifier,
) -> None:
    clip, picture = guard.checkpoint.clip, make_pictures(7)[6]
    labels = guard.encoder.encode(picture.labels, guard.template, "words")
    views = torch.rand(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    losses, found = gradients(
        clip, views, labels.batch, labels.features, labels.prompts, Objective(of_mean=False)
    )
    logits = clip.logit_scale * clip.encode_images(views).features[0] @ labels.features.T
    torch.testing.assert_close(losses.entropy, entropies(logits).mean().view(1))
    _, other = gradients(clip, views, labels.batch, labels.features, labels.prompts, Objective())
    assert not torch.allclose(found["text"], other["text"], rtol=1e-2)


def test_rtpt_goes_down_the_mean_of_entropies(
    guard: DefendedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first AdamW step is nearly a sign, so the reference figures alone cannot tell."""
    pictures = make_pictures(4)
    published = probabilities(classify(guard, pictures, "rtpt", [3] * 4))
    monkeypatch.setattr(rtpt, "OBJECTIVE", replace(rtpt.OBJECTIVE, of_mean=True))
    of_mean = probabilities(classify(guard, pictures, "rtpt", [3] * 4))
    assert largest_gap(published, of_mean) > 1e-4


def test_the_counterattack_stays_within_its_ball(guard: DefendedClassifier) -> None:
    recipe = replace(ttc.PUBLISHED, tau=1e9)  # nobody is spared
    gray = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), gray])
    noise = ttc.draw_noise(pixels, [1, 2, 3], recipe.eps)
    clip = guard.checkpoint.clip
    with torch.no_grad():
        seen = clip.encode_images(torch.stack([pixels, pixels + noise], dim=1)).projected
    leaving = lambda taken, rows: set(rows) if taken == 3 else set()  # noqa: E731
    (moved,) = ttc.counterattack(clip, pixels, noise, seen, recipe, leaving)
    assert float(moved.deltas.abs().max()) <= recipe.eps + 1e-6
    assert float((pixels + moved.deltas).min()) >= -1e-6
    assert float((pixels + moved.deltas).max()) <= 1 + 1e-6
    with torch.no_grad():
        after = clip.encode_images((pixels + moved.deltas).unsqueeze(1)).projected
    further = ttc.drift_ratio(torch.cat([seen[:, :1], after], dim=1))
    assert bool((further > ttc.drift_ratio(seen)).all())


def test_the_gate_adapts_the_suspects_and_passes_the_rest(guard: DefendedClassifier) -> None:
    pictures = make_pictures(8)
    gated = classify(guard, pictures, "gate", [2] * 8)
    passed = [finding.verdict.steps == 0 for finding in gated]
    assert 0 < sum(passed) < 8
    plain = classify(guard, pictures, "plain", [0] * 8)
    adapted = classify(guard, pictures, "tapt", [2] * 8)
    expected = [p if free else a for free, p, a in zip(passed, plain, adapted, strict=True)]
    assert largest_gap(probabilities(gated), probabilities(expected)) < 1e-5


def test_thrift_stops_where_a_few_views_agree(
    guard: DefendedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = make_pictures(8)
    adapted = classify(guard, pictures, "tapt", [2] * 8)
    few = thrift.few_views(len(adapted[0].verdict.views))
    at_first = torch.stack([f.verdict.views[:few, :2].mean(dim=0).max() for f in adapted])
    monkeypatch.setattr(thrift, "CONFIDENCE", float(at_first.median()))
    spared = classify(guard, pictures, "thrift", [2] * 8)
    short = [len(finding.verdict.views) == few for finding in spared]
    assert 0 < sum(short) < 8
    for stopped, found, whole in zip(short, spared, adapted, strict=True):
        expected = whole.verdict.views[:few].mean(dim=0) if stopped else whole.verdict.probabilities
        assert found.verdict.steps == (0 if stopped else 2)
        torch.testing.assert_close(found.verdict.probabilities, expected, atol=1e-5, rtol=0)


def test_views_agree_when_they_name_one_label_with_confidence() -> None:
    sure, split, faint = (
        [[0.95, 0.05], [0.97, 0.03]],
        [[0.99, 0.01], [0.01, 0.99]],
        [[0.6, 0.4]] * 2,
    )
    found = thrift.agree(torch.tensor([sure, split, faint]))
    assert found.tolist() == [True, False, False]


def test_learned_prompts_without_a_bundle_are_refused(checkpoint: Checkpoint) -> None:
    guard = DefendedClassifier(checkpoint, None)
    assert set(DEFENSES) - set(guard.methods) == {"apt", "apt-ensemble"}
    with pytest.raises(ValueError, match="apt needs a defense bundle"):
        classify(guard, make_pictures(1), "apt", [0])


def test_the_service_offers_the_table() -> None:
    """Its API process imports no torch, so it keeps names and facts of its own."""
    offered = get_args(Settings.model_fields["method"].annotation)
    asked = get_args(get_args(requests.DefenseOptions.model_fields["method"].annotation)[0])
    assert offered == asked == tuple(DEFENSES)
    assert {name for name, method in DEFENSES.items() if not method.adapts} == options.STILL
    assert ttc.PUBLISHED.steps == options.COUNTERATTACK_STEPS
