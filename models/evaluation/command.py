"""Measure defenses under attack and write the table.

    tapt-serve evaluate --data PATH --defenses plain,ensemble,tapt \\
        --threats clean,transfer,static,adaptive --attacks pgd,apgd --eps 1/255,2/255 \\
        --limit 500 --json OUT.json

Writes OUT.json, OUT.md and OUT.svg. Outcomes are appended to OUT.jsonl as they come, so that the
same command resumes after a kill. A resumed run may add defenses, threats, attacks, epsilons and
images. `--shard I/N` takes every Nth image, and `--merge` makes one evaluation of all shards.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from models.attacks import strong
from models.attacks.adaptive import surrogates
from models.attacks.attack import LEVELS, Budget
from models.attacks.autoattack import MissingExtra, require
from models.attacks.preflight import preflight
from models.classifier import DefendedClassifier
from models.data import DataError, check_labels, class_names
from models.errors import LoadError
from models.evaluation.check import cross_check
from models.evaluation.hub import open_anywhere
from models.evaluation.journal import Journal
from models.evaluation.merge import merge
from models.evaluation.options import parse, read_area, read_protocol
from models.evaluation.provenance import describe_machine, describe_settings, tell_command
from models.evaluation.report import report
from models.evaluation.sample import Subject, gather
from models.evaluation.trial import Protocol, Trial
from models.loading import load_classifier

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
    names = class_names(data, options.labels, options.data)
    protocol = read_protocol(options)
    for defense in protocol.defenses:
        if defense not in classifier.methods:
            raise LoadError(f"{defense} needs a defense bundle: name one with --bundle")
    if "static" in protocol.threats and classifier.bundle is None:
        raise LoadError("static attacks learned prompts: name a bundle with --bundle")
    if "autoattack" in protocol.attacks:
        require()  # now, not after hours
    shard = options.shard
    subjects = gather(classifier, data, options.limit, options.seed, shard)
    check_labels([subject.label for subject in subjects], names, options.data)
    settings = describe_settings(classifier, names, protocol)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    journal = Journal(options.json.with_suffix(".jsonl"), key)
    shown = classifier.without_resize()
    warnings = check(
        shown,
        names,
        protocol,
        [subject for subject in subjects if subject.place < options.preflight],
    )
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(TextColumn("attacking"), *columns) as bar:
        task = bar.add_task("")
        trial = Trial(shown, names, protocol, journal, lambda n: bar.advance(task, n))
        bar.update(task, total=trial.work(subjects))
        trial.run(subjects)
    if options.check:
        cross_check(shown, names, protocol, subjects, journal)
    facts = {
        "key": key,
        "data": {
            "name": Path(options.data).name,
            "classes": len(names),
            "images": len(data),
            "n": len(subjects),
        },
        "limit": options.limit,
        "checkpoint": classifier.checkpoint.name,
        "settings": settings,
        "command": command,
        "attacks": protocol.attacks,
        "queried": protocol.queried,
        "preflight": options.preflight,
        "checked": options.check,
        "batch": protocol.batch,
        "machine": describe_machine(classifier),
        "shard": asdict(shard),
        "warned": warnings,
        "pictures": [subject.name for subject in subjects],
    }
    report(options.json, facts, protocol.cells, journal, warnings)
    return 0


def load(options: argparse.Namespace) -> DefendedClassifier:
    """The classifier that the options describe.

    Raises LoadError, and ValueError for a `--view-area` that no crop can show."""
    return load_classifier(
        options.model,
        device=options.device,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
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


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(arguments)
    try:
        if options.merge:
            merge(options.merge, options.json)
            return 0
        return evaluate(options, tell_command(arguments, options.json))
    except (LoadError, DataError, MissingExtra, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command to resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
