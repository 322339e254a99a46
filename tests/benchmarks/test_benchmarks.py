"""The benchmarks measure what they say: both sides give one answer, and cutting changes none."""

import argparse
import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from benchmarks import adaptation, capacity, readme, robustness, sides
from benchmarks.harness.load import drive, percentile, poisson, summarize
from benchmarks.harness.report import ROOT
from benchmarks.harness.requests import draw_requests
from benchmarks.isolated import serve_instantly
from benchmarks.sides import Bench, Case
from models.prompts import DefensePrompts
from models.shipped import SHIPPED
from research import reset

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
    assert whole.extra == 0
    assert cut.extra > 0.1 * cut.stages["text: forward"]


def test_emulated_bfloat16_does_not_replace_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[argparse.Namespace] = []

    def measure(options: argparse.Namespace) -> NoReturn:
        measured.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(adaptation, "measure", measure)
    monkeypatch.setattr(adaptation, "has_native_bfloat16", lambda: False)
    flags = ["adaptation", "--dtype", "bf16", "--labels", "10", "--section", "vit-b-32 bf16"]
    monkeypatch.setattr("sys.argv", flags)
    assert adaptation.main() == 0
    assert not measured
    monkeypatch.setattr("sys.argv", flags[:-2])  # to look at, not to publish
    with pytest.raises(KeyboardInterrupt):
        adaptation.main()
    monkeypatch.setattr("sys.argv", flags)
    monkeypatch.setattr(adaptation, "has_native_bfloat16", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        adaptation.main()
    assert len(measured) == 2


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
    two, three = (adaptation.operations_ratio(row) for row in figures["rows"])
    assert 1 < two < three  # the published shape encodes every label's text anew


def test_one_minimum_is_asked_for_each_label_count() -> None:
    with pytest.raises(SystemExit):
        adaptation.parse(["--labels", "1", "2", "3", "--min-ratio", "1", "2"])


def test_labels_are_all_different() -> None:
    assert len(set(sides.draw_names(1500))) == 1500


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1)] == [
        50,
        95,
        99,
        100,
    ]
    assert percentile([3.0], 0.99) == 3.0


def test_the_simulation_serves_one_at_a_time_as_a_queue_does() -> None:
    """M/D/1 at half load: the mean wait is half a service time (Pollaczek and Khinchine)."""
    one = capacity.Replica({1: 1.0}, max_batch=1, max_delay=0.0)
    latencies = capacity.simulate(one, 1, poisson(0.5, 40_000, 1))
    assert sum(latencies) / len(latencies) - 1 == pytest.approx(0.5, rel=0.1)


def test_the_simulation_batches_as_the_scheduler_does() -> None:
    one = capacity.Replica({1: 1.0, 4: 2.0}, max_batch=4, max_delay=0.5)
    assert one.time(2) == pytest.approx(4 / 3)
    assert one.time(8) == pytest.approx(4.0)  # beyond what was measured, in proportion
    assert capacity.simulate(one, 1, [0.0]) == [1.5]  # waits for company in vain
    assert capacity.simulate(one, 1, [0.0] * 4) == [2.0] * 4  # full at once
    assert sorted(capacity.simulate(one, 2, [0.0, 0.0])) == [1.5, 1.5]  # each its own


def test_a_plan_meets_its_target_with_no_replica_too_many() -> None:
    one = capacity.Replica({1: 0.1, 8: 0.4}, max_batch=8, max_delay=0.005)
    replicas, found = capacity.plan_replicas(one, 50, 0.5) or (0, 0.0)
    assert found <= 0.5 < capacity.p99(one, replicas - 1, 50)
    fleet, found = capacity.plan_replicas(one, 5_000, 0.5) or (0, 0.0)
    assert found <= 0.5
    assert fleet % capacity.CELL == 0
    assert fleet >= 5_000 / one.throughput
    assert capacity.plan_replicas(one, 50, 0.05) is None


def test_requests_are_whole_and_the_instant_worker_answers_them() -> None:
    with serve_instantly() as server:
        before = server.cpu_seconds()
        records = asyncio.run(drive(server.url, [0.0, 0.01, 0.02], draw_requests(2)))
        assert server.cpu_seconds() >= before
        assert server.decoder_cpu_seconds() > 0
    found = summarize(records)
    assert (found["answered"], found["refused"], found["failed"]) == (3, 0, 0)
    assert 0 < found["p50"] <= found["p99"]


