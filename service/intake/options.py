"""What a client asks for, within what the server allows."""

import math
import secrets

from models.defenses.catalog import DEFENSES
from service.errors import Unprocessable
from service.intake.decode import decode
from service.messages import Task
from service.schemas import SEEDS, Choices, DefenseOptions
from service.settings import TIERS, Settings

SPENDING = {"fast": (0.5, 1), "standard": (1, 1), "deep": (4, 2)}  # times the views, the steps


def resolve_options(
    id: str, file: bytes, choices: Choices, settings: Settings, since: float
) -> Task:
    """A request with its image decoded and every choice made: the server's where the client made
    none, and lowered to the server's limits. `since` is the instant from which its time counts.

    Raises ServiceError: Unprocessable, or what `images.decode` finds.
    """
    labels = tuple(choices.candidate_labels)
    if len(labels) > settings.max_labels:
        raise Unprocessable(f"There are {len(labels)} labels; the limit is {settings.max_labels}.")
    template = choices.hypothesis_template  # none: the model knows its own
    if max(map(len, (template or "", *labels))) > settings.max_label_chars:
        limit = settings.max_label_chars
        raise Unprocessable(f"A label or the template is longer than {limit} characters.")
    wanted = choices.defense or DefenseOptions()
    if wanted.seed is not None and not settings.allow_client_seed:
        raise Unprocessable("This server takes no seed from its clients.")
    tier = min(wanted.tier or settings.tier, settings.max_tier, key=TIERS.index)
    usual = settings.method
    if tier == "fast" and DEFENSES[usual].views != "one":
        usual = "ensemble"
    method = wanted.method or usual
    spec = DEFENSES[method]
    views_by, steps_by = SPENDING[tier]
    default = settings.steps * steps_by if spec.steps is None else spec.steps
    steps = min(default if wanted.steps is None else wanted.steps, settings.max_steps)
    few = max(1, int(settings.views * views_by))
    views = min(few if wanted.views is None else wanted.views, settings.max_views)
    timeout = min(wanted.deadline_ms or math.inf, settings.request_timeout_ms)
    return Task(
        id=id,
        image=decode(file, settings.max_image_pixels),
        labels=labels,
        template=template,
        method=method,
        steps=steps if spec.adapts else 0,
        views=1 if spec.views == "one" else views,
        readout=spec.readout or wanted.readout or settings.readout,
        seed=secrets.randbelow(SEEDS) if wanted.seed is None else wanted.seed,
        deadline=since + timeout / 1000,
        tier=tier,
    )
