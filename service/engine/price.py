"""The price of a task: its expected work relative to that of a typical request.

Work is estimated in tokens that pass through an encoder. Queue, rate limits and fairness count
prices; the measured seconds per unit of price turn them into time.
"""

import math

from models.defenses.catalog import DEFENSES
from service.defaults import make_typical_task
from service.messages import Ready, Task
from service.settings import Settings

STEP_COST = 3  # a forward and a backward pass, in forward passes
CLASS_RATIO = 8


def price(task: Task, model: Ready, settings: Settings, *, encoded: bool = False) -> float:
    """The task's work divided by that of `make_typical_task`.

    `encoded`: a worker has the features of the labels already. An upper estimate: a request that
    stops early takes less.
    """
    work = _count_work(task, model, settings, encoded)
    return work / _count_work(make_typical_task(settings), model, settings, encoded=False)


def price_class(price: float) -> int:
    """0 for prices below 8, 1 below 64, and so on.

    Requests of one batch have one class, so none waits for a companion that costs much more.
    """
    return int(math.log(max(price, 1.0), CLASS_RATIO))


def count_tokens(task: Task, model: Ready, settings: Settings) -> int:
    """Estimate the tokens that a task takes in a batch: of all views, and of all labels in all
    templates.

    The memory of an image token (`models.memory.Footprint`) assumes that a step keeps the
    activations of `selection_ratio` of the views for its backward pass. It keeps those of at least
    one view, so with fewer than 1 / `selection_ratio` views it counts as that many.
    """
    views: float = task.views
    if task.steps:
        views = max(views, _count_kept_views(task, settings) / settings.selection_ratio)
    images = views * DEFENSES[task.method].images
    text = _count_text_tokens(task, model, settings.hypothesis_template)
    return round(images * model.image_tokens) + sum(text)


def _count_text_tokens(task: Task, model: Ready, default: str | tuple[str, ...]) -> list[int]:
    """Estimate the tokens of all labels in each template.

    The API process has no tokenizer. A prompt counts as one token per three UTF-8 bytes, plus four
    for its ends and prompt slots. All prompts are padded to the longest.
    """
    template = task.template or default
    counts = []
    for each in (template,) if isinstance(template, str) else template:
        longest = max(len(each.replace("{}", label).encode()) for label in task.labels)
        counts.append(len(task.labels) * min(model.context_length, 4 + longest // 3))
    return counts


def _count_work(task: Task, model: Ready, settings: Settings, encoded: bool) -> float:
    """Tokens through an encoder: the first look, each step, and the readout after the steps."""
    spec = DEFENSES[task.method]
    image = task.views * spec.images * model.image_tokens
    text = _count_text_tokens(task, model, settings.hypothesis_template)
    first = image + (0 if encoded else sum(text))
    if task.steps:
        kept = _count_kept_views(task, settings)
        read = {"single": 1, "kept": kept}.get(task.readout, task.views)
        moving = max(text) if _text_adapts(task, model, settings) else 0  # one template adapts
        tokens = spec.images * model.image_tokens  # of one view
        step = STEP_COST * (kept * tokens + moving)
        work = first + task.steps * step + read * tokens + moving
    else:
        work = first
    if task.attack is None:
        return work
    # Each stage of an attack is answered, and an adaptive one differentiates through the answer.
    return work * (1 + task.attack.steps * (1 + STEP_COST * (task.attack.adaptive and spec.adapts)))


def _count_kept_views(task: Task, settings: Settings) -> int:
    """Views that a step differentiates through, as in `models.tapt.select_confident`."""
    return max(1, int(task.views * settings.selection_ratio))


def _text_adapts(task: Task, model: Ready, settings: Settings) -> bool:
    """Whether a step passes through the text encoder. Template words are text prompts."""
    spec = DEFENSES[task.method]
    only_text = spec.prompts == "words" or model.info.get("design") == "text"
    return spec.adapts_prompts and (settings.adapts != "vision" or only_text)
