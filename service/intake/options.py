"""A client's options, within the server's limits and completed with its defaults."""

import math

from models.images.decode import DecodedImage
from service.defaults import resolve_defense
from service.errors import Unprocessable
from service.intake.requests import ClassifyOptions, DefenseOptions
from service.messages import Task
from service.settings import Settings


def check_options(options: ClassifyOptions, settings: Settings) -> None:
    """Raises Unprocessable for options that this server refuses."""
    if options.defense and options.defense.seed is not None and not settings.allow_client_seed:
        raise Unprocessable("This server accepts no seed from its clients.")
    labels = len(options.candidate_labels)
    templates = len(options.hypothesis_template or settings.templates)
    if labels * templates > settings.max_labels:
        whose = "" if options.hypothesis_template else " of the server's default"
        raise Unprocessable(
            f"{labels} labels in {templates} templates{whose} are {labels * templates} texts; the "
            f"limit is {settings.max_labels}."
        )


def _template(templates: list[str] | None) -> str | tuple[str, ...] | None:
    if not templates:
        return None
    return templates[0] if len(templates) == 1 else tuple(templates)


def resolve_options(
    id: str,
    image: DecodedImage,
    options: ClassifyOptions,
    settings: Settings,
    *,
    seed: int,
    since: float,
) -> Task:
    """Make the task for an image.

    The server's defaults fill in what the client left out; values above the server's limits are
    lowered to them. `seed` draws the views unless the client names a seed. The deadline counts from
    the instant `since`.
    """
    wanted = options.defense or DefenseOptions()
    defense = resolve_defense(
        settings,
        tier=wanted.tier,
        method=wanted.method,
        steps=wanted.steps,
        views=wanted.views,
        readout=wanted.readout,
    )
    own = wanted.deadline_ms or math.inf
    timeout = min(own, settings.request_timeout_ms)
    return Task(
        id=id,
        image=image.pixels,
        view=image.view,
        labels=tuple(options.candidate_labels),
        template=_template(options.hypothesis_template),  # None: the worker knows the model's own
        method=defense.method,
        steps=defense.steps,
        views=defense.views,
        readout=defense.readout,
        seed=seed if wanted.seed is None else wanted.seed,
        deadline=since + timeout / 1000,
        own_deadline=own < settings.request_timeout_ms,
        tier=defense.tier,
    )
