"""The benchmarks measure what they say: both sides give one answer, and cutting changes none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import adaptation, sides
from benchmarks.sides import Bench, Case

CASE = Case("embedded", "cpu", "fp32", labels=4, batch=2, views=20, steps=1)


def test_the_two_sides_give_one_answer_run_after_run() -> None:
    ours, theirs = Bench("ours", CASE), Bench("published", CASE)
    flops = [bench.prepare(CASE)[0] for bench in (theirs, ours)]
    assert flops[0] > CASE.labels * 10**6
    for _ in range(2):  # nothing adapted stays behind
        mine, other = ours.run(), theirs.run()
        assert len(mine.scores) == 2
        assert mine.scores[0] == pytest.approx(other.scores[0], abs=1e-4)
    assert sum(mine.stages.values()) == pytest.approx(mine.seconds)
    assert mine.stages["image: first look, all views"] > 0


def test_the_published_shape_in_chunks_is_the_published_shape() -> None:
    theirs = Bench("published", CASE)
    theirs.prepare(CASE)
    whole = theirs.run()
    theirs.prepare(replace(CASE, chunk=2))
    cut = theirs.run()
    assert cut.scores[0] == pytest.approx(whole.scores[0], abs=1e-5)
    assert (whole.extra, cut.extra > 0) == (0.0, True)


def test_a_run_writes_its_figures_and_fails_below_the_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Here:
        """A side in this process."""

        def __init__(self, name: str, case: Case) -> None:
            self.bench = Bench(name, case)

        def __enter__(self) -> "Here":
            return self

        def __exit__(self, *_: object) -> None: ...

        def call(self, method: str, *arguments: object) -> object:
            return getattr(self.bench, method)(*arguments)

    monkeypatch.setattr(adaptation, "Side", Here)
    monkeypatch.setattr(Bench, "ceiling", lambda self, dtype: 1e12)
    out = tmp_path / "adaptation.json"
    flags = "--size embedded --labels 2 3 --views 10 --repeats 1 --min-ratio 0 1e9 --json"
    monkeypatch.setattr("sys.argv", ["adaptation", *flags.split(), str(out)])
    assert adaptation.main() == 1
    figures = json.loads(out.read_text())
    assert [row["labels"] for row in figures["rows"]] == [2, 3]
    assert figures["rows"][0]["ours"]["peak_bytes"] > 0
    assert "| labels | batch |" in out.with_suffix(".md").read_text()
    assert adaptation.fall_short(figures["rows"], [2, 3], [0.0]) == []


def test_one_minimum_is_asked_for_each_label_count() -> None:
    with pytest.raises(SystemExit):
        adaptation.parse(["--labels", "1", "2", "3", "--min-ratio", "1", "2"])


def test_labels_are_all_different() -> None:
    assert len(set(sides.draw_names(1500))) == 1500
