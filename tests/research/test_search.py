"""The search for a default is bounded, and its configurations are what they say."""

import pytest

from models.evaluation.options import parser
from research.search import BASELINE, DOCS, MOST, configurations, render_table


def test_configurations_are_bounded_distinct_and_understood() -> None:
    found = list(configurations())
    assert len(found) <= MOST
    assert len({(c.defense, c.bundle, *sorted(c.flags.split())) for c in found}) == len(found)
    assert len({c.name for c in found}) == len(found)
    for configuration in found:
        parser().parse_args(["--data", "D", "--json", "J", *configuration.flags.split()])


RUN = {"data": {"n": 100, "name": "x.parquet"}, "attack": {"steps": 10}}


def test_the_table_names_its_threats_pairs_with_the_baseline_and_leaves_gaps_open() -> None:
    row = {"threat": "clean", "accuracy": 0.5, "interval": [0.4, 0.6], "ms_a_picture": 7.2}
    clean = {**row, "pictures": "1" * 50 + "0" * 50}
    hurt = {**clean, "threat": "transfer", "accuracy": 0.25, "pictures": "1" * 25 + "0" * 75}
    better = {**clean, "pictures": "1" * 60 + "0" * 40}
    text = render_table({"run": RUN, "rows": {BASELINE: [clean, hurt], "b": [better]}})
    assert "| configuration | clean | transfer 2/255 | clean, against the first row |" in text
    assert f"| {BASELINE} | 50.0 (40.0 to 60.0) | 25.0 (40.0 to 60.0) | +0.0 (" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| b |"))
    assert "|  | +10.0 (" in line
    assert line.endswith(" |  | 7 |")


@pytest.mark.parametrize(
    "part",
    ["robustness", "adaptive", "search", "static", "static-random", "static-apgd", "reset"],
)
def test_the_page_has_a_place_for_what_hours_of_measuring_write(part: str) -> None:
    page = (DOCS / "robustness.md").read_text()
    assert f"<!-- {part} -->\n" in page
    assert f"<!-- /{part} -->" in page
