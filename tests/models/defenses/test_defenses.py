"""What every defense must have: isolation in a batch, the right starting point, cancellation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attacks.attack import Budget
from models.attacks.pgd import pgd
from models.attacks.threats import transfer
from models.checkpoint import Checkpoint
from models.classifier import DefendedClassifier, ImageQuery, Prediction
from models.clip import ImageFeatures
from models.defenses import gate, mac, rtpt, thrift, ttc
from models.defenses.augmentation import augment
from models.defenses.catalog import DEFENSES
from models.defenses.counterattack import draw_noise, drift_ratio
from models.loading import load_classifier
from models.tapt import Adapts, Exit, Objective, entropies, gradients, leaves_after
from models.views import make_views
from tests import tiny
from tests.tiny import make_queries

VIEWS = 10
ADAPTING = [name for name, spec in DEFENSES.items() if spec.adapts]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny.load(tiny.save_checkpoint(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def classifier(checkpoint: Checkpoint) -> DefendedClassifier:
    bundle = tiny.make_bundle(checkpoint)
    objective = Objective(reference=bundle.statistics, layers=2, learning_rate=5e-3)
    return DefendedClassifier(checkpoint, bundle, objective, selection_ratio=0.3)


@pytest.fixture(autouse=True)
def _parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds at which a random model's queries fall on both sides."""
    monkeypatch.setattr(gate, "THRESHOLD", 0.5)
    monkeypatch.setattr(ttc, "PUBLISHED", replace(ttc.PUBLISHED, tau=0.05))
    monkeypatch.setattr(mac, "PUBLISHED", replace(mac.PUBLISHED, threshold=0.6))


def classify(
    classifier: DefendedClassifier,
    queries: Sequence[ImageQuery],
    method: str,
    steps: Sequence[int],
) -> list[Prediction]:
    queries = [replace(query, steps=n) for query, n in zip(queries, steps, strict=True)]
    (batch,) = classifier.prepare(queries, method)
    found = classifier.classify(batch, VIEWS)
    return sorted(found, key=lambda prediction: prediction.row)


def probabilities(predictions: list[Prediction]) -> list[Tensor]:
    return [prediction.probabilities for prediction in predictions]


