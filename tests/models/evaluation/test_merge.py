"""Shards of an evaluation make the same table as one run; others are refused in a sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from models.evaluation import command
from service.cli import main as cli
from tests import tiny

NAMES = ("cat", "dog", "lemon")
TIMES = ("ms_a_picture", "attack_ms_a_picture")
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of an evaluation of eight images, without --shard and --json."""
    root = tmp_path_factory.mktemp("evaluation")
    checkpoint = tiny.load(tiny.save_checkpoint(root / "clip"))
    tiny.make_bundle(checkpoint).save(root / "bundle")
    for number in range(8):
        folder = root / "images" / NAMES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tiny.draw_image(number)).save(folder / f"{number}.png")
    given = f"--model {root}/clip --data {root}/images --bundle {root}/bundle --views 4 --batch 2 \
        --limit 7 --labels {','.join(NAMES)} --defenses plain,ensemble,tapt --answers 2 --check \
        --threats clean,transfer,adaptive --attacks pgd,square --eps 2/255 --attack-steps 2 \
        --queries 4 --queried 3"
    return given.split()


@pytest.fixture(scope="module")
def shards(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    for index in range(3):
        out = ["--shard", f"{index}/3", "--json", str(directory / f"{index}.json")]
        assert command.main([*flags, *out]) == 0
    return directory


def merge(*arguments: Path | str) -> int:
    return command.main(["--merge", *map(str, arguments)])


def without_times(facts: dict[str, Any]) -> dict[str, Any]:
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in facts["rows"]]
    return {**facts, "rows": rows, "command": "", "machine": {}}


def test_the_shards_make_the_table_of_one_run(
    flags: list[str], shards: Path, tmp_path: Path
) -> None:
    assert command.main([*flags, "--json", str(tmp_path / "whole.json")]) == 0
    assert merge(shards, "--json", tmp_path / "merged.json") == 0
    whole, merged = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "merged"))
    assert merged.pop("merged") == 3
    assert without_times(merged) == without_times(whole)
    assert merged["data"]["n"] == 7
    assert "--shard I/3" in merged["command"]
    assert str(shards) not in json.dumps(merged)
    before = (tmp_path / "merged.jsonl").read_bytes()
    assert command.main([*flags, "--json", str(tmp_path / "merged.json")]) == 0
    assert (tmp_path / "merged.jsonl").read_bytes() == before  # nothing was left to do


def test_variables_for_other_runs_do_no_harm(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAPT_MODEL", "elsewhere")
    monkeypatch.setenv("TAPT_TOKENIZER", "elsewhere")
    assert cli(["evaluate", "--merge", str(shards), "--json", str(tmp_path / "out.json")]) == 0


def edit(file: Path, change: Change) -> None:
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))


CHANGES: dict[str, tuple[Change, str]] = {
    "settings": (lambda f: f.update(key="0"), "different settings"),
    "data": (lambda f: f["data"].update(name="others"), "different data"),
    "more data": (lambda f: f["data"].update(images=9), "different data"),
    "limit": (lambda f: f.update(limit=8), "different --limit"),
    "attacks": (lambda f: f.update(attacks=["pgd"]), "different attacks"),
    "check": (lambda f: f.update(checked=False), "different --check"),
    "rows": (lambda f: f["rows"].pop(), "different rows"),
    "number": (lambda f: f["shard"].update(of=4), "different numbers of shards"),
    "twice": (lambda f: f["shard"].update(index=0), "are both shard 0"),
    "no shard": (lambda f: f.pop("shard"), "not the file of a shard"),
    "no warnings": (lambda f: f.pop("warned"), "not the file of a shard"),
    "beyond": (lambda f: f["shard"].update(index=3), "not the file of a shard"),
    "no images": (lambda f: f.update(pictures=[]), "not the file of a shard"),
}


@pytest.mark.parametrize(("change", "sentence"), CHANGES.values(), ids=CHANGES)
def test_what_is_no_set_of_shards_is_refused(
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Change,
    sentence: str,
) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    edit(tmp_path / "shards" / "1.json", change)
    assert merge(tmp_path / "shards", "--json", tmp_path / "out.json") == 1
    told = capsys.readouterr().err.strip()
    assert sentence in told
    assert "\n" not in told
    assert not (tmp_path / "out.json").exists()


def test_missing_shards_are_named(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(shards / "1.json", "--json", tmp_path / "out.json") == 1
    assert "of 3 shards, these are missing: 0, 2" in capsys.readouterr().err
    assert merge(tmp_path, "--json", tmp_path / "out.json") == 1
    assert "there are no shards in" in capsys.readouterr().err
    assert merge(tmp_path / "nowhere", "--json", tmp_path / "out.json") == 1
    assert "there are no shards at" in capsys.readouterr().err


def test_a_shard_without_outcomes_and_one_to_overwrite_are_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    assert merge(tmp_path / "shards", "--json", tmp_path / "shards" / "0.json") == 1
    assert "is one of the shards" in capsys.readouterr().err
    (tmp_path / "shards" / "2.jsonl").unlink()
    assert merge(tmp_path / "shards", "--json", tmp_path / "out.json") == 1
    assert "has no outcomes beside it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("--data x --shard 2/2", "2/2 is not I/N"),
        ("--data x --shard 1", "1 is not I/N"),
        ("--merge x --data y", "not allowed with argument"),
        ("--merge x --views 4", "not --views"),
        ("--merge x --shard 1/2", "not --shard"),
        ("--limit 3", "one of the arguments --data --merge is required"),
    ],
)
def test_options_that_do_not_go_together(
    given: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main([*given.split(), "--json", "out.json"])
    assert sentence in capsys.readouterr().err
