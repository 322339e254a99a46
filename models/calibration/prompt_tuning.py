"""Learning defensive prompts beforehand by adversarial prompt tuning.

The checkpoint stays frozen; shared prompts learn to classify images that are attacked, at each
step, through those very prompts (TAPT, arXiv 2411.13136, section 3.3). A share of every batch
stays clean, so that the prompts keep what the model knew.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from models import adamw
from models.attacks.attack import start_at
from models.attacks.pgd import take_steps
from models.blocks import run_block
from models.calibration import processes
from models.clip import PromptedCLIP
from models.images.preprocess import Preprocessing
from models.labels import LabelBatch
from models.prompts import DefensePrompts
from models.tapt import MOVING, Adapts, prompt_gradients
from models.views import make_batch_views, round_levels

SPREAD = 0.02  # standard deviation of fresh prompts, as CLIP's own embeddings have

Cut = Callable[[Tensor], Tensor]
"""Images [N, 3, S, S] in [0, 1] to views [N, m, 3, S, S] of them, with a gradient."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How prompts are learned.

    `epsilon` is in [0, 1] pixels; `depth` and `tokens` count a tower's prompted layers and its
    prompts a layer, for VLI the visual ones alone; `views` 1 takes the loss through the single
    view, as published, and more through the mean prediction over that many, which is what serving
    reads. `attack_views` does the same for the attack in the inner loop: each of its steps follows
    the mean prediction over that many freshly drawn views. `learns` names the prompts to learn:
    `all`, or `vision`, which leaves VLI's text prompts at the template's words.
    """

    design: str = "vli"
    depth: int = 9
    tokens: int = 2
    learns: Adapts = "all"
    steps: int = 400
    batch: int = 64
    rate: float = 2e-3
    warm_up: int = 20
    weight_decay: float = 0.01
    epsilon: float = 1 / 255
    attack_steps: int = 2
    attack_views: int = 1
    clean_share: float = 0.5
    views: int = 1
    seed: int = 0


@dataclass(slots=True)
class Progress:
    """How far the tuning is: all that it needs to go on, `step` counting the steps done."""

    prompts: DefensePrompts
    moments: adamw.Moments
    step: int = 0
    losses: list[float] = field(default_factory=list)


@torch.no_grad()
def read_words(clip: PromptedCLIP, ids: Tensor, depth: int) -> Tensor:
    """What words are at the start of each of the first `depth` text blocks, [1, depth, n, width].

    `ids` [1, 1 + n] are the start token and the words. As prompts in front of a label these change
    nothing: under the causal mask the words see nothing of the label.
    """
    text, length = clip.model.text_model, ids.shape[1]
    embedded = text.embeddings.token_embedding(ids)
    hidden = embedded + text.embeddings.position_embedding.weight[:length]
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    states = [embedded]
    for block in text.encoder.layers[: depth - 1]:
        hidden, _ = run_block(block, hidden, causal)
        states.append(hidden)
    return torch.stack([state[:, 1:] for state in states], dim=1).float()


def begin(clip: PromptedCLIP, tuning: Tuning, words: Tensor) -> Progress:
    """Prompts to learn from, for a checkpoint; the depth is cut to the layers that a tower has.

    Visual prompts and those of VLJ start at random, near nothing. VLI's text prompts start as the
    template's leading words, which change nothing: random ones cost more than is learned back.

    Args:
        words: [1, 1 + n] token ids, the start token included.
    """
    source = torch.Generator().manual_seed(tuning.seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(1, *shape, generator=source) * SPREAD).to(clip.device)

    both = min(tuning.depth, clip.vision_layers, clip.text_layers)
    deep = both if tuning.design == "vlj" else min(tuning.depth, clip.vision_layers)
    tensors: dict[str, Tensor] = {}
    if tuning.design in ("v", "vli"):
        tensors["vision"] = draw(deep, tuning.tokens, clip.vision_width)
    if tuning.design == "vli":
        tensors["text"] = read_words(clip, words, both)
    if tuning.design == "vlj":
        tensors["text"] = draw(both, tuning.tokens, clip.text_width)
        scale = clip.text_width**-0.5 / SPREAD
        tensors["projection.weight"] = draw(deep, clip.vision_width, clip.text_width) * scale
        tensors["projection.bias"] = torch.zeros(1, deep, clip.vision_width, device=clip.device)
    prompts = DefensePrompts(tuning.design, tensors)
    return Progress(prompts, adamw.begin(tensors))


def attack(
    clip: PromptedCLIP,
    pixels: Tensor,
    targets: Tensor,
    text: Tensor,
    prompts: DefensePrompts | None,
    epsilon: float,
    steps: int,
    noise: Tensor | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """PGD on a prompted CLIP, away from the targets, quantized to uint8 values.

    Args:
        pixels: [N, 3, S, S] in [0, 1]; `targets` [N] are indices into the classes.
        text: features [C, D] of the classes at those prompts.
        noise: as `pixels`, in [0, 1): the random start, 0.5 the clean image; None starts there.
        cut: pixels to views [N, m, 3, S, S], drawn anew for each step of the attack, which then
            goes through the mean prediction over them (expectation over transformation, Athalye
            et al., ICML 2018); None attacks the single view.
    """
    visual = None if prompts is None else prompts.vision

    def loss(attacked: Tensor) -> Tensor:
        views = attacked.unsqueeze(1) if cut is None else cut(attacked)
        return _mean_loss(_logits(clip, views, text, visual), targets, "sum")

    attacked = pixels if noise is None else start_at(pixels, epsilon, noise)
    stride = 2 * epsilon / max(2, steps)
    for ahead in take_steps(pixels, loss, epsilon, steps, stride, attacked):
        attacked = ahead
    return (attacked * 255).round() / 255


@dataclass(frozen=True, slots=True)
class _Draws:
    """What a step draws, for the whole batch. It depends on the step's number and the seed alone,
    so that all processes that share a batch agree, and a run that was cut short ends where one in a
    single piece does.

    Attributes:
        picked: indices [N] of the images; `mirrored` [N, 1, 1, 1] says which are flipped.
        noise: [H, 3, S, S] in [0, 1), the starts of the first H images, which are attacked.
        attack_seeds: of the views of these, for each step of an attack through views.
        seeds: [N] of the views that the loss is the mean over.
    """

    picked: Tensor
    mirrored: Tensor
    noise: Tensor
    attack_seeds: list[Tensor]
    seeds: Tensor

    @classmethod
    def of(cls, tuning: Tuning, step: int, pixels: Tensor) -> "_Draws":
        """Those of step number `step`, counted from 0, on images [count, 3, S, S]."""
        source = torch.Generator().manual_seed(tuning.seed * 1_000_003 + step)

        def seeds(number: int, views: int) -> Tensor:
            # A single view is drawn from nothing.
            shape = (number if views > 1 else 0,)
            return torch.randint(2**31, shape, generator=source)

        hurt, through = round(tuning.batch * (1 - tuning.clean_share)), tuning.attack_views
        return cls(
            torch.randint(len(pixels), (tuning.batch,), generator=source),
            torch.rand(tuning.batch, 1, 1, 1, generator=source) < 0.5,
            torch.rand(hurt, *pixels.shape[1:], generator=source),
            [seeds(hurt, through) for _ in range(tuning.attack_steps if hurt else 0)],
            seeds(tuning.batch, tuning.views),
        )

    def share(self, own: slice) -> "_Draws":
        """Those of every image in `own`."""
        return _Draws(
            self.picked[own],
            self.mirrored[own],
            self.noise[own],
            [seeds[own] for seeds in self.attack_seeds],
            self.seeds[own],
        )


def tune(
    clip: PromptedCLIP,
    labels: LabelBatch,
    pixels: Tensor,
    targets: Tensor,
    preprocessing: Preprocessing,
    tuning: Tuning,
    progress: Progress,
    report: Callable[[Progress], None],
) -> DefensePrompts:
    """Go on from `progress` to the last step and return the learned prompts.

    Processes that torchrun started share each batch and add up their gradients.

    Args:
        labels: the classes, with the slots that the design's text prompts take.
        pixels: view 0 of the images, uint8 [N, 3, S, S]; `targets` [N] their classes.
        report: told after every step.
    """
    own = slice(processes.rank(), None, processes.count())
    while progress.step < tuning.steps:
        draws = _Draws.of(tuning, progress.step, pixels).share(own)
        batch = pixels[draws.picked].float() / 255
        batch = torch.where(draws.mirrored, batch.flip(-1), batch).to(clip.device)
        goals = targets[draws.picked].to(clip.device)
        prompts, hurt = progress.prompts, len(draws.noise)
        text = clip.encode_labels(labels, prompts.text)
        if hurt:
            batch[:hurt] = attack(
                clip,
                batch[:hurt],
                goals[:hurt],
                text,
                prompts,
                tuning.epsilon,
                tuning.attack_steps,
                draws.noise,
                _cut_anew(draws.attack_seeds, tuning.attack_views, preprocessing),
            )
        views = _spread(batch, tuning.views, preprocessing, draws.seeds.tolist())
        loss, found = _gradients(clip, views, goals, labels, text, prompts, MOVING[tuning.learns])
        # Means over shares of a batch, which may differ by one in size.
        part = len(batch) / tuning.batch
        found = {name: gradient * part for name, gradient in found.items()}
        found = processes.add_up(found | {"loss": torch.tensor([loss * part]).to(clip.device)})
        loss = float(found.pop("loss"))
        progress.step += 1
        moved, progress.moments = adamw.advance(
            prompts.tensors,
            found,
            progress.moments,
            progress.step,
            tuning.rate * _schedule(progress.step, tuning),
            tuning.weight_decay,
        )
        progress.prompts = prompts.map(moved)
        progress.losses.append(loss)
        report(progress)
    return progress.prompts


def _cut_anew(seeds: Sequence[Tensor], views: int, preprocessing: Preprocessing) -> Cut | None:
    """Views from the next seeds at each call; None for a single view."""
    if views == 1:
        return None
    left = iter(seeds)
    return lambda pixels: _spread(pixels, views, preprocessing, next(left).tolist())


def _spread(
    batch: Tensor, views: int, preprocessing: Preprocessing, seeds: Sequence[int]
) -> Tensor:
    """Views [N, views, 3, S, S] of images [N, 3, S, S] in [0, 1], with a gradient; view 0 is the
    image itself, the others are cut from it as drawn by its seed."""
    if views == 1:
        return batch.unsqueeze(1)
    images = list(round_levels(batch * 255))
    unresized = preprocessing.without_resize()
    return make_batch_views(images, views, seeds, unresized, batch.device)


def _mean_loss(logits: Tensor, goals: Tensor, reduction: str) -> Tensor:
    """Cross-entropy of the mean prediction over views, of logits [N, m, C] and classes [N]."""
    mean = logits.log_softmax(dim=-1).logsumexp(dim=1) - math.log(logits.shape[1])
    return F.nll_loss(mean, goals, reduction=reduction)


def _gradients(
    clip: PromptedCLIP,
    views: Tensor,
    goals: Tensor,
    labels: LabelBatch,
    text: Tensor,
    prompts: DefensePrompts,
    moving: frozenset[str],
) -> tuple[float, dict[str, Tensor]]:
    """The cross-entropy of the mean prediction over views, and its gradient at each of the `moving`
    prompts, by name."""
    values: list[float] = []

    def loss(leaves: DefensePrompts, features: Tensor) -> Tensor:
        value = _mean_loss(_logits(clip, views, features, leaves.vision), goals, "mean")
        values.append(value.item())
        return value

    found = prompt_gradients(clip, labels, text, prompts, loss, moving)
    return values[0], found


def _logits(clip: PromptedCLIP, views: Tensor, text: Tensor, visual: Tensor | None) -> Tensor:
    """Logits [N, m, C] of views [N, m, 3, S, S]: all share the prompts, so they are the views of
    one request."""
    flat = clip.encode_images(views.flatten(0, 1).unsqueeze(0), visual).features[0]
    logits: Tensor = (clip.logit_scale * flat @ text.T).unflatten(0, views.shape[:2])
    return logits


def _schedule(step: int, tuning: Tuning) -> float:
    """Linear warm-up, then half a cosine to 0; `step` counts from 1."""
    if step <= tuning.warm_up:
        return step / tuning.warm_up
    done = (step - tuning.warm_up) / max(1, tuning.steps - tuning.warm_up)
    return 0.5 * (1 + math.cos(math.pi * done))
