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


def count_tokens(task: Task, model: Ready, default: str | tuple[str, ...]) -> int:
    """Estimate the tokens that a task takes in a batch: of all views and all labels
    in all templates."""
    return _count_image_tokens(task, model) + sum(_count_text_tokens(task, model, default))


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
    image = _count_image_tokens(task, model)
    text = _count_text_tokens(task, model, settings.hypothesis_template)
    first = image + (0 if encoded else sum(text))
    if task.steps:
        kept = max(1, int(task.views * settings.selection_ratio))
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


def _count_image_tokens(task: Task, model: Ready) -> int:
    return task.views * DEFENSES[task.method].images * model.image_tokens


def _text_adapts(task: Task, model: Ready, settings: Settings) -> bool:
    """Whether a step passes through the text encoder. Template words are text prompts."""
    spec = DEFENSES[task.method]
    only_text = spec.prompts == "words" or model.info.get("design") == "text"
    return spec.adapts_prompts and (settings.adapts != "vision" or only_text)
