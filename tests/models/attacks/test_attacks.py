"""Attacks stay in their ball, do their worst, agree with another's, and see through masks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.attacks import ATTACKS
from models.attacks.apgd import aim, apgd, checkpoints, climb
from models.attacks.attack import (
    Budget,
    Model,
    approximate,
    cross_entropy,
    draw_start,
    loss_and_gradient,
    loss_only,
    margin,
    quantize,
)
from models.attacks.autoattack import MissingExtra, autoattack
from models.attacks.pgd import pgd
from models.attacks.preflight import preflight
from models.attacks.square import square

EPSILON = 4 / 255
BUDGET = Budget(EPSILON, steps=10, queries=60)
OURS = [ATTACKS[name] for name in ("pgd", "apgd", "square")]


class Net(nn.Module):
    """A small random classifier of 8x8 pictures into six classes, far from linear."""

    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(192, 64, generator=source) / 4)
        self.second = nn.Parameter(torch.randn(64, 6, generator=source))

    def forward(self, pixels: Tensor) -> Tensor:
        return ((pixels.flatten(1) - 0.5) @ self.first).tanh() @ self.second


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().requires_grad_(False)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    source = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (40, 3, 8, 8), generator=source) / 255


@pytest.fixture(scope="module")
def labels(net: Net, pixels: Tensor) -> Tensor:
    """What the net says, so that it is right on every clean picture."""
    return net(pixels).argmax(dim=1)


def rate(model: Model, pixels: Tensor, labels: Tensor) -> float:
    return float((model(pixels).argmax(dim=1) == labels).float().mean())


def seeds(pixels: Tensor) -> Sequence[int]:
    return range(len(pixels))


@pytest.mark.parametrize("attack", OURS)
def test_results_are_8_bit_pictures_within_the_ball(
    net: Net, pixels: Tensor, labels: Tensor, attack: Any
) -> None:
    attacked = attack(net, pixels, labels, BUDGET, seeds(pixels))
    levels = attacked * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert (attacked - pixels).abs().max() <= EPSILON + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert rate(net, attacked, labels) < 0.8


@pytest.mark.parametrize("attack", OURS)
def test_a_large_epsilon_breaks_everything(
    net: Net, pixels: Tensor, labels: Tensor, attack: Any
) -> None:
    budget = replace(BUDGET, epsilon=0.5, queries=200)
    assert rate(net, attack(net, pixels, labels, budget, seeds(pixels)), labels) == 0


@pytest.mark.parametrize("attack", OURS)
def test_a_result_does_not_depend_on_its_company(
    net: Net, pixels: Tensor, labels: Tensor, attack: Any
) -> None:
    together = attack(net, pixels[:4], labels[:4], BUDGET, [0, 1, 2, 3])
    alone = attack(net, pixels[2:3], labels[2:3], BUDGET, [2])
    torch.testing.assert_close(together[2:3], alone)


@pytest.mark.parametrize("attack", [pgd, square])
def test_more_runs_never_help_the_defender(
    net: Net, pixels: Tensor, labels: Tensor, attack: Any
) -> None:
    def score(budget: Budget) -> Tensor:
        attacked = attack(net, pixels, labels, budget, seeds(pixels))
        return loss_only(net, attacked, labels, cross_entropy, 1).score

    scores = [score(replace(BUDGET, restarts=runs)) for runs in (1, 2, 4)]
    assert (scores[1] >= scores[0]).all()
    assert (scores[2] >= scores[1]).all()


def test_more_steps_never_help_the_defender(net: Net, pixels: Tensor, labels: Tensor) -> None:
    start = draw_start(pixels, EPSILON, seeds(pixels), 0)
    rates, scores = [], []
    for steps in (1, 5, 25, 100):
        budget = replace(BUDGET, steps=steps)
        found, _ = climb(net, pixels, labels, cross_entropy, budget, start)
        scores.append(loss_only(net, found, labels, cross_entropy, 1).loss.mean().item())
        rates.append(rate(net, apgd(net, pixels, labels, budget, seeds(pixels)), labels))
    assert scores == sorted(scores)
    assert rates == sorted(rates, reverse=True)
    assert scores[-1] > 1.02 * scores[0]


def test_apgd_looks_at_its_step_size_when_the_paper_does() -> None:
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_the_targeted_loss_ignores_scale_and_shift() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5, -1.0, -2.0]])
    loss, label = aim(torch.tensor([2])), torch.tensor([0])
    torch.testing.assert_close(loss(logits, label), torch.tensor([(0.5 - 3) / (3 + 0.25)]))
    torch.testing.assert_close(loss(logits, label), loss(7 * logits + 5, label))
    assert aim(torch.tensor([1]))(logits[:, :2], label).isfinite().all()  # two classes are enough


def test_draws_average_gradients_of_a_random_model(net: Net, pixels: Tensor) -> None:
    labels, source = torch.zeros(len(pixels), dtype=torch.long), torch.Generator().manual_seed(3)

    def noisy(x: Tensor) -> Tensor:
        return net(x + 0.2 * torch.randn(x.shape, generator=source))

    def spread(draws: int) -> float:
        runs = [loss_and_gradient(noisy, pixels, labels, margin, draws).gradient for _ in range(6)]
        return torch.stack(runs).var(dim=0).mean().item()

    assert spread(16) < 0.2 * spread(1)


class Noisy:
    """The net on the mean of four noisy copies; draws can be fixed or not."""

    def __init__(self, net: Net, holds: bool) -> None:
        self.net, self.source = net, torch.Generator().manual_seed(2)
        if holds:
            self.fix_draws = lambda draws: self.with_noise(self.draw(draws, 40))

    def draw(self, draws: int, images: int) -> Tensor:
        return torch.randn(4 * draws, images, 3, 8, 8, generator=self.source) / 100

    def with_noise(self, noise: Tensor) -> Model:
        return lambda pixels: torch.stack([self.net(pixels + each) for each in noise]).mean(0)

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.with_noise(self.draw(1, len(pixels)))(pixels)


def test_a_search_by_scores_compares_them_under_the_same_draws(
    net: Net, pixels: Tensor, labels: Tensor
) -> None:
    """Else one lucky draw stands for good, and a random defense looks strong."""
    left = {}
    for holds in (True, False):
        attacked = square(
            Noisy(net, holds), pixels, labels, replace(BUDGET, queries=200), seeds(pixels)
        )
        left[holds] = rate(net, attacked, labels)
    assert left[True] < left[False] - 0.1


def test_the_targeted_loss_pulls_between_two_classes() -> None:
    logits = torch.tensor([[2.0, -1.0]], requires_grad=True)
    loss = aim(torch.tensor([1]))(logits, torch.tensor([0]))
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-1.0, 1.0]]


def test_a_backward_approximation_sees_through_a_mask(
    net: Net, pixels: Tensor, labels: Tensor
) -> None:
    def masked(x: Tensor) -> Tensor:
        return net((x * 15).round() / 15)

    def seen_through(x: Tensor) -> Tensor:
        return net(approximate((x * 15).round() / 15, x))

    budget = replace(BUDGET, epsilon=12 / 255)
    torch.testing.assert_close(masked(pixels), seen_through(pixels))
    blind = rate(masked, pgd(masked, pixels, labels, budget, seeds(pixels)), labels)
    seeing = rate(masked, pgd(seen_through, pixels, labels, budget, seeds(pixels)), labels)
    assert seeing < 0.5 * blind


def test_the_preflight_finds_a_masked_gradient(net: Net, pixels: Tensor, labels: Tensor) -> None:
    def rounded(x: Tensor) -> Tensor:
        return net((x * 15).round() / 15)

    def saturated(x: Tensor) -> Tensor:
        return 1e5 * net(x)  # the cross-entropy of a sure model has no gradient in float32

    few, names, budget = pixels[:12], labels[:12], replace(BUDGET, epsilon=12 / 255)
    assert preflight(net, few, names, budget, seeds(few)) == []
    for masked in (rounded, saturated):
        names = masked(few).argmax(dim=1)
        found = " ".join(preflight(masked, few, names, budget, seeds(few)))
        assert "right where PGD leaves" in found
        assert "gradient is zero on 12 of 12" in found


def test_the_preflight_names_a_random_model(net: Net, pixels: Tensor, labels: Tensor) -> None:
    found = preflight(
        lambda x: net(x + 0.01 * torch.randn_like(x)), pixels[:4], labels[:4], BUDGET, range(4)
    )
    assert "--eot" in found[0]


def test_an_epsilon_below_one_level_is_refused(pixels: Tensor) -> None:
    most = quantize(pixels + 1, pixels, 1.9 / 255)
    torch.testing.assert_close(most, (pixels + 1 / 255).clamp(max=1))
    with pytest.raises(ValueError, match="below 1/255"):
        quantize(pixels, pixels, 0.5 / 255)


def test_autoattack_says_what_to_install(
    net: Net, pixels: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyautoattack", None)
    with pytest.raises(MissingExtra, match=r"pip install .*-e .\.\[attack\]"):
        autoattack(net, pixels, labels, BUDGET, seeds(pixels))


def test_ours_are_no_weaker_than_pyautoattack(net: Net, pixels: Tensor, labels: Tensor) -> None:
    package = pytest.importorskip("pyautoattack", reason="NOT CHECKED: install the extra `attack`")
    budget, reference = Budget(2 / 255, steps=50, restarts=2, targets=5, queries=200), {}
    for name in ("apgd-ce", "apgd-t", "square"):
        runner = package.AutoAttack(
            net, attacks=[name], eps=budget.epsilon, seed=0, version="custom"
        )
        runner.verbose = False
        runner.apgd.n_iter = runner.apgd_targeted.n_iter = budget.steps
        runner.apgd_targeted.n_target_classes = budget.targets
        runner.square.n_queries = budget.queries
        found, _ = runner.run_standard_evaluation(pixels, labels, batch_size=40)
        reference[name] = rate(net, quantize(found, pixels, budget.epsilon), labels)
    rates = {a: rate(net, a(net, pixels, labels, budget, seeds(pixels)), labels) for a in OURS}
    slack = 1 / len(pixels) + 1e-6  # one picture
    assert 0.1 < reference["apgd-t"] < 0.9  # neither hopeless nor trivial
    assert rates[pgd] <= reference["apgd-ce"] + slack
    assert rates[apgd] <= min(reference["apgd-ce"], reference["apgd-t"])
    assert rates[square] <= reference["square"] + slack


def test_autoattack_attacks_what_its_model_gets_wrong_anyway(net: Net, pixels: Tensor) -> None:
    pytest.importorskip("pyautoattack", reason="NOT CHECKED: install the extra `attack`")
    labels = net(pixels[:2]).argmax(dim=1)
    labels[1] = (labels[1] + 1) % 6
    permuted = pixels[:2].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as from an image
    attacked = autoattack(net, permuted, labels, replace(BUDGET, queries=5), [0, 1])
    assert not torch.equal(attacked[1], pixels[1])
    assert (attacked - pixels[:2]).abs().max() <= EPSILON + 1e-6
