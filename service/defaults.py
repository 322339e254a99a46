"""How a request is defended where it leaves options out: by the server's defaults and its tier."""

import math
from dataclasses import dataclass

import numpy as np

from models.defenses.catalog import DEFENSES
from service.messages import Task
from service.settings import TIERS, Settings, Tier

TIER_FACTORS = {"fast": (0.5, 1), "standard": (1, 1), "deep": (4, 2)}
"""What a tier multiplies the default views and steps by."""

TYPICAL_LABELS = 10


@dataclass(frozen=True, slots=True)
class Defense:
    """The resolved options of a defense, as in `Task`."""

    tier: Tier
    method: str
    steps: int
    views: int
    readout: str


def resolve_defense(
    settings: Settings,
    *,
    tier: Tier | None = None,
    method: str | None = None,
    steps: int | None = None,
    views: int | None = None,
    readout: str | None = None,
) -> Defense:
    """Fill in what is None, and lower what is above the server's limits to them."""
    resolved: Tier = min(tier or settings.tier, settings.max_tier, key=TIERS.index)
    usual = settings.method
    if resolved == "fast" and DEFENSES[usual].views != "one":
        usual = "ensemble"
    method = method or usual
    spec = DEFENSES[method]
    views_factor, steps_factor = TIER_FACTORS[resolved]
    if steps is None:
        steps = settings.steps * steps_factor if spec.steps is None else spec.steps
    if views is None:
        views = max(1, int(settings.views * views_factor))
    return Defense(
        tier=resolved,
        method=method,
        steps=min(steps, settings.max_steps) if spec.adapts else 0,
        views=1 if spec.views == "one" else min(views, settings.max_views),
        readout=spec.readout or readout or settings.readout,
    )


def make_typical_task(settings: Settings) -> Task:
    """A request for TYPICAL_LABELS labels that leaves all options to the server; its image is one
    black pixel. Its price is 1, and the workers measure how long it takes."""
    defense = resolve_defense(settings)
    return Task(
        id="typical",
        image=np.zeros((1, 1, 3), np.uint8),
        labels=tuple(f"typical label {number}" for number in range(TYPICAL_LABELS)),
        template=None,
        method=defense.method,
        steps=defense.steps,
        views=defense.views,
        readout=defense.readout,
        seed=0,
        deadline=math.inf,
        tier=defense.tier,
    )
