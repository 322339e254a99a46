"""What a request costs, relative to a typical one."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from models.images.decode import DecodedImage
from service.defaults import make_typical_task
from service.engine.price import count_tokens, price, price_class
from service.intake.options import resolve_options
from service.intake.requests import ClassifyOptions
from service.messages import DemoAttack, Ready
from service.settings import Settings, Tier

MODEL = Ready(info={"design": "vli"}, max_batch_tokens=10_000, image_tokens=50, context_length=77)
SETTINGS = Settings()
TYPICAL = make_typical_task(SETTINGS)


def cost(model: Ready = MODEL, knobs: dict[str, Any] | None = None, **changes: Any) -> float:
    return price(replace(TYPICAL, **changes), model, Settings(**(knobs or {})))


def test_a_typical_request_costs_one_whatever_the_defaults() -> None:
    assert cost() == 1
    assert cost(knobs={"steps": 4, "views": 64}, steps=4, views=64) == 1
    assert cost(knobs={"method": "plain"}, method="plain", steps=0, views=1) == 1


@pytest.mark.parametrize("tier", ["fast", "standard", "deep"])
@pytest.mark.parametrize("method", ["tapt", "mac", "plain"])
def test_a_request_without_options_costs_one_whatever_the_tier(tier: Tier, method: str) -> None:
    settings = Settings(tier=tier, method=method, steps=2)
    labels = list(make_typical_task(settings).labels)
    image = DecodedImage(np.zeros((1, 1, 3), np.uint8))
    options = ClassifyOptions(candidate_labels=labels)
    task = resolve_options("x", image, options, settings, seed=0, since=0.0)
    assert price(task, MODEL, settings) == 1


@pytest.mark.parametrize(
    "more",
    [{"views": 32}, {"steps": 2}, {"labels": ("a",) * 100}, {"labels": ("a" * 90,) * 10}],
    ids=["views", "steps", "labels", "longer labels"],
)
def test_more_of_anything_costs_more(more: dict[str, Any]) -> None:
    assert cost(**more) > 1


def test_the_heaviest_request_costs_as_many_times_more_as_it_takes() -> None:
    """64 views of 50 tokens and 1,000 labels of 77: 80,200 at first, 3 * 6 * 50 in each of 8 steps,
    3,200 to read; a typical one 800 + 10 * 13 at first, 3 * 1 * 50 in its step, 800 to read."""
    heavy = cost(labels=("x" * 256,) * 1000, views=64, steps=8)
    assert heavy == pytest.approx((80_200 + 8 * 900 + 3200) / (930 + 150 + 800), rel=0.01)
    assert cost(method="plain", views=1, steps=0, labels=("a", "b")) < 0.1


def test_labels_count_in_each_step_only_if_the_text_adapts() -> None:
    many: dict[str, Any] = {"labels": ("a",) * 1000}
    frozen = cost(**many)
    assert cost(**many, knobs={"adapts": "all"}) > 1.5 * frozen / cost(knobs={"adapts": "all"})
    assert cost(**many, method="tpt") > 2 * frozen
    without_bundle = replace(MODEL, info={"design": "text"})
    assert cost(**many, steps=8) < cost(without_bundle, **many, steps=8)


def test_the_readout_counts_the_views_it_looks_at() -> None:
    assert cost(readout="single") < cost(readout="kept", views=32) < cost(readout="all", views=32)


def test_a_defense_pays_for_the_views_that_it_makes_itself() -> None:
    """Two images and ten labels at first, two images in each of four steps and two to read."""
    own = cost(method="mac", views=1, steps=4, readout="all")
    assert own == pytest.approx((100 + 130 + 4 * 3 * 100 + 100) / (930 + 150 + 800), rel=0.01)
    task = replace(TYPICAL, views=1, steps=0)
    alone, more = (
        count_tokens(replace(task, method=name), MODEL, SETTINGS) for name in ("ttc", "mac")
    )
    assert more == alone + MODEL.image_tokens


def test_an_attack_costs_its_steps_and_an_adaptive_one_more() -> None:
    transfer, adaptive = (
        cost(attack=DemoAttack(epsilon=4, steps=10, target=None, adaptive=adaptive))
        for adaptive in (False, True)
    )
    assert 10 < transfer < adaptive


def test_classes_are_powers_of_eight() -> None:
    assert [price_class(p) for p in (0.01, 1, 7.9, 8.1, 63.9, 64.1)] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(("cat", "dog"), 4 * 50 + 2 * 5), (("cat", "x" * 1000), 4 * 50 + 2 * 77)],
)
def test_tokens_count_every_view_and_the_longest_label_up_to_the_context(
    labels: tuple[str, ...], expected: int
) -> None:
    task = replace(TYPICAL, labels=labels, template="a {}", views=4, steps=0)
    assert count_tokens(task, MODEL, SETTINGS) == expected


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({"views": 16}, 16),
        ({"views": 4}, 10),
        ({"views": 4, "steps": 0}, 4),
        ({"views": 1, "method": "ttc"}, 10),
        ({"views": 1, "method": "mac"}, 20),
    ],
)
def test_a_step_on_few_views_counts_as_on_those_of_which_one_is_the_kept_share(
    changes: dict[str, Any], counted: int
) -> None:
    """A tenth is kept by default, and at least one view."""
    task = replace(TYPICAL, labels=("cat", "dog"), template="a {}", **changes)
    assert count_tokens(task, MODEL, SETTINGS) == counted * 50 + 2 * 5


def test_each_template_counts_its_own_texts() -> None:
    labels = ("cat", "dog")
    one, two = (
        replace(TYPICAL, labels=labels, template=template, views=4, steps=0)
        for template in ("a {}", ("a {}", "a photo of a {}"))
    )
    other = replace(one, template="a photo of a {}")
    image = 4 * MODEL.image_tokens
    texts = [count_tokens(task, MODEL, SETTINGS) - image for task in (one, other, two)]
    assert texts[0] < texts[1]
    assert texts[2] == texts[0] + texts[1]


def test_the_default_templates_count_where_the_request_names_none() -> None:
    several = ("a photo of a {}.", "a drawing of the {}")
    knobs = {"hypothesis_template": several}
    assert cost(knobs=knobs) == 1
    assert cost(knobs=knobs, template="a photo of a {}.") < 1
    assert cost(template=several) > 1
    image = TYPICAL.views * MODEL.image_tokens
    text, *alone = (
        count_tokens(TYPICAL, MODEL, Settings(hypothesis_template=template)) - image
        for template in (several, *several)
    )
    assert text == sum(alone)


def test_a_step_adapts_one_template() -> None:
    """Where the text adapts and the bundle's own text is read, the others are encoded once."""
    adapts, several = {"adapts": "all"}, ("a {}.", "a {}.")
    named: dict[str, Any] = {"template": "a {}.", "method": "plain", "views": 1, "steps": 0}
    steps = []
    for template in ("a {}.", several):
        knobs = {**adapts, "hypothesis_template": template}
        work = cost(knobs=knobs, steps=8) - cost(knobs=knobs, steps=4)
        steps.append(work / cost(knobs=knobs, **named))  # in units that both settings share
    assert steps[0] == pytest.approx(steps[1])
