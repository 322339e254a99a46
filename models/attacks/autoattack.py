"""AutoAttack (Croce and Hein, ICML 2020) from the package `pyautoattack`, the extra `attack`.

It runs APGD on the cross-entropy, targeted APGD, targeted FAB and Square, each on the images that
withstood the ones before. The published strength takes 100 steps and 5,000 queries. A random model
gets the `rand` variant, APGD on two losses, with the budget's draws (20 as published).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.attacks.apgd import climb
from models.attacks.attack import Budget, Model, cross_entropy, draw_start, quantize, select
from models.errors import install_extra

TARGETS = 9


class MissingExtra(ImportError):
    """An optional package is not installed; the message says how to install it."""


def require() -> Any:
    """The package. Raises MissingExtra."""
    try:
        import pyautoattack
    except ImportError as error:
        raise MissingExtra(
            f"autoattack needs the package pyautoattack: {install_extra('attack')}"
        ) from error
    return pyautoattack


def autoattack(
    model: Model, pixels: Tensor, labels: Tensor, budget: Budget, seeds: Sequence[int]
) -> Tensor:
    """Attack one image at a time, because the package's seeds are global; see `Attack`.

    Where the package returns the clean image, the result of one run of APGD on the cross-entropy is
    taken instead. That is so if AutoAttack fails, and if the model is wrong without an attack: the
    package skips such images, but another model may get them right.

    Raises:
        MissingExtra: pyautoattack is not installed.
    """
    package = require()
    pixels, attacked = pixels.contiguous(), []  # the package calls `view` on pixels and gradients
    for row, seed in enumerate(seeds):
        one, label = pixels[row : row + 1], labels[row : row + 1]
        own = select(model, [row])
        with torch.random.fork_rng(), torch.enable_grad():
            runner = _prepare(package, own, one, budget, seed)
            found, _ = runner.run_standard_evaluation(one, label, batch_size=1)
        if torch.equal(found, one):
            start = draw_start(one, budget.epsilon, [seed], 0)
            found, _ = climb(own, one, label, cross_entropy, budget, start)
        attacked.append(quantize(found, one, budget.epsilon))
    return torch.cat(attacked)


def _prepare(package: Any, model: Model, pixels: Tensor, budget: Budget, seed: int) -> Any:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x)

    with torch.no_grad():
        first, second = model(pixels), model(pixels)
    runner = package.AutoAttack(
        Module(),
        eps=budget.epsilon,
        seed=seed % 2**32,
        device=pixels.device,
        version="standard" if torch.equal(first, second) else "rand",
    )
    runner.verbose = False
    runner.apgd.n_iter = runner.apgd_targeted.n_iter = runner.fab.n_iter = budget.steps
    runner.apgd.eot_iter = runner.apgd_targeted.eot_iter = budget.draws
    runner.square.n_queries = budget.queries
    runner.apgd_targeted.n_target_classes = runner.fab.n_target_classes = min(
        TARGETS, first.shape[1] - 1
    )
    return runner
