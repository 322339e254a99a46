"""Learning defensive prompts beforehand by adversarial prompt tuning.

The checkpoint stays frozen; shared prompts learn to classify pictures that are attacked, at each
step, through those very prompts (TAPT section 3.3, after Li et al., CVPR 2024). Half of every
batch stays clean, so that the prompts keep what the model knew.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attacks.pgd import pgd
from models.clip import PromptedCLIP
from models.labels import LabelBatch
from models.prompts import DefensePrompts

SPREAD = 0.02  # standard deviation of fresh prompts, as CLIP's own embeddings have


@dataclass(frozen=True, slots=True)
class Tuning:
    """How prompts are learned; `epsilon` in [0, 1] pixels, `depth` and `tokens` a tower."""

    design: str = "vli"
    depth: int = 9
    tokens: int = 2
    steps: int = 400
    batch: int = 64
    rate: float = 2e-3
    warm_up: int = 20
    weight_decay: float = 0.01
    epsilon: float = 1 / 255
    attack_steps: int = 2
    clean_share: float = 0.5
    seed: int = 0


def fresh_prompts(clip: PromptedCLIP, tuning: Tuning) -> DefensePrompts:
    """Random prompts [1, ...] for a checkpoint; depth is cut to the layers a tower has."""
    source = torch.Generator().manual_seed(tuning.seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(1, *shape, generator=source) * SPREAD).to(clip.device)

    depth = min(tuning.depth, clip.vision_layers, clip.text_layers)
    text = {"text": draw(depth, tuning.tokens, clip.text_width)}
    if tuning.design == "vlj":
        scale = clip.text_width**-0.5 / SPREAD
        weight = draw(depth, clip.vision_width, clip.text_width) * scale
        bias = torch.zeros(1, depth, clip.vision_width, device=clip.device)
        return DefensePrompts("vlj", text | {"projection.weight": weight, "projection.bias": bias})
    vision = {
        "vision": draw(min(tuning.depth, clip.vision_layers), tuning.tokens, clip.vision_width)
    }
    return DefensePrompts(tuning.design, vision if tuning.design == "v" else vision | text)


def attack(
    clip: PromptedCLIP,
    pixels: Tensor,
    targets: Tensor,
    text: Tensor,
    prompts: DefensePrompts | None,
    epsilon: float,
    steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """PGD on a prompted CLIP's single view: pixels [N, 3, S, S] away from their targets [N].

    Args:
        text: features [C, D] of the classes at those prompts.
    """
    visual = None if prompts is None else prompts.vision

    def loss(attacked: Tensor) -> Tensor:
        return F.cross_entropy(_logits(clip, attacked, text, visual), targets, reduction="sum")

    return pgd(pixels, loss, epsilon, steps, 2 * epsilon / max(2, steps), generator)


def tune_prompts(
    clip: PromptedCLIP,
    labels: LabelBatch,
    batches: Iterator[tuple[Tensor, Tensor]],
    tuning: Tuning,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> DefensePrompts:
    """Learn prompts on (pixels [N, 3, S, S] in [0, 1], targets [N]) batches, one a step.

    Args:
        labels: the classes, with the slots that the design's text prompts take.
        report: told the step and its loss.
    """
    prompts = fresh_prompts(clip, tuning)
    leaves = {name: value.requires_grad_() for name, value in prompts.tensors.items()}
    optimizer = torch.optim.AdamW(leaves.values(), tuning.rate, weight_decay=tuning.weight_decay)
    source = torch.Generator().manual_seed(tuning.seed)
    for step in range(tuning.steps):
        for group in optimizer.param_groups:
            group["lr"] = tuning.rate * _schedule(step, tuning)
        pixels, targets = next(batches)
        frozen = prompts.map({name: value.detach() for name, value in leaves.items()})
        text = clip.encode_labels(labels, frozen.text)
        attacked = int(len(pixels) * (1 - tuning.clean_share))
        pixels = pixels.clone()
        pixels[:attacked] = attack(
            clip,
            pixels[:attacked],
            targets[:attacked],
            text,
            frozen,
            tuning.epsilon,
            tuning.attack_steps,
            source,
        )
        text.requires_grad_()
        loss = F.cross_entropy(_logits(clip, pixels, text, prompts.vision), targets)
        optimizer.zero_grad()
        loss.backward()
        if frozen.text is not None and text.grad is not None:
            through_text = clip.text_gradient(labels, frozen.text, text.grad)
            held = leaves["text"].grad
            leaves["text"].grad = through_text if held is None else held + through_text
        optimizer.step()
        report(step, loss.item())
    return prompts.map({name: value.detach() for name, value in leaves.items()})


def _logits(clip: PromptedCLIP, pixels: Tensor, text: Tensor, visual: Tensor | None) -> Tensor:
    """Logits [N, C]: all pictures share the prompts, so they are the views of one request."""
    return clip.logit_scale * clip.encode_images(pixels.unsqueeze(0), visual).features[0] @ text.T


def _schedule(step: int, tuning: Tuning) -> float:
    """Linear warm-up, then half a cosine to 0."""
    if step < tuning.warm_up:
        return (step + 1) / tuning.warm_up
    done = (step - tuning.warm_up) / max(1, tuning.steps - tuning.warm_up)
    return 0.5 * (1 + math.cos(math.pi * done))
