"""What the reset mistake of the published code does to a figure.

    python -m research.reset --data DIR/tiny_imagenet_val.parquet --bundle runs/static/published

The published V and VLI remember what to reset to before the learned prompts are loaded: every
picture starts from random deep prompts. The static attack is made on the learned ones, so on
another model than the one that answers. Here the same pictures are answered both ways, by TAPT as
published (one step, the single view), under the attack on the learned prompts and under the attack
on the prompts that answer. The bundle is one that the model `embedded` learned as published; `make
static` makes it. Writes the part of docs/robustness.md between the marks `reset`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness.machine import machine
from benchmarks.harness.report import write_section
from models.attacks.attack import LEVELS, Budget
from models.attacks.pgd import pgd
from models.attacks.threats import static
from models.calibration.prompt_tuning import SPREAD
from models.classifier import DefendedClassifier
from models.data import open_dataset
from models.evaluation import command
from models.evaluation.options import parser as evaluation_flags
from models.evaluation.sample import Subject, gather
from models.evaluation.scores import difference, wilson
from models.evaluation.table import percent, tabulate
from models.evaluation.trial import Protocol, answers
from models.prompts import DefensePrompts

PAGE = Path(__file__).parent.parent / "docs" / "robustness.md"
BATCH = 20
EPSILON = 2  # levels


def forget_deep(prompts: DefensePrompts, seed: int = 0) -> DefensePrompts:
    """The same prompts with those behind the first layer drawn anew, as before any learning."""
    source = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.cat(
            [value[:, :1], torch.randn(value[:, 1:].shape, generator=source).to(value) * SPREAD], 1
        )
        for name, value in prompts.tensors.items()
    }
    return prompts.map(drawn)


def judge(
    classifier: DefendedClassifier,
    names: tuple[str, ...],
    subjects: Sequence[Subject],
    attacked: DefendedClassifier | None,
) -> list[bool]:
    """Whether `classifier` is right on each picture, clean or attacked on another's prompts."""
    protocol = Protocol(["tapt"], [], [], [], Budget(0), views=16, steps=1, readout="single")
    right = []
    for start in range(0, len(subjects), BATCH):
        chunk = subjects[start : start + BATCH]
        seeds = list(range(start, start + len(chunk)))
        images = [subject.image for subject in chunk]
        if attacked is not None:
            stacked = torch.stack([torch.from_numpy(image) for image in images])
            pixels = stacked.permute(0, 3, 1, 2).float() / LEVELS
            labels = torch.tensor([subject.label for subject in chunk])
            hurt = pgd(static(attacked, names), pixels, labels, Budget(EPSILON / LEVELS), seeds)
            levels = (hurt * LEVELS).round().byte().permute(0, 2, 3, 1).contiguous()
            images = list(levels.numpy())
        found = answers(classifier, names, images, "tapt", protocol, seeds)
        right += [answer == s.label for (answer, _), s in zip(found, chunk, strict=True)]
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="validation photographs")
    parser.add_argument("--limit", type=int, default=300, help="images")
    parser.add_argument("--bundle", type=Path, required=True, help="learned on single views")
    options = parser.parse_args()
    flags = ["--data", str(options.data), "--json", "-", "--bundle", str(options.bundle)]
    flags += ["--model", "embedded", "--adapts", "all"]
    learned = command.load(evaluation_flags().parse_args(flags)).without_resize()
    assert learned.bundle is not None
    forgot = DefendedClassifier(
        learned.checkpoint,
        replace(learned.bundle, prompts=forget_deep(learned.bundle.prompts)),
        learned.objective,
    )
    data = open_dataset(options.data)
    names = tuple(data.names)
    subjects = gather(learned, data, options.limit, seed=0)

    def robust(
        classifier: DefendedClassifier, attacked: DefendedClassifier, clean: list[bool]
    ) -> list[bool]:
        hurt = judge(classifier, names, subjects, attacked)
        return [a and b for a, b in zip(clean, hurt, strict=True)]

    clean, clean_forgot = (judge(g, names, subjects, None) for g in (learned, forgot))
    own = robust(learned, learned, clean)
    other, matched = (robust(forgot, target, clean_forgot) for target in (learned, forgot))
    text = render_table(
        {
            "learned prompts": (clean, own, own),
            "random deep prompts": (clean_forgot, other, matched),
        }
    )
    gain = difference(other, matched)
    low, high = 100 * gain.low, 100 * gain.high
    text += (
        f"\n\nWith random deep prompts, attacking the wrong model changes the figure by "
        f"{100 * gain.value:+.1f} points ({low:+.1f} to {high:+.1f}, paired). "
        f"`{options.data.name}`, n = {len(subjects)}, PGD of {Budget(0).steps} steps at "
        f"{EPSILON}/255, 16 views, one step at the published learning rate, "
        f"prediction from view 0. {machine()} "
        f"Written by `python -m research.reset --data {options.data.name} "
        f"--bundle {options.bundle} --limit {options.limit}`."
    )
    write_section("reset", text, PAGE)
    print(text)


def render_table(rows: dict[str, Sequence[list[bool]]]) -> str:
    """The table in Markdown, shares of pictures with intervals."""

    def share(right: list[bool]) -> str:
        return percent(wilson(sum(right), len(right)))

    lines = [(name, *map(share, columns)) for name, columns in rows.items()]
    heads = (
        "every image starts from",
        "clean",
        "static, attack on the learned prompts",
        "static, attack on the prompts in use",
    )
    return tabulate(heads, lines)


if __name__ == "__main__":
    main()
