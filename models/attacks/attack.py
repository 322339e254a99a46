"""What attacks share: a signature, a budget, losses, gradients, and choosing the strongest result.

All are untargeted and bounded in the L-infinity norm. A model is any function from pixels
[N, 3, S, S] in [0, 1] to logits [N, C], or to anything with the same softmax, such as log
probabilities. For a random model, a budget's `draws` average the gradient over calls (expectation
over transformation, Athalye et al., ICML 2018). For a model without a useful gradient,
`approximate` substitutes that of another function (BPDA, same paper). Results of a random model are
compared on the same fresh draws, never by the luck of single ones.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 255  # highest value of a channel in an 8-bit image
RESCORED = 16  # fresh draws of a random model that the results of an attack are compared on

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Random(Protocol):
    """A random model whose draws can be fixed."""

    def fix_draws(self, draws: int) -> Model:
        """The mean prediction over `draws` draws per image, drawn once, now; itself where nothing
        is random."""


@runtime_checkable
class Viewed(Protocol):
    """A defense that reads its answer from several views of an image."""

    def averaging_logits(self) -> Model:
        """The same, but its output is the mean of the views' logits. Unlike the mean prediction
        it does not saturate, and it is linear in the views."""

    def weaker(self, threat: str) -> Model:
        """What attackers who know less attack: `transfer` is undefended CLIP, `static` CLIP with
        the prompts, `stepless` the defense without its adaptation. A model without prompts or
        adaptation returns the next weaker one."""


@runtime_checkable
class Suspecting(Protocol):
    """A model that also says how suspicious an image looks."""

    def observe(self, pixels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What a call returns with these seeds, and the suspicion [N] in [0, 1]."""

    def draw_seeds(self) -> list[int]:
        """Fresh seeds, one for each image."""


@runtime_checkable
class PerImage(Protocol):
    """A model that treats each image of its batch differently, as by a seed of its own."""

    def select(self, rows: Sequence[int]) -> Model:
        """The model for some of the images."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What an attacker may spend.

    Attributes:
        epsilon: radius of the ball, of [0, 1] pixels.
        steps: steps of one run of a gradient attack.
        restarts: runs.
        draws: calls of a random model that one gradient or score is averaged over.
        targets: classes that a targeted loss aims at.
        queries: forward passes of a score-based attack.
    """

    epsilon: float
    steps: int = 20
    restarts: int = 1
    draws: int = 1
    targets: int = 3
    queries: int = 500


Attack = Callable[[Model, Tensor, Tensor, Budget, Sequence[int]], Tensor]
"""(model, pixels, labels, budget, seeds) -> attacked pixels [N, 3, S, S].

`pixels` and the result are multiples of 1/255 in [0, 1], at most `epsilon` apart. `labels` [N] are
the true classes. `seeds` draw what is random in the attack, one per image, so that a result does
not depend on the rest of the batch.
"""


