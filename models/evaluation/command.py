"""Measure defenses under attack and write the table.

    tapt-serve evaluate --data PATH --defenses plain,ensemble,tapt \\
        --threats clean,transfer,static,adaptive --attacks pgd,apgd --eps 1/255,2/255 \\
        --limit 500 --json OUT.json

Writes OUT.json, OUT.md and OUT.svg. Outcomes are appended to OUT.jsonl as they come, so that the
same command resumes after a kill. A resumed run may add defenses, threats, attacks, epsilons and
images.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from models.attacks import ATTACKS, strong
from models.attacks.adaptive import surrogates
from models.attacks.attack import LEVELS, Budget
from models.attacks.autoattack import MissingExtra, require
from models.attacks.preflight import preflight
from models.attacks.threats import THREATS
from models.classifier import DEFAULT_TEMPLATE, DefendedClassifier
from models.data import DataError
from models.defenses.catalog import DEFENSES, READOUTS
from models.errors import LoadError, install_extra
from models.evaluation.check import cross_check
from models.evaluation.detection import Detection, detect, write_detection
from models.evaluation.hub import open_anywhere
from models.evaluation.journal import CLEAN, Journal
from models.evaluation.provenance import describe_machine, describe_settings, tell_command
from models.evaluation.table import Row, draw, tally, write_markdown
from models.evaluation.trial import Protocol, Subject, Trial, gather, suspect
from models.loading import load_classifier
from models.tapt import ADAPTS
from models.views import AREA

CHECKED = Budget(0, steps=10, queries=60)  # of a preflight, per image


def evaluate(options: argparse.Namespace, command: str) -> int:
    """Run an evaluation and write its files.

    Args:
        command: the command line to record in the files.

    Raises:
        LoadError, DataError, MissingExtra, ValueError: checkpoint, bundle, images, packages or
            options cannot be used.
    """
    classifier = load(options)
    data = open_anywhere(options.data)
    names = options.labels.split(",") if options.labels else data.names
    if len(names) < 2:
        raise DataError(f"{options.data} has no labels; name some with --labels")
    protocol = read_protocol(options)
    for defense in protocol.defenses:
        if defense not in classifier.methods:
            raise LoadError(f"{defense} needs a defense bundle: name one with --bundle")
    if "static" in protocol.threats and classifier.bundle is None:
        raise LoadError("static attacks learned prompts: name a bundle with --bundle")
    if "autoattack" in protocol.attacks:
        require()  # now, not after hours
    subjects = gather(classifier, data, options.limit, options.seed)
    settings = describe_settings(classifier, names, protocol)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    journal = Journal(options.json.with_suffix(".jsonl"), key)
    shown = classifier.without_resize()
    warnings = check(shown, names, protocol, subjects[: options.preflight])
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(TextColumn("attacking"), *columns) as bar:
        task = bar.add_task("")
        trial = Trial(shown, names, protocol, journal, lambda n: bar.advance(task, n))
        bar.update(task, total=trial.work(subjects))
        trial.run(subjects)
    warnings += suspect(protocol, subjects, journal)
    checks = cross_check(shown, names, protocol, subjects, journal) if options.check else []
    warnings += [sentence for check in checks for sentence in check.warnings()]
    pictures = [subject.name for subject in subjects]
    rows = tally(protocol.cells, pictures, journal)
    detections = detect(protocol.cells, pictures, journal)
    facts = {
        "key": key,
        "data": {"name": Path(options.data).name, "classes": len(names), "n": len(subjects)},
        "checkpoint": classifier.checkpoint.name,
        "settings": settings,
        "command": command,
        "attacks": protocol.attacks,
        "queried": protocol.queried,
        "batch": protocol.batch,
        "machine": describe_machine(classifier),
        "checks": [check.describe() for check in checks],
        "warnings": warnings,
        "pictures": pictures,
    }
    write(options.json, facts, rows, detections, warnings)
    return 0


def load(options: argparse.Namespace) -> DefendedClassifier:
    """The classifier that the options describe.

    Raises LoadError, and ValueError for a `--view-area` that no crop can show."""
    return load_classifier(
        options.model,
        device=options.device,
        dtype=options.dtype,
        bundle=options.bundle,
        template=options.template,
        selection_ratio=options.selection_ratio,
        view_area=read_area(options.view_area),
        adapts=options.adapts,
        alignment_weight=options.alignment_weight,
        gamma=options.gamma,
        of_mean=options.entropy == "of-mean",
        learning_rate=options.learning_rate,
    )


def read_area(given: Sequence[str]) -> tuple[float, float]:
    """Raises ValueError unless the two shares can bound a crop."""
    area = [float(text) for text in given]
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        raise ValueError("--view-area: two shares in (0, 1], the smaller one first")
    return area[0], area[1]


def read_protocol(options: argparse.Namespace) -> Protocol:
    """Raises ValueError for an unknown name or a number out of range."""
    known = {
        "--defenses": (options.defenses, list(DEFENSES)),
        "--threats": (options.threats, [CLEAN, *THREATS]),
        "--attacks": (options.attacks, [*ATTACKS, "strong"]),
    }
    for flag, (given, names) in known.items():
        if strange := [name for name in given if name not in names]:
            raise ValueError(f"{flag}: unknown {', '.join(strange)}; known: {', '.join(names)}")
    try:
        epsilons = [float(Fraction(text) * LEVELS) for text in options.eps]
    except ZeroDivisionError:
        raise ValueError("--eps: a fraction by zero") from None
    if min(epsilons) < 1:
        raise ValueError("--eps: below 1/255, one level of an 8-bit picture")
    if max(epsilons) >= LEVELS:
        raise ValueError("--eps: of [0, 1] pixels and below 1: write 2/255 for 2 levels of 255")
    recipe = "strong" in options.attacks
    attacks = [
        n for name in options.attacks for n in (strong.RECIPE if name == "strong" else [name])
    ]
    budget = Budget(
        epsilon=0,
        steps=options.attack_steps or (strong.STEPS if recipe else 20),
        restarts=options.restarts,
        draws=options.eot,
        targets=options.targets,
        queries=options.queries or (strong.QUERIES if recipe else 500),
    )
    return Protocol(
        options.defenses,
        options.threats,
        list(dict.fromkeys(attacks)),
        epsilons,
        budget,
        options.views,
        options.steps,
        options.readout,
        options.seed,
        options.batch,
        options.answers or (strong.ANSWERS if recipe else 1),
        options.queried or (strong.QUERIED if recipe else None),
    )


def check(
    classifier: DefendedClassifier,
    names: Sequence[str],
    protocol: Protocol,
    subjects: Sequence[Subject],
) -> list[str]:
    """The preflight's warnings on attacking each defense adaptively, at the largest epsilon."""
    if "adaptive" not in protocol.threats or not subjects:
        return []
    budget = replace(CHECKED, epsilon=max(protocol.epsilons) / LEVELS, draws=protocol.budget.draws)
    device, found = classifier.checkpoint.clip.device, []
    pixels = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in subjects])
    labels = torch.tensor([subject.label for subject in subjects], device=device)
    for defense in protocol.defenses:
        targets = surrogates(
            classifier,
            tuple(names),
            defense,
            protocol.views,
            protocol.steps_of(defense),
            protocol.readout,
            [protocol.seed + number for number in range(len(subjects))],
        )
        clean: Tensor = pixels.to(device).float() / LEVELS
        for way in strong.ways_of("pgd", list(targets)):
            model = targets[way]
            spent = budget if model.random else replace(budget, draws=1)
            for sentence in preflight(model, clean, labels, spent, range(len(subjects))):
                found.append(f"{defense}, {way}: {sentence}")
                print(found[-1], file=sys.stderr)
    return found