def largest_gap(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("method", DEFENSES)
def test_eight_together_equal_the_eight_alone(classifier: DefendedClassifier, method: str) -> None:
    queries, steps = make_queries(8), [1, 3, 0, 2, 1, 2, 3, 1]
    together = classify(classifier, queries, method, steps)
    alone = [classify(classifier, [p], method, [s])[0] for p, s in zip(queries, steps, strict=True)]
    assert [f.steps for f in together] == [f.steps for f in alone]
    assert largest_gap(probabilities(together), probabilities(alone)) < 1e-5
    undefended = [p.undefended for p in together]
    assert (
        largest_gap(undefended, probabilities(classify(classifier, queries, "plain", steps))) < 1e-6
    )
    if method in ADAPTING:  # the steps did something that company could have disturbed
        before = probabilities(classify(classifier, queries, method, [0] * 8))
        assert largest_gap(probabilities(together), before) > 1e-4


@pytest.mark.parametrize("method", DEFENSES)
def test_the_same_seed_gives_the_same_answer(classifier: DefendedClassifier, method: str) -> None:
    query = make_queries(7)[6]
    answers = [
        probabilities(classify(classifier, [replace(query, seed=seed)], method, [1]))[0]
        for seed in (5, 5, 6)
    ]
    assert torch.equal(answers[0], answers[1])
    if DEFENSES[method].random:
        assert not torch.equal(answers[0], answers[2])


@pytest.mark.parametrize(("still", "readout"), [("apt", "single"), ("apt-ensemble", "all")])
def test_zero_steps_are_the_learned_prompts(
    classifier: DefendedClassifier, still: str, readout: str
) -> None:
    queries = [replace(query, readout=readout) for query in make_queries(4)]
    loop = probabilities(classify(classifier, queries, "tapt", [0] * 4))
    assert largest_gap(probabilities(classify(classifier, queries, still, [0] * 4)), loop) < 1e-6
    assert largest_gap(probabilities(classify(classifier, queries, "plain", [0] * 4)), loop) > 0.01


def test_tpt_and_rtpt_start_from_plain_words_beside_a_bundle(
    classifier: DefendedClassifier,
) -> None:
    queries = make_queries(4)
    plain = classify(classifier, queries, "plain", [0] * 4)
    assert (
        largest_gap(
            probabilities(classify(classifier, queries, "tpt", [0] * 4)), probabilities(plain)
        )
        < 1e-6
    )
    views = [f.views for f in classify(classifier, queries, "ensemble", [0] * 4)]
    first = [f.views for f in classify(classifier, queries, "rtpt", [1] * 4)]
    assert largest_gap(views, first) < 1e-6


def test_only_what_a_method_needs_is_encoded(checkpoint: Checkpoint) -> None:
    classifier = DefendedClassifier(checkpoint, tiny.make_bundle(checkpoint))
    for method, encoded in {"plain": 1, "ensemble": 0, "ttc": 0, "rtpt": 1, "tapt": 1}.items():
        before = classifier.encoder.misses
        classify(classifier, make_queries(1), method, [0])
        assert classifier.encoder.misses - before == encoded, method


@pytest.mark.parametrize("method", ADAPTING)
def test_the_cancelled_leave_and_the_others_do_not_notice(
    classifier: DefendedClassifier, method: str
) -> None:
    queries = make_queries(6)
    asked: list[int] = []

    def leaving(taken: int, rows: list[int]) -> Exit:
        asked.append(taken)
        return Exit(set(rows)) if taken == 2 else Exit({3} & set(rows), {2} & set(rows))

    (batch,) = classifier.prepare(queries, method)
    cut = {p.row: p for p in classifier.classify(batch, VIEWS, leaving)}
    assert asked == [0, 1, 2]
    full = classify(classifier, queries, method, [2] * 6)
    adapted = {row for row, prediction in enumerate(full) if prediction.steps}
    assert cut.keys() == set(range(6)) - ({2} & adapted)
    assert cut[3].steps == 0
    for row in (0, 1, 4, 5):
        assert largest_gap([cut[row].probabilities], [full[row].probabilities]) < 1e-5


def test_the_dropped_are_not_read_out(
    classifier: DefendedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, sizes = classifier.checkpoint.clip, []
    encode = clip.encode_images

    def record(pixels: torch.Tensor, *others: Any) -> ImageFeatures:
        sizes.append(len(pixels))
        return encode(pixels, *others)

    def leaving(taken: int, rows: list[int]) -> Exit:
        return [Exit(set()), Exit(set(), {0, 2}), Exit({1})][taken]

    monkeypatch.setattr(clip, "encode_images", record)
    (batch,) = classifier.prepare(make_queries(3), "tapt")
    (left,) = classifier.classify(batch, VIEWS, leaving)
    assert (left.row, left.steps) == (1, 2)
    assert sizes == [3, 3, 3, 1, 1]  # plain CLIP, first look, two steps, readout


@pytest.mark.parametrize(
    ("method", "bundled", "adapts"),
    [
        ("tapt", False, "vision"),
        ("tpt", False, "vision"),
        ("rtpt", True, "vision"),
        ("tapt", True, "text"),
        ("tapt", True, "all"),
    ],
)
def test_views_are_encoded_once_where_only_the_text_moves(
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    bundled: bool,
    adapts: Adapts,
) -> None:
    bundle = tiny.make_bundle(checkpoint) if bundled else None
    reference = bundle.statistics if bundle else None
    objective = Objective(reference=reference, layers=2, learning_rate=5e-3, adapts=adapts)
    classifier = DefendedClassifier(checkpoint, bundle, objective, selection_ratio=0.3)
    queries, steps = make_queries(4), [1, 3, 0, 2]
    encoded: list[int] = []
    encode = checkpoint.clip._encode_views

    def record(pixels: Tensor, *others: Any) -> Any:
        encoded.append(len(pixels))
        return encode(pixels, *others)

    monkeypatch.setattr(checkpoint.clip, "_encode_views", record)
    (batch,) = classifier.prepare([replace(q, readout="all") for q in queries], method)
    undefended = len(queries) if batch.plain is not batch.prompted else 0
    found = classify(classifier, queries, method, steps)
    if adapts == "all":
        assert sum(encoded) > undefended + len(queries) * VIEWS
        return
    assert sum(encoded) == undefended + len(queries) * VIEWS
    monkeypatch.setattr(Objective, "moves_images", lambda *_: True)
    again = classify(classifier, queries, method, steps)
    assert sum(encoded) > 2 * (undefended + len(queries) * VIEWS)
    assert largest_gap(probabilities(found), probabilities(again)) < 1e-5
    start = classify(classifier, queries, method, [0] * 4)
    assert largest_gap(probabilities(found), probabilities(start)) > 1e-4


def test_the_mean_of_entropies_is_another_loss_than_the_entropy_of_the_mean(
    classifier: DefendedClassifier,
) -> None:
    clip, query = classifier.checkpoint.clip, make_queries(7)[6]
    labels = classifier.encoder.encode(query.labels, classifier.template, "words")
    views = torch.rand(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    losses, found = gradients(
        clip, views, labels.batch, labels.features, labels.prompts, Objective(of_mean=False)
    )
    logits = clip.logit_scale * clip.encode_images(views).features[0] @ labels.features.T
    torch.testing.assert_close(losses.entropy, entropies(logits).mean().view(1))
    _, other = gradients(clip, views, labels.batch, labels.features, labels.prompts, Objective())
    assert not torch.allclose(found["text"], other["text"], rtol=1e-2)


def test_rtpt_goes_down_the_mean_of_entropies(
    classifier: DefendedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first AdamW step is nearly a sign, so the reference figures alone cannot tell."""
    queries = make_queries(4)
    published = probabilities(classify(classifier, queries, "rtpt", [3] * 4))
    monkeypatch.setattr(rtpt, "OBJECTIVE", replace(rtpt.OBJECTIVE, of_mean=True))
    of_mean = probabilities(classify(classifier, queries, "rtpt", [3] * 4))
    assert largest_gap(published, of_mean) > 1e-4


def test_the_counterattack_stays_within_its_ball(classifier: DefendedClassifier) -> None:
    recipe = replace(ttc.PUBLISHED, tau=1e9)  # nobody is spared
    gray = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), gray])
    noise = draw_noise(pixels, [1, 2, 3], recipe.eps)
    clip = classifier.checkpoint.clip
    with torch.no_grad():
        seen = clip.encode_images(torch.stack([pixels, pixels + noise], dim=1)).projected
    (moved,) = ttc.counterattack(clip, pixels, noise, seen, recipe, leaves_after(3))
    assert float(moved.deltas.abs().max()) <= recipe.eps + 1e-6
    assert float((pixels + moved.deltas).min()) >= -1e-6
    assert float((pixels + moved.deltas).max()) <= 1 + 1e-6
    with torch.no_grad():
        after = clip.encode_images((pixels + moved.deltas).unsqueeze(1)).projected
    further = drift_ratio(torch.cat([seen[:, :1], after], dim=1))
    assert bool((further > drift_ratio(seen)).all())


def test_the_adaptive_counterattack_stays_within_its_ball(classifier: DefendedClassifier) -> None:
    recipe = mac.AdaptiveCounterattack()
    gray = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), gray])
    views = torch.stack([images, images.flip(-1)], dim=1)
    weights = torch.tensor([[1.0, 0.5], [1.0, 1.0], [0.0, 1.0]])
    clip = classifier.checkpoint.clip
    with torch.no_grad():
        still = clip.encode_images(views).projected
    found = {
        steps: next(
            mac.counterattack(clip, views, still, weights, recipe, [1, 2, 3], leaves_after(steps))
        )
        for steps in (0, 4)
    }
    for moved in found.values():
        reach = moved.deltas.abs().amax(dim=(2, 3, 4))
        assert bool((reach <= recipe.eps * weights + 1e-6).all())
        assert float((views + moved.deltas).min()) >= -1e-6
        assert float((views + moved.deltas).max()) <= 1 + 1e-6
    with torch.no_grad():
        noised, attacked = (clip.encode_images(views + found[n].deltas).projected for n in (0, 4))
    further = (attacked - still).norm(dim=-1) - (noised - still).norm(dim=-1)
    assert bool((further[weights > 0] > 0).all())


def test_the_adaptive_counterattack_spares_what_augmenting_hardly_moves(
    classifier: DefendedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = make_queries(8)
    taken = [prediction.steps for prediction in classify(classifier, queries, "mac", [2] * 8)]
    assert {0, 2} == set(taken)
    monkeypatch.setattr(mac, "PUBLISHED", replace(mac.PUBLISHED, threshold=2.0))
    spared = classify(classifier, queries, "mac", [2] * 8)
    assert [prediction.steps for prediction in spared] == [0] * 8
    # What is left are the logits of the two views, averaged.
    clip, query = classifier.checkpoint.clip, queries[6]
    preprocessing, source = classifier.checkpoint.preprocessing, np.random.default_rng(query.seed)
    image = make_views(query.image, 1, 0, preprocessing, tiny.CPU)
    views = torch.stack([image, augment(image, [source])], dim=1)
    labels = classifier.encoder.encode(query.labels, classifier.template, "none")
    logits = clip.class_logits(clip.encode_images(views).features, labels.features, labels.batch)
    expected = logits[0].mean(dim=0).softmax(dim=-1)
    torch.testing.assert_close(spared[6].probabilities, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("levels", "share"), [(1, 0.6), (2, 0.2)])
def test_the_adaptive_counterattack_restores_labels(
    monkeypatch: pytest.MonkeyPatch, levels: int, share: float
) -> None:
    """On the embedded model, under an attack on undefended CLIP. Two views without a counterattack
    restore fewer."""
    classifier = load_classifier("embedded").without_resize()
    monkeypatch.setattr(mac, "PUBLISHED", mac.AdaptiveCounterattack())
    names = (
        *tiny.LABELS,
        *["goldfish", "snail", "pizza", "banana", "bridge", "castle", "umbrella", "violin"],
    )
    drawn = [
        torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(number)) for number in range(24)
    ]
    smooth = F.interpolate(torch.stack(drawn), size=64, mode="bicubic").clamp(0, 1)
    pixels = (smooth * 255).round() / 255

    def label(method: str, pixels: Tensor, steps: int = 4) -> Tensor:
        queries = [
            ImageQuery(image, names, seed=number, steps=steps)
            for number, image in enumerate((pixels * 255).round())
        ]
        (batch,) = classifier.prepare(queries, method)
        found = {p.row: p.probabilities.argmax() for p in classifier.classify(batch, 1)}
        return torch.stack([found[row] for row in range(len(queries))])

    true = label("plain", pixels)
    budget = Budget(levels / 255, steps=8)
    attacked = pgd(transfer(classifier, names), pixels, true, budget, range(24))
    broken = label("plain", attacked) != true
    attacked, true = attacked[broken], true[broken]
    assert len(true) >= 12
    restored = int((label("mac", attacked) == true).sum())
    monkeypatch.setattr(mac, "PUBLISHED", replace(mac.PUBLISHED, threshold=9.0))
    without = int((label("mac", attacked) == true).sum())
    assert restored > without
    assert restored >= share * len(true)


def test_the_gate_adapts_the_suspects_and_passes_the_rest(classifier: DefendedClassifier) -> None:
    queries = make_queries(8)
    gated = classify(classifier, queries, "gate", [2] * 8)
    passed = [prediction.steps == 0 for prediction in gated]
    assert 0 < sum(passed) < 8
    plain = classify(classifier, queries, "plain", [0] * 8)
    adapted = classify(classifier, queries, "tapt", [2] * 8)
    expected = [p if free else a for free, p, a in zip(passed, plain, adapted, strict=True)]
    assert largest_gap(probabilities(gated), probabilities(expected)) < 1e-5
    assert [prediction.readout for prediction in gated] == [
        "single" if free else query.readout for free, query in zip(passed, queries, strict=True)
    ]


def test_thrift_stops_where_a_few_views_agree(
    classifier: DefendedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = make_queries(8)
    adapted = classify(classifier, queries, "tapt", [2] * 8)
    few = thrift.few_views(len(adapted[0].views))
    at_first = torch.stack([f.views[:few, :2].mean(dim=0).max() for f in adapted])
    monkeypatch.setattr(thrift, "CONFIDENCE", float(at_first.median()))
    spared = classify(classifier, queries, "thrift", [2] * 8)
    short = [len(prediction.views) == few for prediction in spared]
    assert 0 < sum(short) < 8
    for query, stopped, found, whole in zip(queries, short, spared, adapted, strict=True):
        expected = whole.views[:few].mean(dim=0) if stopped else whole.probabilities
        assert found.steps == (0 if stopped else 2)
        assert found.readout == ("all" if stopped else query.readout)
        torch.testing.assert_close(found.probabilities, expected, atol=1e-5, rtol=0)


def test_views_agree_when_they_name_one_label_with_confidence() -> None:
    sure, split, faint = (
        [[0.95, 0.05], [0.97, 0.03]],
        [[0.99, 0.01], [0.01, 0.99]],
        [[0.6, 0.4]] * 2,
    )
    found = thrift.agree(torch.tensor([sure, split, faint]))
    assert found.tolist() == [True, False, False]


def test_learned_prompts_without_a_bundle_are_refused(checkpoint: Checkpoint) -> None:
    classifier = DefendedClassifier(checkpoint, None)
    assert set(DEFENSES) - set(classifier.methods) == {"apt", "apt-ensemble"}
    with pytest.raises(ValueError, match="apt needs a defense bundle"):
        classify(classifier, make_queries(1), "apt", [0])