@dataclass(frozen=True, slots=True)
class LossAndGradient:
    """What an attack learns about pixels: the loss and whether the model is wrong, [N] each, and
    the loss's gradient [N, 3, S, S]."""

    loss: Tensor
    wrong: Tensor
    gradient: Tensor

    @property
    def score(self) -> Tensor:
        """[N] in fp64, to rank results: any wrong answer is above every right one, and among equals
        the higher loss wins."""
        return self.loss.double().nan_to_num() + self.wrong * 1e6


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[N]"""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """[N]: the best other logit minus the true one, positive where the model is wrong."""
    true = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(true, -torch.inf).amax(dim=1) - logits[true]


def loss_and_gradient(
    model: Model, pixels: Tensor, labels: Tensor, loss: Loss, draws: int
) -> LossAndGradient:
    """Loss and gradient at some pixels, averaged over `draws` calls of the model."""
    leaf = pixels.detach().requires_grad_()
    total, gradient = torch.zeros(len(leaf), device=leaf.device), torch.zeros_like(leaf)
    seen: list[Tensor] = []
    for _ in range(draws):
        logits = model(leaf)
        losses = loss(logits, labels)
        gradient += torch.autograd.grad(losses.sum(), leaf)[0] / draws
        total += losses.detach() / draws
        seen.append(logits.detach().softmax(dim=1))
    return LossAndGradient(total, torch.stack(seen).mean(dim=0).argmax(dim=1) != labels, gradient)


@torch.no_grad()
def loss_only(
    model: Model, pixels: Tensor, labels: Tensor, loss: Loss, draws: int
) -> LossAndGradient:
    """As `loss_and_gradient`, but without computing the gradient, which is zero."""
    logits = [model(pixels) for _ in range(draws)]
    losses = torch.stack([loss(each, labels) for each in logits]).mean(dim=0)
    mean = torch.stack([each.softmax(dim=1) for each in logits]).mean(dim=0)
    return LossAndGradient(losses, mean.argmax(dim=1) != labels, torch.zeros_like(pixels))


def fix_draws(model: Model, draws: int) -> Model:
    """The model with fixed draws if it is random and can fix them, else the same object. A search
    cannot compare scores that were each computed with other draws."""
    return model.fix_draws(draws) if isinstance(model, Random) else model


def select(model: Model, rows: Sequence[int]) -> Model:
    """The model for some of its images."""
    return model.select(rows) if isinstance(model, PerImage) else model


def strongest(
    model: Model, pixels: Tensor, labels: Tensor, budget: Budget, candidates: Iterable[Tensor]
) -> Tensor:
    """Of the candidates, per image, the one that fares worst after rounding to 8 bits.

    A random model scores all of them on the same `RESCORED` fresh draws: first by the share of
    draws that are wrong, then by the mean cross-entropy. Another model scores each once.

    Raises:
        ValueError: there is no candidate.
    """
    fixed, draws = [fix_draws(model, 1)], budget.draws
    if fixed[0] is not model:
        fixed, draws = [*fixed, *(fix_draws(model, 1) for _ in range(RESCORED - 1))], 1

    def judge(asked: Model, attacked: Tensor) -> Tensor:
        return loss_only(asked, attacked, labels, cross_entropy, draws).score

    return worst([partial(judge, each) for each in fixed], pixels, budget, candidates)


def worst(
    judges: Sequence[Callable[[Tensor], Tensor]],
    pixels: Tensor,
    budget: Budget,
    candidates: Iterable[Tensor],
) -> Tensor:
    """Of the candidates, rounded to 8 bits, per image the one with the highest mean score, [N] in
    fp64 from each judge.

    Raises:
        ValueError: there is no candidate, so that the clean image would pass for an attacked one.
    """
    most = torch.full((len(pixels),), -torch.inf, dtype=torch.float64, device=pixels.device)
    best: Tensor | None = None
    for candidate in candidates:
        attacked = quantize(candidate, pixels, budget.epsilon)
        score = torch.stack([judge(attacked) for judge in judges]).mean(dim=0)
        best = attacked if best is None else pick(score > most, attacked, best)
        most = torch.maximum(score, most)
    if best is None:
        raise ValueError("an attack needs a run: its budget has no restarts")
    return best


def quantize(attacked: Tensor, pixels: Tensor, epsilon: float) -> Tensor:
    """Round attacked pixels to multiples of 1/255 within the ball around 8-bit `pixels`: an
    `epsilon` between two levels holds what the lower one holds.

    Raises:
        ValueError: the ball holds no other 8-bit image.
    """
    reach = int(epsilon * LEVELS + 1e-4)
    if reach < 1:
        raise ValueError(f"an epsilon of {epsilon:g} is below 1/255, one level of an image")
    origin = (pixels * LEVELS).round()
    moved = (attacked * LEVELS).round() - origin
    return (origin + moved.clamp(-reach, reach)).clamp(0, LEVELS) / LEVELS


def draw_start(pixels: Tensor, epsilon: float, seeds: Sequence[int], run: int) -> Tensor:
    """Uniform in the ball around pixels; an image's noise depends on its seed and the run."""
    noise = []
    for seed in seeds:
        source = torch.Generator().manual_seed((seed * 1_000_003 + run) % 2**63)
        noise.append(torch.rand(pixels.shape[1:], generator=source))
    return start_at(pixels, epsilon, torch.stack(noise))


def start_at(pixels: Tensor, epsilon: float, noise: Tensor) -> Tensor:
    """Points at most `epsilon` from `pixels`, cut to [0, 1]: `noise` of the same shape in [0, 1),
    scaled to the ball; 0.5 is the pixels themselves."""
    return (pixels + (2 * noise.to(pixels.device) - 1) * epsilon).clamp(0, 1)


def pick(choice: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Per image, `first` where `choice` [N] is true, else `second`."""
    return torch.where(choice.view(-1, *[1] * (first.dim() - 1)), first, second)


def approximate(value: Tensor, stand_in: Tensor) -> Tensor:
    """`value`, with the gradient of `stand_in`: the backward approximation of BPDA."""
    passed: Tensor = _PassThrough.apply(value, stand_in)  # type: ignore[no-untyped-call]
    return passed


class _PassThrough(torch.autograd.Function):
    """Unlike `stand_in + (value - stand_in).detach()`, this is exact in the forward direction."""

    @staticmethod
    def forward(context: Any, value: Tensor, stand_in: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return None, gradients[0]