def write(
    out: Path,
    facts: dict[str, Any],
    rows: Sequence[Row],
    detections: Sequence[Detection],
    warnings: Sequence[str],
) -> None:
    """Write the three files and print the tables."""
    out.parent.mkdir(parents=True, exist_ok=True)
    told = {found.cell: {"suspicion": found.describe()} for found in detections}
    facts = {**facts, "rows": [row.describe() | told.get(row.cell, {}) for row in rows]}
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    page = write_markdown(rows)
    if detections:
        page += "\n" + write_detection(detections)
    page += "".join(f"\nWarning: {sentence}\n" for sentence in warnings)
    out.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    try:
        draw(rows, out.with_suffix(".svg"))
    except ImportError:
        print(f"no plot: it needs matplotlib; {install_extra('train')}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = argparse.ArgumentParser(
        prog="tapt-serve evaluate",
        description="Measure defenses under attack and write the table.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    lists: dict[str, Any] = {"type": lambda text: text.split(","), "metavar": "NAME,..."}
    add = flags.add_argument
    add("--data", required=True, help="folder or parquet file of labeled images, or a datasets id")
    add("--json", type=Path, required=True, metavar="OUT", help="JSON file to write")
    add("--limit", type=int, help="size of a random sample of the images; all if absent")
    add("--labels", default="", help="comma-separated class names instead of the data's own")
    add("--defenses", default="plain,ensemble,tapt", help=",".join(DEFENSES), **lists)
    add("--threats", default="clean,transfer", help=",".join([CLEAN, *THREATS]), **lists)
    add(
        "--attacks",
        default="pgd,apgd,square",
        help=f"{','.join(ATTACKS)}; pgd is a quick look; strong, for figures to rely on, is "
        f"{','.join(strong.RECIPE)} and takes up to {strong.COST} per image, before queries",
        **lists,
    )
    add(
        "--eps",
        default="2/255",
        help="of [0, 1] pixels",
        **{**lists, "metavar": "E,..."},
    )
    add("--seed", type=int, default=0, help="draws the sample, starting points and views")
    add("--batch", type=int, default=8, help="images in one batch")
    add("--preflight", type=int, default=0, help="images to check for masked gradients first")
    pair: dict[str, Any] = {**lists, "metavar": "LEAST,MOST"}
    model = flags.add_argument_group("model and defense").add_argument
    model(
        "--model", default="embedded", help="embedded, a directory, or a hub id [env: TAPT_MODEL]"
    )
    model("--bundle", type=Path, help="default: the one beside the model, if any")
    model("--device", default="cpu", help="cpu, cuda or cuda:N")
    model(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="precision"
    )
    model("--template", default=DEFAULT_TEMPLATE, help="template without learned prompts")
    model("--views", type=int, default=16, help="views per image")
    model("--view-area", default=AREA, help="share of the image in a view", **pair)
    model("--steps", type=int, default=1, help="adaptation steps")
    model("--readout", default="all", choices=READOUTS, help="views that the answer is read from")
    model("--learning-rate", type=float, default=5e-4, help="AdamW's learning rate")
    model(
        "--entropy",
        default="of-mean",
        choices=["of-mean", "mean-of"],
        help="over kept views",
    )
    model("--adapts", default="vision", choices=ADAPTS, help="which prompts adapt")
    model("--selection-ratio", type=float, default=0.1, help="share of the views kept for the loss")
    model(
        "--alignment-weight",
        type=float,
        default=100.0,
        help="against the entropy",
    )
    model(
        "--gamma",
        type=float,
        default=0.5,
        help="share of the adversarial statistics",
    )
    attack = flags.add_argument_group("attack").add_argument
    attack(
        "--attack-steps",
        type=int,
        help=f"steps of a gradient attack; 20, or {strong.STEPS} with strong",
    )
    attack(
        "--answers",
        type=int,
        help="answers of a random defense to each image, with other draws; 1, or "
        f"{strong.ANSWERS} with strong",
    )
    attack("--restarts", type=int, default=1, help="random restarts of an attack")
    attack("--eot", type=int, default=1, help="draws of views to average gradients over")
    attack("--targets", type=int, default=3, help="classes that APGD aims at")
    attack(
        "--queries",
        type=int,
        help=f"queries of square and rays; 500, or {strong.QUERIES} with strong",
    )
    attack(
        "--queried",
        type=int,
        metavar="N",
        help=f"images that square and rays attack; all, or {strong.QUERIED} with strong",
    )
    attack(
        "--check",
        action="store_true",
        help="afterwards, check that twice the steps break less than 2 points more and that a "
        "large epsilon leaves nothing",
    )
    return flags


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(arguments)
    try:
        return evaluate(options, tell_command(arguments, options.json))
    except (LoadError, DataError, MissingExtra, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command to resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
