"""Accuracy under attack is counted honestly, with intervals, and survives a kill."""

import io
import json
import math
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.attacks import ATTACKS
from models.attacks.strong import ANSWERS, QUERIED, RECIPE, STEPS
from models.checkpoint import Checkpoint
from models.classifier import DefendedClassifier
from models.data import DataError
from models.defenses import counterattack, ttc
from models.evaluation import command, options, trial
from models.evaluation.check import Check
from models.evaluation.detection import detect, write_detection
from models.evaluation.hub import open_anywhere
from models.evaluation.journal import CLEAN, Cell, Journal, Outcome
from models.evaluation.provenance import describe_settings
from models.evaluation.scores import auroc, difference, student, threshold, wilson
from models.evaluation.table import read_shares, tally, write_markdown
from models.views import make_views
from research.embedded.tokenizer import train_tokenizer
from service.cli import main as cli
from tests import tiny

NAMES = ("cat", "dog", "lemon")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def checkpoint(directory: Path) -> Checkpoint:
    return tiny.load(directory)


@pytest.fixture(scope="module")
def classifier(checkpoint: Checkpoint) -> DefendedClassifier:
    return DefendedClassifier(checkpoint, tiny.make_bundle(checkpoint)).without_resize()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> Path:
    """Twelve pictures, each in the folder of the class that undefended CLIP names."""
    root, classifier = tmp_path_factory.mktemp("pictures"), DefendedClassifier(checkpoint, None)
    for name in NAMES:
        (root / name).mkdir()
    images = [tiny.draw_image(number) for number in range(12)]
    protocol = trial.Protocol(["plain"], [], [], [], trial.Budget(0), views=1)
    for number, (label, _) in enumerate(
        trial.answers(classifier, NAMES, images, "plain", protocol, range(12))
    ):
        Image.fromarray(images[number]).save(root / NAMES[label] / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / "bundle"
    tiny.make_bundle(checkpoint).save(directory)
    return directory


def run(directory: Path, folder: Path, bundle: Path, out: Path, *more: str) -> int:
    flags = f"--model {directory} --data {folder} --bundle {bundle} --json {out} --views 4 \
        --labels {','.join(NAMES)} --defenses plain,ensemble,apt,tapt \
        --threats clean,transfer,static --attacks pgd,square --eps 2/255,40/255 \
        --attack-steps 5 --queries 10 --batch 5"
    return command.main([*flags.split(), *more])


def read(out: Path) -> tuple[dict[str, Any], dict[tuple[str, str, float], dict[str, Any]]]:
    facts = json.loads(out.read_text())
    return facts, {(row["defense"], row["threat"], row["epsilon"]): row for row in facts["rows"]}


def test_the_table_is_written(
    directory: Path, folder: Path, bundle: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out.json"
    assert run(directory, folder, bundle, out) == 0
    facts, rows = read(out)
    assert facts["settings"]["checkpoint_sha256"] == checkpoint.sha256
    assert facts["settings"]["bundle"]["prompts_sha256"]
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["data"]["n"] == 12
    assert rows["plain", CLEAN, 0]["accuracy"] == 1
    assert rows["plain", "transfer", 40]["accuracy"] == 0
    assert rows["apt", "static", 40]["accuracy"] == 0
    for defense in ("plain", "ensemble", "apt", "tapt"):
        clean = rows[defense, CLEAN, 0]
        assert clean["n"] == 12
        assert clean["ms_a_picture"] > 0
        for threat in ("transfer", "static"):
            for epsilon in (2, 40):
                row = rows[defense, threat, epsilon]
                assert row["right"] <= clean["right"]
                assert "ensemble" in row["difference_from"] or defense == "ensemble"
                lost = sum(row["broken_first_by"].values())
                assert row["right"] + lost == clean["right"]  # each is broken once
    own = rows["apt", "static", 2]["difference_from"]["plain under its own attack"]
    right, plain = rows["apt", "static", 2]["right"], rows["plain", "transfer", 2]["right"]
    assert own["value"] == pytest.approx((right - plain) / 12)
    told = rows["ensemble", "transfer", 40]["suspicion"]
    assert told["clean"] == 12
    assert 0 <= told["true_positive_rate_at"]["0.01"]["value"] <= 1
    assert "suspicion" not in rows["ensemble", CLEAN, 0]
    assert "suspicion" not in rows["plain", "transfer", 40]  # a single look has no doubts
    assert "| `tapt` |" in out.with_suffix(".md").read_text()
    assert "<svg" in out.with_suffix(".svg").read_text()


def test_a_killed_run_goes_on_and_ends_in_the_same_table(
    directory: Path, folder: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(directory, folder, bundle, tmp_path / "whole.json") == 0
    whole = (tmp_path / "whole.jsonl").read_text().splitlines()
    add, calls = Journal.add, 0

    def kill(self: Journal, outcomes: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        add(self, outcomes)

    monkeypatch.setattr(Journal, "add", kill)
    assert run(directory, folder, bundle, tmp_path / "cut.json") == 130
    monkeypatch.setattr(Journal, "add", add)
    lines = tmp_path / "cut.jsonl"
    done = len(lines.read_text().splitlines())
    with lines.open("a") as file:
        file.write('{"key": "half a li')
    assert 0 < done < len(whole)
    # In other batches, too: a picture's draws are its own.
    assert run(directory, folder, bundle, tmp_path / "cut.json", "--batch", "3") == 0
    assert len(lines.read_text().splitlines()) == len(whole)  # nothing was done twice
    for one, other in zip(
        read(tmp_path / "cut.json")[0]["rows"],
        read(tmp_path / "whole.json")[0]["rows"],
        strict=True,
    ):
        for row in (one, other):
            del row["ms_a_picture"], row["attack_ms_a_picture"]
        assert one == other


def test_other_settings_reuse_nothing_and_more_pictures_reuse_all(
    directory: Path, folder: Path, bundle: Path, tmp_path: Path
) -> None:
    def lines(*more: str) -> int:
        flags = ["--defenses", "plain", "--eps", "2/255", *more]
        assert run(directory, folder, bundle, tmp_path / "out.json", *flags) == 0
        return len((tmp_path / "out.jsonl").read_text().splitlines())

    few = lines("--limit", "4")
    assert lines("--limit", "4") == few
    all_of_them = lines()
    assert few < all_of_them
    assert lines("--limit", "4") == all_of_them
    assert lines("--views", "3") == 2 * all_of_them


def test_only_right_clean_and_right_attacked_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out.jsonl", "key")
    clean, attacked = Cell("plain", CLEAN, 0), Cell("plain", "transfer", 2)

    def note(picture: str, cell: Cell, attack: str, right: bool) -> None:
        journal.add([Outcome(picture, cell, attack, right, 0.0, 1.0, 2.0)])

    for picture, right in (("a", True), ("b", False), ("c", True)):
        note(picture, clean, CLEAN, right)
    note("a", attacked, "pgd", True)
    note("b", attacked, "pgd", True)  # attacked into being right
    note("c", attacked, "pgd", True)
    note("c", attacked, "square", False)  # the worst attack counts
    rows = tally([clean, attacked], ["a", "b", "c"], journal)
    assert [row.right for row in rows] == [(True, False, True), (True, False, False)]
    assert rows[1].broken == {"square": 1}
    assert "33.3" in write_markdown(rows)
    again = Journal(tmp_path / "out.jsonl", "key")
    assert tally([clean, attacked], ["a", "b", "c"], again) == rows
    assert len(Journal(tmp_path / "out.jsonl", "another")) == 0


def test_a_random_defense_is_asked_several_times(
    directory: Path, folder: Path, bundle: Path, tmp_path: Path
) -> None:
    flags = "--defenses plain,ensemble --eps 8/255 --attacks pgd --answers 4 --threats transfer"
    assert run(directory, folder, bundle, tmp_path / "out.json", *flags.split()) == 0
    facts, rows = read(tmp_path / "out.json")
    assert facts["settings"]["answers"] == 4
    plain, mean = rows["plain", "transfer", 8], rows["ensemble", "transfer", 8]
    assert plain["answers"] == 1  # its answers do not differ
    assert mean["answers"] == 4
    assert mean["accuracy"] == pytest.approx(sum(mean["pictures"]) / 4 / 12)
    assert sum(read_shares(mean)) == mean["right"]
    assert read_shares({"pictures": "101"}) == [1, 0, 1]  # of a file from before
    assert mean["all_right"]["value"] == pytest.approx(mean["pictures"].count(4) / 12)
    assert mean["all_right"]["value"] < mean["accuracy"]  # some answers differ
    assert "transfer 8/255, all 4 |" in (tmp_path / "out.md").read_text()


def test_a_picture_is_attacked_until_no_answer_is_right(tmp_path: Path) -> None:
    """The worst attack on each image counts, by its share of right answers."""
    journal, cell = Journal(tmp_path / "out.jsonl", "key"), Cell("ensemble", "adaptive", 2)
    clean = Cell("ensemble", CLEAN, 0)
    for picture, rights in (("a", (10, 7, 9)), ("b", (10, 10, 10)), ("c", (8, 3, 0))):
        for where, attack, right in zip(
            (clean, cell, cell), (CLEAN, "pgd", "square"), rights, strict=True
        ):
            journal.add([Outcome(picture, where, attack, right, 0.1, 1.0, 1.0, asked=10)])
    unhurt, hurt = tally([clean, cell], ["a", "b", "c"], journal)
    assert hurt.right == (0.7, 1.0, 0.0)
    assert hurt.accuracy.value == pytest.approx(1.7 / 3)
    assert hurt.always.value == pytest.approx(1 / 3)
    assert unhurt.always.value == pytest.approx(2 / 3)
    assert hurt.broken == {"square": 1}
    again = Journal(tmp_path / "out.jsonl", "key")
    assert [row.right for row in tally([cell], ["a", "b", "c"], again)] == [hurt.right]


def test_the_recipe_is_a_list_of_attacks_with_settings_of_its_own() -> None:
    def protocol(*flags: str) -> trial.Protocol:
        words = ["--data", "x", "--json", "y", *flags]
        return options.read_protocol(options.parser().parse_args(words))

    quick, strong = protocol("--attacks", "pgd"), protocol("--attacks", "strong")
    assert (quick.budget.steps, quick.budget.queries, quick.answers) == (20, 500, 1)
    assert strong.attacks == list(RECIPE)
    assert (strong.budget.steps, strong.answers, strong.queried) == (STEPS, ANSWERS, QUERIED)
    own = protocol("--attacks", "strong", "--attack-steps", "7", "--answers", "3")
    assert (own.budget.steps, own.answers) == (7, 3)
    assert protocol("--attacks", "strong", "--queried", "0").queried == 0  # not the default
    # On one view the losses on mean logits and on the mean prediction are the same.
    assert strong.attacks_of("transfer") == ["logits-entropy", "dlr", "square", "rays"]
    assert strong.attacks_of("stealthy") == ["stealthy"]


def test_the_recipe_runs_on_whole_defenses(
    directory: Path, folder: Path, bundle: Path, tmp_path: Path
) -> None:
    flags = "--defenses ensemble,tapt --threats adaptive,stealthy --attacks strong --eps 1/255"
    flags += " --attack-steps 2 --queries 4 --queried 1 --answers 2 --limit 3"
    assert run(directory, folder, bundle, tmp_path / "out.json", *flags.split()) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    made = [(line["cell"]["threat"], line["attack"]) for line in lines]
    assert {attack for threat, attack in made if threat == "adaptive"} == set(RECIPE)
    by_queries = [line["picture"] for line in lines if line["attack"] in ("square", "rays")]
    assert len(set(by_queries)) == 1
    _, rows = read(tmp_path / "out.json")
    assert rows["ensemble", "stealthy", 1]["suspicion"]["attacked"] > 0
    assert rows["ensemble", "adaptive", 1]["right"] <= rows["ensemble", "stealthy", 1]["right"]


def test_the_attack_itself_is_checked(
    directory: Path, folder: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--check", "--defenses", "ensemble", "--threats", "adaptive", "--attacks", "pgd"]
    flags += ["--eps", "2/255", "--attack-steps", "20"]
    assert run(directory, folder, bundle, tmp_path / "out.json", *flags) == 0
    facts, _ = read(tmp_path / "out.json")
    (check,) = facts["checks"]
    assert check["left_right_at_a_large_epsilon"] == 0
    assert {row["threat"] for row in facts["rows"]} == {CLEAN, "adaptive"}
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {line["cell"]["threat"] for line in lines} >= {"doubled", "large"}
    # An attack that does nothing, so that checks must fail.
    monkeypatch.setitem(ATTACKS, "pgd", lambda model, pixels, *rest: pixels)
    assert run(directory, folder, bundle, tmp_path / "weak.json", *flags) == 0
    facts, _ = read(tmp_path / "weak.json")
    assert not facts["checks"][0]["passed"]
    assert "the attack does not work on this defense" in " ".join(facts["warnings"])


@pytest.mark.parametrize(
    ("attacks", "repeated", "spent"),
    [("square", "square", "queries"), ("square,pgd", "pgd", "steps"), ("rays", "rays", "queries")],
)
def test_the_check_repeats_what_more_can_change(
    directory: Path,
    folder: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attacks: str,
    repeated: str,
    spent: str,
) -> None:
    """An attack by queries takes no steps: twice as many would change nothing."""
    budgets = []

    def note(model: Any, pixels: Any, labels: Any, budget: Any, seeds: Any) -> Any:
        budgets.append(budget)
        return pixels

    for name in attacks.split(","):
        monkeypatch.setitem(ATTACKS, name, note)
    flags = ["--check", "--defenses", "plain", "--threats", "adaptive", "--attacks", attacks]
    flags += ["--eps", "2/255", "--limit", "1"]
    assert run(directory, folder, bundle, tmp_path / "out.json", *flags) == 0
    assert read(tmp_path / "out.json")[0]["checks"][0]["attack"] == repeated
    first, *_, doubled, _ = budgets
    assert doubled == replace(first, **{spent: 2 * getattr(first, spent)})


def test_twice_the_steps_must_not_break_many_more() -> None:
    assert Check("tapt", "pgd", 2, more=0.019, left=0).warnings() == []
    (sentence,) = Check("tapt", "pgd", 2, more=0.02, left=0).warnings()
    assert "twice the steps of pgd break 2.0 points more" in sentence
    (sentence,) = Check("tapt", "rays", 2, more=0.02, left=0).warnings()
    assert "twice the queries of rays" in sentence
    assert "--queries" in sentence


def test_checks_of_an_attack_count_in_no_row(tmp_path: Path) -> None:
    journal, cell = Journal(tmp_path / "out.jsonl", "key"), Cell("tapt", "adaptive", 2)
    journal.add([Outcome("a", cell, "pgd", 1, 0.0, 1.0, 1.0)])
    journal.add([Outcome("a", Cell("tapt", "doubled", 2), "pgd", 0, 0.0, 1.0, 1.0)])
    assert journal.right("a", cell) == 1
    assert journal.right("a", Cell("tapt", "doubled", 2)) == 0


def test_who_knows_more_can_do_what_others_can(tmp_path: Path) -> None:
    """And a larger epsilon holds the smaller; `static` alone stays as it is published."""
    journal = Journal(tmp_path / "out.jsonl", "key")
    cells = [
        Cell("tapt", threat, epsilon)
        for threat in ("transfer", "static", "adaptive")
        for epsilon in (1, 2)
    ]
    for picture, broken in (("a", cells[0]), ("b", cells[3]), ("c", None)):
        journal.add([Outcome(picture, Cell("tapt", CLEAN, 0), CLEAN, True, 0.0, 1.0, 0.0)])
        for cell in cells:
            journal.add([Outcome(picture, cell, "pgd", cell != broken, 0.0, 1.0, 1.0)])
    right = {cell: [journal.right(picture, cell) for picture in "abc"] for cell in cells}
    assert right[cells[0]] == right[cells[1]] == [False, True, True]  # transfer
    assert right[cells[2]] == [True, True, True]  # static at 1
    assert right[cells[3]] == [True, False, True]
    assert right[cells[4]] == [False, True, True]  # adaptive at 1
    assert right[cells[5]] == [False, False, True]
    rows = {row.cell: row for row in tally(cells, ["a", "b", "c"], journal)}
    assert rows[cells[5]].broken == {"pgd (transfer 1/255)": 1, "pgd (static 2/255)": 1}


def test_each_attacked_picture_is_suspected_once(tmp_path: Path) -> None:
    journal, cell = Journal(tmp_path / "out.jsonl", "key"), Cell("tapt", "adaptive", 2)
    for picture, right in (("a", True), ("b", False)):
        journal.add([Outcome(picture, Cell("tapt", CLEAN, 0), CLEAN, True, 0.2, 1.0, 0.0)])
        journal.add([Outcome(picture, cell, "pgd", right, 0.9, 1.0, 1.0)])
    journal.add([Outcome("a", cell, "square", True, 0.1, 1.0, 1.0)])  # it stood to the last
    (found,) = detect([cell], ["a", "b"], journal)
    assert (found.attacked, found.auroc) == (2, 0.5)


def test_an_attack_is_detected_by_its_own_images(tmp_path: Path) -> None:
    """An attacker who avoids suspicion is not found by what a weaker one, or a smaller epsilon, has
    broken before."""
    journal = Journal(tmp_path / "out.jsonl", "key")
    weaker, smaller = Cell("tapt", "transfer", 2), Cell("tapt", "adaptive", 1)
    cell = Cell("tapt", "adaptive", 2)
    for picture, where, suspicion in (("a", weaker, 0.9), ("b", smaller, 0.9), ("c", cell, 0.2)):
        journal.add([Outcome(picture, Cell("tapt", CLEAN, 0), CLEAN, 1, 0.2, 1.0, 0.0)])
        journal.add([Outcome(picture, where, "pgd", 0, suspicion, 1.0, 1.0)])
    (found,) = detect([cell], ["a", "b", "c"], journal)
    assert (found.attacked, found.auroc, found.found[1].value) == (1, 0.5, 0)


def test_suspicion_is_that_of_one_answer(
    directory: Path, folder: Path, bundle: Path, tmp_path: Path
) -> None:
    """The mean over several answers varies less than what a client sees."""

    def suspicions(*more: str) -> dict[str, float]:
        out = tmp_path / f"{len(more)}.json"
        flags = ["--defenses", "ensemble", "--threats", "clean", *more]
        assert run(directory, folder, bundle, out, *flags) == 0
        lines = map(json.loads, out.with_suffix(".jsonl").read_text().splitlines())
        return {line["picture"]: line["suspicion"] for line in lines}

    assert suspicions() == suspicions("--answers", "4")


def test_means_of_older_journals_are_not_taken_for_single_answers(tmp_path: Path) -> None:
    path, cells = tmp_path / "out.jsonl", [Cell("tapt", CLEAN, 0), Cell("tapt", "adaptive", 2)]

    def found(asked: int) -> list[Any]:
        with path.open("w") as file:
            for cell, attack, doubt in zip(cells, (CLEAN, "pgd"), (0.2, 0.9), strict=True):
                line = {"key": "key", "picture": "a", "cell": asdict(cell), "attack": attack}
                line |= {"right": asked, "doubt": doubt, "ms": 1.0, "attack_ms": 1.0}
                file.write(json.dumps({**line, "asked": asked}) + "\n")
        journal = Journal(path, "key")
        assert journal.right("a", cells[1]) == 1
        return detect(cells, ["a"], journal)

    (one,) = found(asked=1)
    assert one.auroc == 1
    assert found(asked=10) == []


def test_pictures_that_are_decided_are_left_alone(
    directory: Path, folder: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    pgd = ATTACKS["pgd"]

    def count(model: Any, pixels: Any, *rest: Any) -> Any:
        asked.append(len(pixels))
        return pgd(model, pixels, *rest)

    monkeypatch.setitem(ATTACKS, "pgd", count)
    flags = ["--defenses", "plain", "--threats", "transfer", "--eps", "40/255"]
    flags += ["--attacks", "pgd,apgd"]
    assert run(directory, folder, bundle, tmp_path / "out.json", *flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sum(asked) == 12
    assert {line["attack"] for line in lines} == {CLEAN, "pgd"}  # pgd breaks all, apgd none


def test_an_adaptive_row_counts_the_worse_way(
    directory: Path,
    folder: Path,
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = "--threats adaptive --attacks pgd,square --eps 2/255 --limit 4 --eot 2 --preflight 1"
    flags += " --defenses plain,tapt --steps 1 --learning-rate 1e-2"
    assert run(directory, folder, bundle, tmp_path / "out.json", *flags.split()) == 0
    facts, rows = read(tmp_path / "out.json")
    assert not [sentence for sentence in facts["warnings"] if "gradient is zero" in sentence]
    attacks = {
        line["attack"]
        for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
        if line["cell"]["defense"] == "tapt"
    }
    assert attacks >= {CLEAN, "pgd", "pgd unrolled"}
    row = rows["tapt", "adaptive", 2]
    assert row["right"] + sum(row["broken_first_by"].values()) == rows["tapt", CLEAN, 0]["right"]


@pytest.mark.parametrize(
    ("attacks", "warned"),
    [
        (("pgd", "square"), True),
        (("pgd", "rays"), True),
        (("pgd", "square", "rays"), True),  # as the recipe ends
        (("square", "rays"), False),  # no gradients to suspect
    ],
)
def test_a_row_that_queries_break_and_gradients_do_not_is_pointed_out(
    tmp_path: Path, attacks: tuple[str, ...], warned: bool
) -> None:
    journal, cell = Journal(tmp_path / "out.jsonl", "key"), Cell("tapt", "adaptive", 2)
    *others, last = attacks
    for number in range(12):
        name = str(number)
        journal.add([Outcome(name, Cell("tapt", CLEAN, 0), CLEAN, 1, 0.0, 1.0, 1.0)])
        # The first two are broken by PGD, if it is there, and left alone from then on.
        rights = {attack: int(attack != "pgd" or number > 1) for attack in others}
        if all(rights.values()):
            rights[last] = int(number > 5)
        journal.add(Outcome(name, cell, a, right, 0.0, 1.0, 1.0) for a, right in rights.items())
    found = list(trial.suspect([cell], [str(number) for number in range(12)], journal))
    assert len(found) == warned
    if warned:
        assert "queries break 4 of the 10 images that attacks by gradients leave" in found[0]


def test_what_queries_break_first_tells_nothing_about_later_gradients(tmp_path: Path) -> None:
    """An image that is broken is not attacked again, so gradients never had a try."""
    journal, cell = Journal(tmp_path / "out.jsonl", "key"), Cell("tapt", "adaptive", 2)
    for number in range(10):
        rights = {"square": int(number > 3)} | ({"pgd": 1} if number > 3 else {})
        for attack, right in rights.items():
            journal.add([Outcome(str(number), cell, attack, right, 0.0, 1.0, 1.0)])
    assert not list(trial.suspect([cell], [str(number) for number in range(10)], journal))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--defenses plain,nothing", "--defenses: unknown nothing"),
        ("--eps 1/510", "1/510 is not a whole number of levels"),
        ("--eps 1/255,0.01", "0.01 is not a whole number of levels"),  # 2.55 of them
        ("--eps 1/0", "1/0 is not a number"),
        ("--eps 2", "write 2/255"),
        ("--labels x", "--labels names 1 of the 3 classes"),
        ("--labels cat,dog", "--labels names 2 of the 3 classes"),
        ("--attacks quick", "--threats transfer: none of the attacks quick is made on"),
        ("--attacks quick,feature --threats static", "static: none of the attacks quick, feature"),
        ("--attacks square --queried 3", "only square would be made, and only on 3 images"),
        ("--attacks quick,rays --queried 0", "only rays would be made, and only on 0 images"),
        ("--data nowhere", "no data at nowhere"),
        ("--view-area 0.5", "--view-area: two shares"),
        ("--view-area 0.5,0.2", "--view-area: two shares"),
    ],
)
def test_mistakes_are_one_sentence(
    directory: Path,
    folder: Path,
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    sentence: str,
) -> None:
    assert run(directory, folder, bundle, tmp_path / "out.json", *flags.split()) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        "--attack-steps 0",
        "--queries 0",
        "--answers 0",
        "--restarts 0",
        "--eot 0",
        "--targets -1",
        "--queried -1",
        "--limit 0",
        "--batch 0",
        "--views 0",
        "--steps -1",
        "--preflight -1",
        "--seed -1",
        "--learning-rate 0",
        "--selection-ratio 0",
        "--alignment-weight -1",
        "--gamma 1.5",
    ],
)
def test_numbers_out_of_range_are_refused_at_once(
    flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--data", "x", "--json", "y", *flags.split()])
    assert f"argument {flags.split()[0]}:" in capsys.readouterr().err


def test_labels_that_lack_names_are_refused(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parquet may have labels without the names of their classes."""
    file = io.BytesIO()
    Image.fromarray(tiny.draw_image(0)).save(file, "PNG")
    images = [{"bytes": file.getvalue(), "path": None}] * 3
    pq.write_table(pa.table({"image": images, "label": [0, 1, 2]}), tmp_path / "data.parquet")
    flags = f"--model {directory} --data {tmp_path}/data.parquet --json {tmp_path}/out.json"
    quick = "--defenses plain --threats clean --labels"
    assert command.main([*flags.split(), *quick.split(), "cat,dog"]) == 1
    assert "--labels names 2 classes" in capsys.readouterr().err
    assert command.main([*flags.split(), *quick.split(), "cat,dog,lemon"]) == 0


def test_the_static_threat_needs_learned_prompts(
    directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--model {directory} --data {folder} --json {tmp_path / 'out.json'} --threats static"
    assert command.main(flags.split()) == 1
    assert "name a bundle" in capsys.readouterr().err


def test_wilson_against_known_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I.
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        assert wilson(hits, count).low == pytest.approx(low, abs=5e-5)
        assert wilson(hits, count).high == pytest.approx(high, abs=5e-5)
    assert wilson(0, 20).low == 0
    assert wilson(0, 20).high == pytest.approx(0.1611, abs=5e-5)
    assert wilson(20, 20).high == 1
    assert wilson(50, 100).low == pytest.approx(0.4038, abs=5e-5)


def test_paired_difference_against_known_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 2635: 36, 12, 2 and 0 pairs.
    first = [True] * 48 + [False] * 2
    second = [True] * 36 + [False] * 12 + [True] * 2
    found = difference(first, second)
    assert found.value == pytest.approx(0.2)
    assert found.low == pytest.approx(0.0569, abs=5e-5)
    assert found.high == pytest.approx(0.3404, abs=5e-5)
    back = difference(second, first)
    assert math.isclose(back.low, -found.high)
    with pytest.raises(ValueError, match="same images"):
        difference(first, second[:-1])


def test_paired_difference_of_shares_takes_an_image_as_the_unit() -> None:
    """Ten answers to an image are no ten images. Student's interval of 0.1, 0, 0.3 and 0.1."""
    first, second = [0.5, 0.7, 0.9, 1.0], [0.4, 0.7, 0.6, 0.9]
    found = difference(first, second)
    half = 3.18245 * 0.1258306 / 2  # quantile and deviation from tables, not from the code
    assert found.value == pytest.approx(0.125)
    assert found.low == pytest.approx(0.125 - half, abs=5e-4)
    assert found.high == pytest.approx(0.125 + half, abs=5e-4)
    # Where nothing differs the deviation is 0, which proves nothing.
    same = difference(first, first)
    assert same.value == 0
    assert same.high > 0.1


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(3, 3.18245), (5, 2.57058), (30, 2.04227), (209, 1.97139)]
)
def test_the_quantiles_of_student(freedom: int, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, rel=2e-3)


def test_a_counterattack_takes_its_own_steps(
    classifier: DefendedClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many the prompts take: its steps move pixels."""
    taken = []
    step = counterattack._step
    monkeypatch.setattr(counterattack, "_step", lambda *given: taken.append(1) or step(*given))
    monkeypatch.setattr(ttc, "PUBLISHED", replace(ttc.PUBLISHED, tau=1e9))  # nobody is spared
    protocol = trial.Protocol(["ttc"], [], [], [], trial.Budget(0), views=4, steps=5)
    trial.answers(classifier, NAMES, [tiny.draw_image(0)], "ttc", protocol, [0])
    assert len(taken) == 2


def test_the_attacked_pixels_are_the_models_own(classifier: DefendedClassifier) -> None:
    # A checkpoint may resize to more than it cuts; the attacked picture must not be cut again.
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert classifier.checkpoint.preprocessing.resized(32, 32) == (32, 32)
    view = make_views(image, 1, 0, classifier.checkpoint.preprocessing, tiny.CPU)[0]
    assert np.array_equal((view * 255).round().byte().permute(1, 2, 0).numpy(), image)


def test_a_data_sets_id_is_opened_where_the_package_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Split(list[dict[str, Any]]):
        features: ClassVar[dict[str, Any]] = {
            "img": None,
            "label": SimpleNamespace(names=["cat", "dog"]),
        }

        def cast_column(self, column: str, kind: bool) -> "Split":
            """With the files as they are stored: bytes, or a path."""
            assert (column, kind) == ("img", False)
            rows = Split()
            for place, row in enumerate(self):
                file = io.BytesIO()
                row["img"].save(file, "PNG")
                stored: dict[str, Any] = {"bytes": file.getvalue(), "path": None}
                if place % 2:
                    path = tmp_path / f"{place}.png"
                    path.write_bytes(file.getvalue())
                    stored = {"bytes": None, "path": str(path)}
                rows.append(row | {"img": stored})
            return rows

    def load_dataset(path: str, split: str) -> Split:
        if path == "owner/missing":
            raise FileNotFoundError("no such\ndata set")
        assert (path, split) == ("owner/pets", "train")
        return Split({"img": Image.new("L", (8, 8), k), "label": k % 2} for k in range(6))

    package = SimpleNamespace(load_dataset=load_dataset, Image=lambda decode: decode)
    monkeypatch.setitem(sys.modules, "datasets", package)
    data = open_anywhere("owner/pets:train")
    assert data.names == ["cat", "dog"]
    assert len(data) == 6
    found = list(data.examples(3, seed=1))
    assert [example.label for example in found] == [
        int(example.pixels[0, 0, 0]) % 2 for example in found
    ]
    assert found[0].pixels.shape == (8, 8, 3)
    with pytest.raises(DataError, match=r"owner/missing cannot be loaded as a data set: no such$"):
        open_anywhere("owner/missing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="package `datasets`"):
        open_anywhere("owner/pets")


def test_the_command_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli(["evaluate", "--help"])
    assert "--attack-steps" in capsys.readouterr().out


def test_scores_of_attacked_pictures_are_compared_with_clean_ones(tmp_path: Path) -> None:
    assert auroc([0.9, 0.8], [0.1, 0.2, 0.3]) == 1
    assert auroc([0.1, 0.5], [0.1, 0.5]) == 0.5
    assert auroc([0.2], [0.1, 0.2, 0.3, 0.4]) == pytest.approx(0.375)
    with pytest.raises(ValueError, match="some on both sides"):
        auroc([], [0.1])
    clean = [place / 100 for place in range(100)]
    assert sum(score > threshold(clean, 0.05) for score in clean) == 5
    assert threshold([0.3, 0.7], 0.01) == 0.7  # too few to spare one
    journal = Journal(tmp_path / "journal.jsonl", "key")
    unhurt, hurt = Cell("ensemble", CLEAN, 0), Cell("ensemble", "transfer", 2)
    for place in range(100):
        journal.add([Outcome(str(place), unhurt, CLEAN, True, place / 100, 1.0, 1.0)])
        journal.add([Outcome(str(place), hurt, "pgd", True, place / 100 + 0.905, 1.0, 1.0)])
    (found,) = detect([unhurt, hurt], [str(place) for place in range(100)], journal)
    assert found.attacked == found.clean == 100
    assert found.auroc == pytest.approx(1 - 0.5 * 0.1 * 0.1, abs=0.01)
    assert [share.value for share in found.found] == [0.92, 0.96]
    assert "| `ensemble` | transfer 2/255 | 1.00 |" in write_detection([found])


def test_a_tokenizer_can_be_named(
    directory: Path, folder: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Path(shutil.copytree(directory, tmp_path / "bare"))
    for file in bare.glob("*token*"):
        file.unlink()
    out, quick = tmp_path / "out.json", ("--defenses", "plain", "--threats", "clean")
    assert run(bare, folder, bundle, out, *quick) == 1
    assert "no tokenizer" in capsys.readouterr().err
    assert run(bare, folder, bundle, out, *quick, "--tokenizer", str(directory)) == 0


def test_runs_with_other_tokens_are_told_apart(classifier: DefendedClassifier) -> None:
    other = train_tokenizer(["a dog and a cat"], 600, 32)
    changed = DefendedClassifier(replace(classifier.checkpoint, tokenizer=other), classifier.bundle)
    protocol = trial.Protocol(["plain"], [], [], [], trial.Budget(0), views=1)
    one, two = (describe_settings(each, NAMES, protocol) for each in (classifier, changed))
    assert one.pop("tokens_sha256") != two.pop("tokens_sha256")
    assert one == two
