"""Judge an answer on the same images: clean, under transfer, and under an attack on itself."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.learned_step.learning import Answer, attack
from models.attacks.attack import LEVELS, Budget, Model, quantize
from models.attacks.pgd import pgd
from models.evaluation.sample import Subject
from models.evaluation.scores import difference, wilson
from models.evaluation.table import percent, tabulate
from models.readout import mean_log_prediction

THREATS = ("clean", "transfer", "adaptive")
CHUNK = 10
REACH = 2.5  # total length of the attack's steps, in epsilons

Outcomes = Mapping[str, Sequence[bool]]
"""By threat, whether each image is right: without an attack and, if any, under it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How the images are attacked. `epsilon` is in [0, 1] pixels."""

    epsilon: float = 2 / 255
    attack_steps: int = 20
    seed: int = 0


def judge(
    answer: Answer,
    undefended: Model,
    subjects: Sequence[Subject],
    trial: Trial,
    journal: Path,
    settings: dict[str, Any],
) -> Outcomes:
    """The outcomes of one way to answer on all images.

    Chunks that an earlier run with the same settings wrote into the journal are not computed again.
    """
    settings = {**settings, "trial": asdict(trial)}
    done = dict(_read(journal, settings))
    if not done:
        journal.write_text(json.dumps(settings) + "\n")
    for start in range(0, len(subjects), CHUNK):
        if start in done:
            continue
        chunk = subjects[start : start + CHUNK]
        done[start] = _judge(answer, undefended, chunk, start, trial)
        with journal.open("a") as file:
            file.write(json.dumps({"start": start, "outcomes": done[start]}) + "\n")
        print(f"{journal.stem}: {start + len(chunk)} of {len(subjects)} images", file=sys.stderr)
    return {
        threat: [right for start in sorted(done) for right in done[start][threat]]
        for threat in THREATS
    }


def _judge(
    answer: Answer, undefended: Model, chunk: Sequence[Subject], start: int, trial: Trial
) -> dict[str, list[bool]]:
    stacked = torch.from_numpy(np.stack([subject.image for subject in chunk]))
    pixels = stacked.permute(0, 3, 1, 2).float() / LEVELS
    labels = torch.tensor([subject.label for subject in chunk])
    places = range(start, start + len(chunk))

    @torch.no_grad()
    def right(shown: Tensor, purpose: int) -> Tensor:
        seeds = [
            int(np.random.default_rng([trial.seed, p, purpose]).integers(2**31)) for p in places
        ]
        return mean_log_prediction(answer(shown, seeds)).argmax(dim=1) == labels

    clean = right(pixels, 0)
    budget = Budget(trial.epsilon, steps=trial.attack_steps)
    transferred = pgd(undefended, pixels, labels, budget, list(places))
    source = torch.Generator().manual_seed(trial.seed * 1_000_003 + start)
    attacked = pixels.clone()
    if len(hit := clean.nonzero()[:, 0]):
        own = pixels[hit], labels[hit], trial.epsilon, trial.attack_steps
        attacked[hit] = attack(answer, *own, REACH, source)
    shown = quantize(attacked, pixels, trial.epsilon)
    return {
        "clean": clean.tolist(),
        "transfer": (clean & right(transferred, 1)).tolist(),
        "adaptive": (clean & right(shown, 2)).tolist(),
    }


def _read(journal: Path, settings: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """Chunks of an earlier run with these settings."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    if not lines or json.loads(lines[0]) != settings:
        return
    for line in lines[1:]:
        chunk = json.loads(line)
        yield chunk["start"], chunk["outcomes"]


def tabulate_accuracies(rows: Mapping[str, Outcomes], passes: Mapping[str, int]) -> str:
    """Accuracies in Markdown.

    Args:
        passes: forward passes of one view that each row takes; a backward pass counts as two.
    """
    lines = [
        (name, str(passes[name]), *(_share(outcomes[threat]) for threat in THREATS))
        for name, outcomes in rows.items()
    ]
    return tabulate(("answer", "passes per image", *THREATS), lines)


def tabulate_differences(rows: Mapping[str, Outcomes], pairs: Sequence[tuple[str, str]]) -> str:
    """Paired differences in Markdown, of the first row of each pair against the second."""
    lines = [
        (f"{one}, against {other}", *(_points(rows[one][t], rows[other][t]) for t in THREATS))
        for one, other in pairs
    ]
    return tabulate(("points", *THREATS), lines)


def _share(right: Sequence[bool]) -> str:
    return percent(wilson(sum(right), len(right)))


def _points(first: Sequence[bool], second: Sequence[bool]) -> str:
    gain = difference(first, second)
    return f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
