"""The attacks of the recipe `strong` see through masks, and luck does not decide what they keep."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.attacks import ATTACKS
from models.attacks.apgd import climb
from models.attacks.attack import RESCORED, Budget, Model, draw_start, margin, strongest
from models.attacks.pgd import pgd
from models.attacks.rays import search
from models.attacks.stealthy import stealthy
from models.attacks.strong import COST, RECIPE, STEPS, STRONG, ways_of

EPSILON = 8 / 255
BUDGET = Budget(EPSILON, steps=12, queries=300)


class Net:
    """A small random classifier of 8x8 images into six classes."""

    def __init__(self) -> None:
        source = torch.Generator().manual_seed(0)
        self.first = torch.randn(192, 64, generator=source) / 4
        self.second = torch.randn(64, 6, generator=source)

    def __call__(self, pixels: Tensor) -> Tensor:
        return ((pixels.flatten(1) - 0.5) @ self.first).tanh() @ self.second


NET = Net()


class Masked:
    """A mean over views, here two noisy copies, whose prediction is made flat on purpose."""

    def __init__(
        self, mask: Callable[[Tensor], Tensor], of_logits: bool = False, images: int = 24
    ) -> None:
        self.mask, self.of_logits, self.images = mask, of_logits, images
        self.source = torch.Generator().manual_seed(1)

    def fix_draws(self, draws: int) -> Model:
        noise = torch.randn(2, self.images, 3, 8, 8, generator=self.source) / 500

        def fixed(pixels: Tensor) -> Tensor:
            logits = torch.stack([NET(pixels + each) for each in noise])
            if self.of_logits:
                return logits.mean(dim=0)
            return self.mask(logits.softmax(dim=-1).mean(dim=0))

        return fixed

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.fix_draws(1)(pixels)

    def averaging_logits(self) -> Model:
        return Masked(self.mask, of_logits=True)

    def weaker(self, threat: str) -> Model:
        return NET


def quantized(prediction: Tensor) -> Tensor:
    """Log probabilities in steps of 0.05: no gradient at all."""
    return ((prediction * 20).round() / 20 + 1e-3).log()


def saturated(prediction: Tensor) -> Tensor:
    """Log probabilities of a model that is always sure: no gradient in fp32."""
    return (prediction * 1e4).softmax(dim=1).log().clamp(min=-30)


def rounded(pixels: Tensor) -> Tensor:
    """The net on images of 32 levels: no gradient, and no other way in than queries."""
    return NET((pixels * 31).round() / 31)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    source = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (24, 3, 8, 8), generator=source) / 255


def left(model: Model, pixels: Tensor, labels: Tensor) -> float:
    """The share of images that stay right."""
    return float((model(pixels).argmax(dim=1) == labels).float().mean())


@pytest.mark.parametrize("mask", [quantized, saturated])
@pytest.mark.parametrize("name", STRONG)
def test_each_attack_sees_through_a_flat_prediction(
    pixels: Tensor, name: str, mask: Callable[[Tensor], Tensor]
) -> None:
    labels, seeds = NET(pixels).argmax(dim=1), range(len(pixels))
    blind = pgd(Masked(mask), pixels, labels, BUDGET, seeds)
    seeing = ATTACKS[name](Masked(mask), pixels, labels, BUDGET, seeds)
    assert left(Masked(mask), blind, labels) > 0.85
    # The feature attack aims at no label, so it is the weakest of them.
    assert left(Masked(mask), seeing, labels) < (0.7 if name == "feature" else 0.35)


@pytest.mark.parametrize("name", ["square", "rays"])
def test_queries_see_through_rounded_images(pixels: Tensor, name: str) -> None:
    labels, seeds = rounded(pixels).argmax(dim=1), range(len(pixels))
    blind = pgd(rounded, pixels, labels, BUDGET, seeds)
    seeing = ATTACKS[name](rounded, pixels, labels, BUDGET, seeds)
    assert left(rounded, blind, labels) > left(rounded, seeing, labels) + 0.2


@pytest.mark.parametrize("name", RECIPE)
def test_results_are_8_bit_images_within_the_ball(pixels: Tensor, name: str) -> None:
    labels = NET(pixels).argmax(dim=1)
    attacked = ATTACKS[name](NET, pixels, labels, BUDGET, range(len(pixels)))
    levels = attacked * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert (attacked - pixels).abs().max() <= EPSILON + 1e-6
    assert 0 <= attacked.min() <= attacked.max() <= 1
    assert left(NET, attacked, labels) < 0.7


@pytest.mark.parametrize("name", RECIPE)
def test_a_large_epsilon_leaves_nothing(pixels: Tensor, name: str) -> None:
    labels, budget = NET(pixels).argmax(dim=1), replace(BUDGET, epsilon=0.5)
    attacked = ATTACKS[name](NET, pixels, labels, budget, range(len(pixels)))
    assert left(NET, attacked, labels) <= (0.1 if name == "feature" else 0)  # it knows no labels


@pytest.mark.parametrize("name", RECIPE)
def test_a_result_does_not_depend_on_its_company(pixels: Tensor, name: str) -> None:
    labels = NET(pixels).argmax(dim=1)
    together = ATTACKS[name](NET, pixels[:4], labels[:4], BUDGET, [0, 1, 2, 3])
    alone = ATTACKS[name](NET, pixels[2:3], labels[2:3], BUDGET, [2])
    torch.testing.assert_close(together[2:3], alone)


class Lucky:
    """Wrong (class 1) more often the brighter an image is, by the luck of a draw."""

    def __init__(self, images: int) -> None:
        self.source, self.images = torch.Generator().manual_seed(0), images

    def fix_draws(self, draws: int) -> Model:
        luck = torch.rand(self.images, generator=self.source)

        def fixed(pixels: Tensor) -> Tensor:
            lead = pixels.mean(dim=(1, 2, 3)) - luck
            return torch.stack([-lead, lead], dim=1)

        return fixed

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.fix_draws(1)(pixels)


def test_results_are_compared_on_many_draws() -> None:
    """Single draws, one for each candidate, would prefer the weaker one to a third of the time."""
    pixels, labels = torch.full((100, 3, 4, 4), 0.5), torch.zeros(100, dtype=torch.long)
    weak, strong = (pixels + shift for shift in (-0.3, 0.3))
    for candidates in ([weak, strong], [strong, weak]):
        found = strongest(Lucky(100), pixels, labels, Budget(1.0), candidates)
        assert (found.mean(dim=(1, 2, 3)) > 0.5).all()


class Fixed:
    """The net as a defense without random draws, which counts the images that it is asked about."""

    asked = 0

    def fix_draws(self, draws: int) -> Model:
        return self

    def __call__(self, pixels: Tensor) -> Tensor:
        self.asked += len(pixels)
        return NET(pixels)


def test_a_model_without_draws_is_scored_once_for_each_candidate(pixels: Tensor) -> None:
    labels, model = NET(pixels).argmax(dim=1), Fixed()
    candidates = [(pixels + shift).clamp(0, 1) for shift in (EPSILON, -EPSILON)]
    found = strongest(model, pixels, labels, BUDGET, candidates)
    assert model.asked == 2 * len(pixels)
    assert torch.equal(found, strongest(NET, pixels, labels, BUDGET, candidates))


def test_an_attack_without_a_run_is_refused(pixels: Tensor) -> None:
    """Its result would be the clean images."""
    labels, budget = NET(pixels).argmax(dim=1), replace(BUDGET, restarts=0)
    for name in ("pgd", "apgd", "square", "logits-margin"):
        with pytest.raises(ValueError, match="no restarts"):
            ATTACKS[name](NET, pixels, labels, budget, range(len(pixels)))


class Shifted:
    """The net with noise on the true class's logit: it changes each loss but no gradient."""

    def __init__(self, labels: Tensor) -> None:
        self.source, self.labels = torch.Generator().manual_seed(0), labels

    def fix_draws(self, draws: int) -> Model:
        noise = torch.randn(len(self.labels), generator=self.source)
        true = torch.nn.functional.one_hot(self.labels, 6)
        return lambda pixels: NET(pixels) + noise.unsqueeze(1) * true

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.fix_draws(1)(pixels)