def test_agreement_compares_two_precisions() -> None:
    gpu = ["--device", "cuda", "--dtype", "bf16", "--agreement", "8"]
    with pytest.raises(SystemExit):
        adaptation.parse(gpu)
    assert adaptation.parse([*gpu, "--published-dtype", "fp32"]).agreement == 8


def test_pages_have_the_sections_that_the_commands_write() -> None:
    pages = adaptation.PAGE.read_text(), capacity.PAGE.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for section in ("vit-b-32 fp32", "vit-b-32 bf16", "embedded", "gpu", "service"):
        assert f"<!-- {section} -->" in pages[0]
        assert section in makefile
    assert "<!-- capacity -->" in pages[1]


def test_at_half_load_batches_that_gain_nothing_do_not_help_the_tail() -> None:
    constant = capacity.one_by_one(workers=1)
    assert constant == pytest.approx(4.3, abs=0.2)  # M/D/1 at 0.5, by its known tail
    gainless = capacity.Replica({1: 1.0, 16: 16.0}, max_batch=16, max_delay=0.0)
    assert capacity.half_load(gainless) > constant
    gaining = capacity.Replica({1: 1.0, 16: 2.0}, max_batch=16, max_delay=0.0)
    assert capacity.half_load(gaining) < constant


def test_more_workers_shorten_the_tail_of_what_goes_one_by_one() -> None:
    alone = capacity.p99(capacity.Replica({1: 1.0}, max_batch=1, max_delay=0.0), 1, 0.5)
    assert capacity.one_by_one(workers=1) == pytest.approx(alone)  # the same queue, told twice
    assert capacity.one_by_one(1) > capacity.one_by_one(2) > capacity.one_by_one(64) >= 1


def test_the_reset_mistake_forgets_all_but_the_first_layer() -> None:
    learned = DefensePrompts("v", {"vision": torch.ones(1, 3, 2, 4)})
    forgot = reset.forget_deep(learned).tensors["vision"]
    assert bool((forgot[:, 0] == 1).all())
    assert forgot.shape == (1, 3, 2, 4)
    assert float(forgot[:, 1:].abs().max()) < 0.2


def test_the_reset_mistake_is_measured_on_the_model_that_its_bundle_belongs_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(options: argparse.Namespace) -> NoReturn:
        raise SystemExit(options.model)

    monkeypatch.setattr("models.evaluation.command.load", load)
    monkeypatch.setattr(sys, "argv", ["reset", "--data", "data", "--bundle", "bundle"])
    with pytest.raises(SystemExit, match=r"^embedded$"):
        reset.main()


def figures_of(defense: str, right: str, pictures: list[str]) -> dict[str, Any]:
    row = {"defense": defense, "threat": "clean", "epsilon": 0.0, "pictures": right}
    return {"pictures": pictures, "rows": [row], "settings": {"defense": {"views": 4}}}


def test_the_headline_names_both_models() -> None:
    runs = [json.loads((readme.FIGURES / f"{n}.json").read_text()) for n in ("strong", "adaptive")]
    text = readme.headline(*runs)
    assert [f"`{run['checkpoint']}`" in text for run in runs] == [True, True]
    assert readme.headline(runs[0], None) in text


def test_the_headline_says_what_a_repeated_question_leaves_and_which_bundle_it_is_of() -> None:
    def run(bundle: str, every: float) -> dict[str, Any]:
        rows = [
            {"defense": defense, "threat": threat, "epsilon": 2.0, "accuracy": share}
            for defense, threat, share in (
                ("tapt", "clean", 0.5),
                ("tapt", "adaptive", 0.33),
                ("plain", "clean", 0.47),
                ("plain", "adaptive", 0.22),
            )
        ]
        rows[1] |= {"answers": 10, "all_right": {"value": every}}
        return {
            "rows": rows,
            "checkpoint": "embedded",
            "data": {"n": 210},
            "settings": {"bundle": {"prompts_sha256": bundle}},
        }

    shipped = json.loads((SHIPPED["embedded"] / "bundle" / "bundle.json").read_text())
    text = readme.headline(run(shipped["prompts_sha256"], 0.21), None)
    assert text == (
        "Top-1 accuracy of `embedded` on 210 images when the attacker knows the defense and may "
        "change each pixel by 2/255: 33% (50% without an attack); without the defense 22% (47%). "
        "An attacker who may ask 10 times gets it down to 21%, no more than without the defense."
    )
    text = readme.headline(run("another", 0.3), None)
    assert "down to 30%. This was measured with another bundle than the one that ships." in text


