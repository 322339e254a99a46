"""An adaptive attacker differentiates the very defense that answers, its steps included."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attacks.adaptive import AttackableDefense, surrogates
from models.attacks.attack import Budget, cross_entropy, loss_and_gradient, loss_only
from models.attacks.pgd import pgd
from models.attacks.preflight import preflight
from models.attacks.stealthy import stealthy
from models.attacks.threats import static, transfer
from models.attacks.unrolled import unroll
from models.classifier import DefendedClassifier, ImageQuery
from models.defenses import gate, thrift
from models.defenses.catalog import DEFENSES
from models.label_encoder import join_encoded
from models.tapt import Adapts, Objective
from models.views import make_views
from tests import tiny

NAMES = ("cat", "dog", "lemon", "cliff")
VIEWS = 6


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> DefendedClassifier:
    checkpoint = tiny.load(tiny.save_checkpoint(tmp_path_factory.mktemp("clip")))
    bundle = tiny.make_bundle(checkpoint)
    objective = Objective(bundle.statistics, bundle.layers, 10.0, learning_rate=0.05)
    return DefendedClassifier(checkpoint, bundle, objective, selection_ratio=0.4).without_resize()


@pytest.fixture(scope="module")
def images() -> list[Any]:
    return [tiny.draw_image(number)[:32, :32].copy() for number in range(3)]


@pytest.fixture(scope="module")
def pixels(images: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def answer(
    classifier: DefendedClassifier, images: list[Any], method: str, steps: int, readout: str
) -> Tensor:
    """The classifier's own answer, as probabilities [N, C], with seeds 0, 1, 2."""
    queries = [
        ImageQuery(image, NAMES, None, readout, seed, steps) for seed, image in enumerate(images)
    ]
    (batch,) = classifier.prepare(queries, method)
    found = {prediction.row: prediction for prediction in classifier.classify(batch, VIEWS)}
    return torch.stack([found[row].probabilities for row in range(len(images))])