def test_apgd_decides_on_held_draws(pixels: Tensor) -> None:
    """Noise that is the same in all losses of a run changes no decision about the step size."""
    labels, budget = NET(pixels).argmax(dim=1), replace(BUDGET, steps=30)
    start = draw_start(pixels, EPSILON, range(len(pixels)), 0)
    calm = climb(NET, pixels, labels, margin, budget, start)
    noisy = climb(Shifted(labels), pixels, labels, margin, budget, start)
    shifted = Shifted(labels)
    unheld = climb(lambda x: shifted(x), pixels, labels, margin, budget, start)

    def gap(found: tuple[Tensor, Tensor]) -> float:
        return max(
            (one - other).abs().mean().item() for one, other in zip(found, calm, strict=True)
        )

    assert gap(noisy) < 1e-5  # rounding
    assert gap(unheld) > 1e-4


class Watched:
    """The net with a detector of half of the pixels: it suspects a move of their mean."""

    def __init__(self, clean: Tensor) -> None:
        self.clean = clean

    def observe(self, pixels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        moved = (pixels - self.clean)[:, :, :4].mean(dim=(1, 2, 3)).abs()
        return NET(pixels), (moved * 255 / 8).clamp(max=1)

    def draw_seeds(self) -> list[int]:
        return [0] * len(self.clean)

    def __call__(self, pixels: Tensor) -> Tensor:
        return NET(pixels)


def test_a_stealthy_attack_is_wrong_and_not_suspected(pixels: Tensor) -> None:
    model, labels, seeds = Watched(pixels + 8 / 255), NET(pixels).argmax(dim=1), range(len(pixels))
    loud = ATTACKS["logits-margin"](model, pixels, labels, BUDGET, seeds)
    quiet = stealthy(model, pixels, labels, BUDGET, seeds)
    assert left(NET, quiet, labels) <= left(NET, loud, labels) + 0.1
    (_, shown), (_, hidden) = (model.observe(found, []) for found in (loud, quiet))
    assert hidden.mean() < 0.8 * shown.mean()


def test_a_stealthy_attack_averages_its_gradients(pixels: Tensor) -> None:
    """Over the budget's draws of the views, as every other attack."""

    class Counted(Watched):
        drawn = 0

        def draw_seeds(self) -> list[int]:
            self.drawn += 1
            return super().draw_seeds()

    def drawn(draws: int) -> int:
        model, budget = Counted(pixels), replace(BUDGET, steps=3, draws=draws)
        stealthy(model, pixels, NET(pixels).argmax(dim=1), budget, range(len(pixels)))
        return model.drawn

    assert drawn(4) - drawn(1) == 3 * 3


def test_rays_finds_the_nearest_boundary() -> None:
    """Of a linear model, whose nearest boundary in the L-infinity norm is known."""
    weights = torch.tensor([1.0, -2.0, 3.0, -4.0]).repeat(12).view(1, 3, 4, 4)
    pixels, label = torch.full((1, 3, 4, 4), 0.5), torch.tensor(0)

    def linear(x: Tensor) -> Tensor:
        lead = ((x - 0.5) * weights).sum(dim=(1, 2, 3)) - 6.0
        return torch.stack([-lead, lead], dim=1)

    direction, radius = search(linear, pixels, label, Budget(1.0, queries=600))
    assert (direction == weights.sign()).float().mean() > 0.95
    assert radius == pytest.approx(6 / weights.abs().sum().item(), abs=0.01)


def test_rays_looks_for_a_boundary_again_only_where_it_moved() -> None:
    """Only the first bisection queries the radii 1 and 0.5, which make a gray image black or white.
    Others start from the nearest boundary so far."""
    extreme = 0

    def linear(x: Tensor) -> Tensor:
        nonlocal extreme
        extreme += bool(((x == 0) | (x == 1)).all())
        lead = (x - 0.5).sum(dim=(1, 2, 3)) - 6.0
        return torch.stack([-lead, lead], dim=1)

    pixels, label = torch.full((1, 3, 4, 4), 0.5), torch.tensor(0)
    _, radius = search(linear, pixels, label, Budget(1.0, queries=300))
    assert radius == pytest.approx(6 / 48, abs=0.01)
    assert extreme == 2


def test_the_recipe_costs_what_is_told(pixels: Tensor) -> None:
    passes = {True: 0, False: 0}  # with a backward pass, without

    class Counted(Masked):
        def fix_draws(self, draws: int) -> Model:
            fixed = super().fix_draws(1)

            def counted(pixels: Tensor) -> Tensor:
                passes[pixels.requires_grad] += draws
                return fixed(pixels)

            return counted

        def averaging_logits(self) -> Model:
            return Counted(self.mask, of_logits=True, images=1)

        def weaker(self, threat: str) -> Model:
            return self.averaging_logits() if threat == "stepless" else NET

    labels, budget = NET(pixels[:1]).argmax(dim=1), Budget(EPSILON, steps=STEPS)
    for part in STRONG.values():
        part.attack(Counted(lambda p: p.log(), images=1), pixels[:1], labels, budget, [0])
    lacking = 9 - 5  # the recipe aims at nine classes, of which the net has five others
    told = [passes[True] + lacking * STEPS // 4, passes[False] + lacking * RESCORED]
    assert [int(word) for word in COST.split() if word.isdigit()] == told
    page = Path(__file__).parents[3] / "docs" / "robustness.md"
    assert COST in " ".join(page.read_text().split())


def test_each_attack_takes_its_way_through_the_adaptation() -> None:
    ways: Sequence[str] = ["bpda", "unrolled", "stepless"]
    assert ways_of("pgd", ways) == ["bpda", "unrolled"]
    assert ways_of("logits-margin", ways) == ["bpda"]
    assert {way for name in STRONG for way in ways_of(name, ways)} == set(ways)
    assert ways_of("logits-margin", ["direct"]) == ["direct"]