def test_a_table_says_how_many_images_queries_were_made_on() -> None:
    """Not the first 40, but those of them that the gradient attacks left."""
    figures = json.loads((readme.FIGURES / "strong.json").read_text())
    row = {"defense": "tapt", "threat": "adaptive", "epsilon": 2.0, "answers": 10, "accuracy": 0.1}
    row |= {"interval": (0, 1), "all_right": {"value": 0.1, "interval": (0, 1)}}
    row |= {"pictures": [10, 0, 3, 0, 9], "broken_first_by": {"pgd": 1, "square": 1}}
    told = robustness.accuracy_table({**figures, "rows": [row], "queried": 4})
    assert "on the first 4 images that are still right (3 for `tapt` under `adaptive`)" in told


def test_a_table_names_the_attacks_that_were_made() -> None:
    """On a single view, as without the adaptive threat, a part of the recipe."""
    figures = json.loads((readme.FIGURES / "strong.json").read_text())
    unaware = [row for row in figures["rows"] if row["threat"] != "adaptive"]
    assert "Attacks: quick, prediction-margin, " in robustness.accuracy_table(figures)
    told = robustness.accuracy_table({**figures, "rows": unaware})
    assert "Attacks: logits-entropy, dlr, square, rays with" in told


def test_a_table_of_shards_names_no_times() -> None:
    """They may have shared a machine."""
    figures = json.loads((readme.FIGURES / "adaptive.json").read_text())
    whole, merged = (
        robustness.accuracy_table(figures),
        robustness.accuracy_table(figures | {"merged": 4}),
    )
    assert "ms per image" in whole
    assert "Time is measured" in whole
    assert "ms per image" not in merged
    assert "Time is measured" not in merged
    assert whole.count("`tapt`") == merged.count("`tapt`")


def test_runs_are_compared_on_the_same_pictures_and_on_no_others() -> None:
    names = [str(number) for number in range(100)]
    base = figures_of("ensemble", "1" * 40 + "0" * 60, names)
    table = robustness.paired_table(base, figures_of("tapt", "1" * 50 + "0" * 50, names))
    assert "| `tapt` | clean | 50 | +10.0 (" in table
    assert "points above `ensemble` of this run, 4 views" in table
    more = ["another", *names[::-1]]  # the first 50 names are its last
    table = robustness.paired_table(base, figures_of("tapt", "0" * 51 + "1" * 50, more))
    assert "accuracy on the same 100 images" in table
    assert "| `tapt` | clean | 50 | +10.0 (" in table
    with pytest.raises(SystemExit):
        robustness.paired_table(base, figures_of("tapt", "1" * 2, ["another", "third"]))


@pytest.mark.parametrize("into", [None, "small"])
def test_a_trial_does_not_replace_published_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, into: str | None
) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(readme, "ROBUSTNESS" if into else "README", page)
    monkeypatch.setattr(
        readme, "accuracy_table", lambda figures, short=False: caption(figures["data"])
    )
    monkeypatch.setattr(readme, "differences_table", lambda figures: "")
    monkeypatch.setattr(readme, "headline", lambda figures, others: "news")
    name = into or "table"

    def caption(data: dict[str, Any]) -> str:
        return f"on the same {data['n']} images of `{data['name']}` and more"

    def write(count: int, data: str, *more: str) -> str:
        page.write_text(
            f"<!-- headline -->\nold\n<!-- /headline -->\n<!-- {name} -->\n"
            f"{caption({'n': 500, 'name': 'val.parquet'})}\n<!-- /{name} -->\n"
        )
        table = tmp_path / "out.json"
        table.write_text(json.dumps({"data": {"n": count, "name": data}}))
        readme.main(["--table", str(table), *(["--into", into] if into else []), *more])
        return page.read_text()

    for count, data in ((20, "val.parquet"), (500, "mine"), (900, "mine")):
        with pytest.raises(SystemExit, match=f"{count} images of {data}. Add --force"):
            write(count, data)
        assert "same 500 images" in page.read_text()
        assert f"same {count} images of `{data}`" in write(count, data, "--force")
    assert "same 900 images" in write(900, "val.parquet")