def attackable(
    classifier: DefendedClassifier, method: str, steps: int = 1, readout: str = "all", way: int = 0
) -> AttackableDefense:
    seeds = range(3)  # one an image
    model = list(surrogates(classifier, NAMES, method, VIEWS, steps, readout, seeds).values())[way]
    assert isinstance(model, AttackableDefense)
    return model


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("method", DEFENSES)
def test_what_is_attacked_is_what_answers(
    classifier: DefendedClassifier, images: list[Any], pixels: Tensor, method: str, steps: int
) -> None:
    for way in range(len(surrogates(classifier, NAMES, method, VIEWS, steps, "all", []))):
        model = attackable(classifier, method, steps, way=way)
        with torch.set_grad_enabled(model.way != "stepless"):  # whose gradient is another's
            found = model.answer(pixels.clone().requires_grad_(), [0, 1, 2]).exp()
        expected = answer(classifier, images, method, steps, "all")
        torch.testing.assert_close(found.detach(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("threshold", [-2, 2])
def test_both_ways_past_the_gate_are_attacked(
    classifier: DefendedClassifier,
    images: list[Any],
    pixels: Tensor,
    threshold: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gate, "THRESHOLD", threshold)
    found = attackable(classifier, "gate").answer(pixels, [0, 1, 2]).exp()
    expected = answer(classifier, images, "plain" if threshold < 0 else "tapt", 1, "all")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("enough", [True, False])
def test_both_ways_of_thrift_are_attacked(
    classifier: DefendedClassifier,
    images: list[Any],
    pixels: Tensor,
    enough: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(thrift, "agree", lambda p: torch.full((len(p),), enough, dtype=torch.bool))
    found = attackable(classifier, "thrift").answer(pixels, [0, 1, 2]).exp()
    expected = answer(classifier, images, "thrift", 1, "all")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("readout", ["single", "kept", "weighted"])
def test_every_readout_is_attacked_as_it_answers(
    classifier: DefendedClassifier, images: list[Any], pixels: Tensor, readout: str
) -> None:
    for way in (0, 1):
        found = attackable(classifier, "tapt", 1, readout, way).answer(pixels, [0, 1, 2]).exp()
        expected = answer(classifier, images, "tapt", 1, readout)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("adapts", ["vision", "text"])
def test_held_prompts_are_held_for_the_attacker(
    classifier: DefendedClassifier, images: list[Any], pixels: Tensor, adapts: Adapts
) -> None:
    objective = replace(classifier.objective, adapts=adapts)
    fixed = DefendedClassifier(
        classifier.checkpoint, classifier.bundle, objective, classifier.selection_ratio
    )
    expected = answer(fixed, images, "tapt", 2, "all")
    assert not torch.equal(expected, answer(classifier, images, "tapt", 2, "all"))
    for way in (0, 1):
        leaf = pixels.clone().requires_grad_()
        found = attackable(fixed, "tapt", 2, way=way).answer(leaf, [0, 1, 2]).exp()
        torch.testing.assert_close(found.detach(), expected, atol=1e-4, rtol=1e-3)
        (gradient,) = torch.autograd.grad(found[:, 0].sum(), leaf)
        assert gradient.abs().amax() > 0


@pytest.mark.parametrize("method", DEFENSES)
def test_gradients_reach_the_pixels_of_every_picture(
    classifier: DefendedClassifier, pixels: Tensor, method: str
) -> None:
    for way in range(len(surrogates(classifier, NAMES, method, VIEWS, 1, "all", []))):
        model, labels = attackable(classifier, method, way=way), torch.tensor([0, 1, 2])
        at = loss_and_gradient(model, pixels, labels, cross_entropy, 2)
        assert at.gradient.isfinite().all()
        assert (at.gradient.flatten(1).abs().amax(dim=1) > 0).all()


def test_views_are_drawn_anew_at_every_call(classifier: DefendedClassifier, pixels: Tensor) -> None:
    model = attackable(classifier, "ensemble")
    assert not torch.equal(model(pixels), model(pixels))
    assert torch.equal(
        attackable(classifier, "ensemble")(pixels), attackable(classifier, "ensemble")(pixels)
    )


def test_each_image_of_a_batch_draws_its_own_views(
    classifier: DefendedClassifier, pixels: Tensor
) -> None:
    together = attackable(classifier, "tapt")(pixels)
    alone = attackable(classifier, "tapt").select([1])(pixels[1:2])
    torch.testing.assert_close(together[1:2], alone)


def test_mean_logits_have_the_answer_of_a_single_view(
    classifier: DefendedClassifier, pixels: Tensor
) -> None:
    model = attackable(classifier, "plain")
    torch.testing.assert_close(model.averaging_logits()(pixels).log_softmax(dim=1), model(pixels))
    mean = attackable(classifier, "ensemble").averaging_logits()
    assert (mean(pixels).exp().sum(dim=1) - 1).abs().min() > 0.1  # no probabilities


def test_a_gradient_without_the_step_is_that_of_the_learned_prompts(
    classifier: DefendedClassifier, pixels: Tensor
) -> None:
    labels = torch.tensor([0, 1, 2])
    stepless, prompted = (
        attackable(classifier, "tapt", way=2),
        attackable(classifier, "apt-ensemble"),
    )
    assert stepless.way == "stepless"
    gradients = [
        loss_and_gradient(model, pixels, labels, cross_entropy, 1).gradient
        for model in (stepless, prompted)
    ]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3)


def test_weaker_attackers_attack_less_of_the_defense(
    classifier: DefendedClassifier, pixels: Tensor
) -> None:
    with torch.no_grad():
        for method, threat, expected in (
            ("tapt", "transfer", transfer(classifier, NAMES)),
            ("tapt", "static", static(classifier, NAMES)),
            ("ensemble", "static", transfer(classifier, NAMES)),  # it has no prompts
        ):
            found = attackable(classifier, method).weaker(threat)(pixels)
            torch.testing.assert_close(found, expected(pixels))


@pytest.mark.parametrize("method", ["plain", "ensemble", "apt-ensemble", "tapt"])
def test_the_attacker_sees_the_suspicion_that_is_reported(
    classifier: DefendedClassifier, images: list[Any], pixels: Tensor, method: str
) -> None:
    queries = [ImageQuery(image, NAMES, None, "all", seed, 1) for seed, image in enumerate(images)]
    (batch,) = classifier.prepare(queries, method)
    reported = {found.row: found.suspicion for found in classifier.classify(batch, VIEWS)}
    with torch.no_grad():
        _, seen = attackable(classifier, method).observe(pixels, [0, 1, 2])
    assert seen.tolist() == pytest.approx([reported[row] for row in range(3)], abs=1e-4)


@pytest.mark.parametrize(("method", "way"), [("apt-ensemble", 0), ("tapt", 2)])
def test_the_suspicion_has_a_gradient(
    classifier: DefendedClassifier, pixels: Tensor, method: str, way: int
) -> None:
    leaf = pixels.clone().requires_grad_()
    _, seen = attackable(classifier, method, way=way).observe(leaf, [0, 1, 2])
    (gradient,) = torch.autograd.grad(seen.sum(), leaf)
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()


def test_a_model_without_a_suspicion_cannot_be_attacked_stealthily(
    classifier: DefendedClassifier, pixels: Tensor
) -> None:
    with pytest.raises(TypeError, match="suspicion"):
        stealthy(
            transfer(classifier, NAMES), pixels, torch.tensor([0, 1, 2]), Budget(0.1), [0, 1, 2]
        )


def test_the_gradient_of_views_is_that_of_the_resampling(
    classifier: DefendedClassifier, pixels: Tensor
) -> None:
    levels, source = pixels[0] * 255, torch.Generator().manual_seed(0)
    weights = torch.randn(VIEWS, 3, 32, 32, generator=source)
    change = torch.randint(-40, 41, levels.shape, generator=source)
    change = (levels + change).clamp(0, 255) - levels

    def read(at: Tensor) -> Tensor:
        return (
            weights * make_views(at, VIEWS, 7, classifier.checkpoint.preprocessing, tiny.CPU)
        ).sum()

    leaf = levels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(read(leaf), leaf)
    # Resampling is linear but for the rounding, which averages out over so many pixels.
    real = read(levels + change) - read(levels)
    assert float((gradient * change).sum()) == pytest.approx(float(real), rel=0.05)


@pytest.mark.parametrize(("method", "steps"), [("tapt", 1), ("tapt", 2), ("rtpt", 1)])
def test_the_unrolled_gradient_against_finite_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, steps: int
) -> None:
    # What the model keeps in fp32 is kept in fp64 here, where differences are sharp.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    checkpoint = tiny.load(tiny.save_checkpoint(tmp_path, image_size=16, width=16, layers=2))
    clip = checkpoint.clip
    clip.model.double()
    clip.dtype = torch.float64
    bundle = tiny.make_bundle(checkpoint)
    tensors = {name: value.double() for name, value in bundle.prompts.tensors.items()}
    bundle = replace(bundle, prompts=bundle.prompts.map(tensors))
    classifier = DefendedClassifier(checkpoint, bundle)
    labels = classifier.encoder.encode(NAMES, None, DEFENSES[method].prompts)
    objective = Objective(bundle.statistics, bundle.layers, 10.0, learning_rate=0.05)
    if method == "rtpt":
        objective = Objective(of_mean=False, learning_rate=0.05)
    batch, text = join_encoded([labels])
    source = torch.Generator().manual_seed(0)
    views = torch.rand(1, 3, 3, 16, 16, generator=source, dtype=torch.float64)
    direction = torch.randn(views.shape, generator=source, dtype=torch.float64)

    def read(at: Tensor) -> Tensor:
        moved = unroll(clip, at, batch, text, labels.prompts, objective, steps)
        fresh = clip.encode_labels(batch, moved.text)
        # Not of these views themselves: only the way through the prompts is under test.
        seen = clip.encode_images(views, moved.vision).features
        return clip.class_logits(seen, fresh, batch).log_softmax(dim=-1)[0, :, 0].sum()

    with sdpa_kernel(SDPBackend.MATH):
        leaf = views.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(read(leaf), leaf)
        size = 1e-5
        change = read(views + size * direction) - read(views - size * direction)
    slope_along = float((gradient * direction).sum())
    assert abs(slope_along) > 1e-6
    assert slope_along == pytest.approx(change.item() / (2 * size), rel=1e-4)


def test_unrolling_sees_what_holding_does_not(
    classifier: DefendedClassifier, pixels: Tensor
) -> None:
    labels = torch.tensor([0, 1, 2])
    gradients = [
        loss_and_gradient(
            attackable(classifier, "tapt", way=way), pixels, labels, cross_entropy, 1
        ).gradient
        for way in (0, 1)
    ]
    gap = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert gap > 1e-3


def test_an_adaptive_attack_is_stronger_than_a_transferred_one(
    classifier: DefendedClassifier, pixels: Tensor
) -> None:
    budget, seeds = Budget(8 / 255, steps=8, draws=2), [0, 1, 2]
    model = attackable(classifier, "ensemble")
    labels = model(pixels).argmax(dim=1)

    def hurt(attacked: Tensor) -> float:
        return loss_only(model, attacked, labels, cross_entropy, 16).loss.mean().item()

    adapted = hurt(pgd(model, pixels, labels, budget, seeds))
    assert adapted > hurt(pgd(transfer(classifier, NAMES), pixels, labels, budget, seeds))


def test_a_saturated_defense_is_caught(classifier: DefendedClassifier, pixels: Tensor) -> None:
    model = attackable(classifier, "plain")
    labels = model(pixels).argmax(dim=1)
    budget = Budget(12 / 255, steps=8, queries=60)
    honest = preflight(model, pixels, labels, budget, [0, 1, 2])
    assert not any("masked" in sentence for sentence in honest)
    masked = " ".join(
        preflight(lambda x: (1e6 * model(x)).log_softmax(1), pixels, labels, budget, [0, 1, 2])
    )
    assert "gradient is zero on 3 of 3" in masked
