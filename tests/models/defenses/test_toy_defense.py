"""A new defense is one new file: everything that lists, runs or attacks defenses finds it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from tests import tiny

ROOT = Path(__file__).parents[3]
CHROMIUM = shutil.which("chromium")
NAMES = ("cat", "dog")
DESCRIPTION = "CLIP's prediction for the mirrored image."
TOY = f'''
from models.defenses.catalog import DefenseSpec
from models.defenses.defense import average_views

SPEC = DefenseSpec(
    name="toy-mirror", description="{DESCRIPTION}", prompts="none", views="one", adapts=False
)


def defend(clip, inputs):
    yield average_views(clip, inputs.views[:, :1].flip(-1), inputs.plain)
'''


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two packages, copied without the embedded weights, and the toy's file among them."""
    tree = tmp_path_factory.mktemp("tree")
    for package in ("service", "models"):
        ignored = shutil.ignore_patterns("*.safetensors", "__pycache__")
        shutil.copytree(ROOT / package, tree / package, ignore=ignored)
    (tree / "models" / "defenses" / "toy_mirror.py").write_text(TOY)
    directory = tiny.save_checkpoint(tree / "clip")
    tiny.make_bundle(tiny.load(directory)).save(directory / "bundle")
    for name in NAMES:  # one image in both classes, so that it is right in one of them
        (tree / "data" / name).mkdir(parents=True)
        Image.fromarray(tiny.draw_image(0)).save(tree / "data" / name / "0.png")
    return tree


def environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200"}


def tapt_serve(tree: Path, arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", *arguments.split()],
        cwd=tree,
        env=environment(tree),
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def url(tree: Path) -> Iterator[str]:
    """A server whose default method is the toy."""
    flags = "serve --port 0 --model clip --method toy-mirror --views 4"
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", *flags.split()],
        cwd=tree,
        env=environment(tree),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, "the server did not start"
        yield found.group()
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def test_the_commands_offer_it(tree: Path) -> None:
    assert "toy-mirror" in tapt_serve(tree, "serve --help")
    assert "toy-mirror" in tapt_serve(tree, "evaluate --help")


def test_a_server_lists_it_and_answers_with_it(tree: Path, url: str) -> None:
    info = httpx.get(f"{url}/info").json()
    assert info["defenses"][-1] == "toy-mirror"
    assert info["methods"]["toy-mirror"] == {
        "description": DESCRIPTION,
        "prompts": "none",
        "views": "one",
        "adapts": False,
        "readout": None,
        "steps": None,
        "needs_bundle": False,
    }
    schema = json.dumps(httpx.get(f"{url}/openapi.json").json())
    assert '"toy-mirror"' in schema
    with (tree / "data" / "cat" / "0.png").open("rb") as image:
        answer = httpx.post(
            f"{url}/v1/classify",
            files={"image": image},
            data={"labels": ",".join(NAMES)},
            timeout=60,
        ).json()
    assert answer["defense"]["method"] == "toy-mirror"
    assert answer["defense"]["steps"] == 0
    assert sum(scored["score"] for scored in answer["labels"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
def test_the_page_offers_it(url: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        option = page.locator("#method option[value=toy-mirror]")
        expect(option).to_have_text(f"toy-mirror: {DESCRIPTION}", timeout=60_000)
        browser.close()


def test_it_is_evaluated_and_attacked_adaptively(tree: Path) -> None:
    tapt_serve(
        tree,
        "evaluate --model clip --data data --json out.json --defenses plain,toy-mirror"
        " --threats clean,adaptive --attacks pgd --eps 8/255 --attack-steps 2 --views 4",
    )
    rows = json.loads((tree / "out.json").read_text())["rows"]
    found = {row["threat"]: row for row in rows if row["defense"] == "toy-mirror"}
    assert found.keys() == {"clean", "adaptive"}
    assert found["clean"]["right"] == 1
    outcomes = [json.loads(line) for line in (tree / "out.jsonl").read_text().splitlines()]
    attacked = [o for o in outcomes if o["cell"]["defense"] == "toy-mirror" and o["attack_ms"]]
    assert {(o["cell"]["threat"], o["attack"]) for o in attacked} == {("adaptive", "pgd")}
