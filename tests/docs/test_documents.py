"""The documents' links resolve, their commands exist, and their examples run."""

import ast
import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme, robustness
from service import cli
from service.settings import CLIENT_KEY, PREFIX, Settings

CLIENT = CLIENT_KEY.removeprefix(PREFIX).lower()

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "models/*/*.md")
    for page in ROOT.glob(pattern)
    if page.name != "CHANGELOG.md"  # tells of commands that are gone
)
OURS = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"k8s"}
PATHS = re.compile(
    r"(?:service|models|benchmarks|research|tests|docker|docs|k8s|examples)/[\w./-]+"
)
MADE_BY_USERS = {"docker/.env", "docker/knobs.env", "docker/models"}
SEPARATORS = {"&&", "||", "|", ";", "do", "done", "&", ">", ">>"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_links_and_anchors_resolve(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


@each_page
def test_commands_paths_and_settings_exist(page: Path) -> None:
    assert unknown_names(page.read_text()) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](missing.md)", "missing.md"),
        ("![a](docs/figures/missing.svg)", "docs/figures/missing.svg"),
        ("# Here\n[a](#there)", "#there"),
        ("[a](README.md#no-such-heading)", "README.md#no-such-heading"),
        ("```\n# Here\n```\n[a](#here)", "#here"),
    ],
)
def test_a_broken_link_is_found(text: str, problem: str) -> None:
    assert broken_links(ROOT / "page.md", text) == [problem]


@pytest.mark.parametrize(
    "text",
    ["# A `b`, c: d\n[a](#a-b-c-d)", "[a](README.md#run-it)", "[a](https://example.org/x#y)"],
)
def test_a_sound_link_passes(text: str) -> None:
    assert broken_links(ROOT / "page.md", text) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`make nothing`", "make target nothing"),
        ("`make image TARGT=cpu`", "make variable TARGT"),
        ("```\nmake setup && make nothing\n```", "make target nothing"),
        ("`python -m benchmarks.nothing`", "module benchmarks.nothing"),
        ("`python -m nothing_at_all`", "module nothing_at_all"),
        ("`python -m benchmarks.load --nothing 1`", "benchmarks.load --nothing"),
        ("`python -m benchmarks.load -- --nothing 1`", "tapt-serve serve --nothing"),
        ("`tapt-serve nothing`", "tapt-serve nothing"),
        ("`tapt-serve classify a.png --nothing`", "tapt-serve classify --nothing"),
        ("```\nX=1 tapt-serve serve \\\n    --nothing\n```", "tapt-serve serve --nothing"),
        ("`.venv/bin/tapt-serve evaluate --nothing`", "tapt-serve evaluate --nothing"),
        ("`docker run --rm tapt-serve:cpu key --nothing`", "tapt-serve key --nothing"),
        ("`pytest tests/nothing.py`", "tests/nothing.py"),
        ("`pytest tests/docs/test_documents.py -k no_such_name`", "-k no_such_name"),
        ("`pytest tests/docs/test_documents.py -k 'links or no_such_name'`", "-k no_such_name"),
        ("`docker compose -f docker/nothing.yaml up`", "docker/nothing.yaml"),
        ("`kubectl apply -k k8s/overlays/nothing`", "k8s/overlays/nothing"),
        ("`docs/nothing.md` says so", "docs/nothing.md"),
        ("set `TAPT_NOTHING=1`", "TAPT_NOTHING"),
    ],
)
def test_an_unknown_name_is_found(text: str, problem: str) -> None:
    assert problem in unknown_names(text)


@pytest.mark.parametrize(
    "text",
    [
        "`make image TARGET=cuda`, then `make\nserve`",
        "`python -m benchmarks.load --seconds 60 -- --workers 2`",
        "```\nX=1 tapt-serve calibrate --data d \\\n    --out o  # --comment\n```",
        "`tapt-serve COMMAND`",
        "`pytest tests/docs/test_documents.py -k 'links and anchors'`",
        "`docker run --entrypoint hf tapt-serve:cpu download x`",
        "`docker/.env` and `tests/docs/test_documents.py`",
    ],
)
def test_a_known_name_passes(text: str) -> None:
    assert unknown_names(text) == []


def test_curl_examples_get_an_answer(server: Any, photo: bytes, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed, so the documents' examples were not run")
    (tmp_path / "coffee.png").write_bytes(photo)
    examples = [
        command.replace("http://127.0.0.1:8000", server.url)
        for page in PAGES
        for command in fenced_commands(page.read_text())
        if command.startswith("curl ") and "http://127.0.0.1:8000" in command
    ]
    assert examples
    for example in examples:
        done = subprocess.run(
            shlex.split(example), capture_output=True, text=True, cwd=tmp_path, timeout=60
        )
        assert "labels" in json.loads(done.stdout), example


def test_the_hugging_face_example_gets_an_answer(
    server: Any, photo: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "coffee.png").write_bytes(photo)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    *statements, call = code.replace("http://127.0.0.1:8000", server.url).strip().splitlines()
    names: dict[str, object] = {}
    exec("\n".join(statements), names)
    assert len(eval(call, names)) == 3


@pytest.mark.parametrize("name", sorted(readme.WHOLE))
def test_published_tables_are_what_the_command_writes(name: str) -> None:
    figures = json.loads((ROOT / f"docs/figures/{name}.json").read_text())
    page = (ROOT / "docs/robustness.md").read_text()
    for part in (
        robustness.accuracy_table(figures),
        robustness.differences_table(figures),
        robustness.detection_table(figures),
    ):
        assert part in page


def test_the_front_page_shows_both_models_under_the_strong_attack() -> None:
    hardened, plain = (
        json.loads((ROOT / f"docs/figures/{name}.json").read_text())
        for name in ("strong", "strong-embedded")
    )
    front = (ROOT / "README.md").read_text()
    assert robustness.accuracy_table(hardened, short=True) in front
    assert readme.headline(hardened, plain) in front


# The checks.


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links without a file, and anchors without a heading."""
    broken = []
    prose = without_fences(text)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        heads = prose if not path else without_fences(target.read_text()) if anchor else ""
        if (path and not target.exists()) or (anchor and anchor not in anchors(heads)):
            broken.append(link)
    return broken


def anchors(prose: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    heads = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def unknown_names(text: str) -> list[str]:
    """Commands, flags, paths and settings that do not exist."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_fences(text))]
    unknown = []
    for command in [*fenced_commands(text), *spans]:
        for words in simple_commands(command):
            unknown += wrong_with(words)
    for span in spans:
        if PATHS.fullmatch(span) and span not in MADE_BY_USERS and not (ROOT / span).exists():
            unknown.append(span)
    settings = {
        name.removeprefix("TAPT_").lower() for name in re.findall(r"TAPT_[A-Z0-9_]+\b", text)
    }
    unknown += [f"TAPT_{name.upper()}" for name in settings - {*Settings.model_fields, CLIENT, ""}]
    return unknown


def without_fences(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)


def fenced_commands(text: str) -> list[str]:
    """The lines of fenced blocks in no language, continued lines joined."""
    blocks = re.findall(r"^ *```\n(.*?)^ *```", text, re.M | re.S)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def simple_commands(command: str) -> Iterator[list[str]]:
    """The words of each command of a line, without variables set for it."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # prose, as in the ASCII diagram
        return
    for separator, group in groupby(words, key=lambda word: word in SEPARATORS):
        simple = list(group)
        while simple and re.match(r"\w+=", simple[0]):
            simple.pop(0)
        if simple and not separator:
            yield simple


def wrong_with(words: list[str]) -> list[str]:
    """What does not exist of what a command names."""
    program, rest = words[0].rpartition("/")[2], words[1:]
    if program in ("python", "python3") and rest[:1] == ["-m"] and len(rest) > 1:
        program, rest = rest[1], rest[2:]
        if program != "pytest":
            return wrong_with_module(program, rest)
    checks = {
        "make": wrong_with_make,
        "pytest": wrong_with_pytest,
        "tapt-serve": wrong_with_ours,
        "docker": wrong_with_docker,
        "kubectl": missing_files,
    }
    return checks[program](rest) if program in checks else []


def wrong_with_make(words: list[str]) -> list[str]:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.M))
    wrong = []
    for word in words:
        name, is_variable, _ = word.partition("=")
        if is_variable and f"$({name})" not in makefile:
            wrong.append(f"make variable {name}")
        elif not is_variable and name not in targets:
            wrong.append(f"make target {name}")
    return wrong


def wrong_with_module(name: str, words: list[str]) -> list[str]:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        return [f"module {name}"]
    if name.partition(".")[0] not in OURS:
        return []
    end = words.index("--") if "--" in words else len(words)  # what follows is for the server
    wrong = [f"{name} {flag}" for flag in flags(words[:end]) if flag not in known_flags(name)]
    return wrong + wrong_with_ours(["serve", *words[end + 1 :]])


@cache
def known_flags(module: str) -> frozenset[str]:
    """The options that a module's source names: running each `--help` would import torch anew."""
    path = ROOT / module.replace(".", "/")
    path = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__main__.py"
    values = [getattr(node, "value", None) for node in ast.walk(ast.parse(path.read_text()))]
    return frozenset(value for value in values if isinstance(value, str) and value[:2] == "--")


def wrong_with_ours(words: list[str]) -> list[str]:
    """Of `tapt-serve`'s arguments; a word in capitals stands for any."""
    if not words or words[0].isupper():
        return []
    command, *rest = words
    told = help_of(command)
    if told is None:
        return [f"tapt-serve {command}"] if not command.startswith("-") else []
    known = set(re.findall(r"--[a-z][a-z0-9-]*", told))
    return [f"tapt-serve {command} {flag}" for flag in flags(rest) if flag not in known]


@cache
def help_of(command: str) -> str | None:
    """What `tapt-serve COMMAND --help` prints; None if there is no such command."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.main([command, "--help"])
        except SystemExit as ended:
            return told.getvalue() if ended.code == 0 else None
    return told.getvalue()


def wrong_with_docker(words: list[str]) -> list[str]:
    images = [place for place, word in enumerate(words) if re.search(r"(^|/)tapt-serve:", word)]
    if words[:1] == ["run"] and images and "--entrypoint" not in words:
        return wrong_with_ours(words[images[0] + 1 :])
    return missing_files(words)


def missing_files(words: list[str]) -> list[str]:
    files = [word for word in words if PATHS.fullmatch(word) and word not in MADE_BY_USERS]
    return [file for file in files if not (ROOT / file).exists()]


def wrong_with_pytest(words: list[str]) -> list[str]:
    expression = words[words.index("-k") + 1] if "-k" in words else ""
    files = [ROOT / word for word in words if word.startswith("tests/")]
    if missing := [str(file.relative_to(ROOT)) for file in files if not file.exists()]:
        return missing
    tests = [name for file in files for name in names_of_tests(file)]
    wanted = [part.split(" and ") for part in expression.split(" or ")] if expression else []
    return [
        f"-k {' and '.join(part)}"
        for part in wanted
        if not any(all(word.strip() in name for word in part) for name in tests)
    ]


@cache
def names_of_tests(file: Path) -> tuple[str, ...]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, functions)]
    return tuple(node.name for node in nodes if node.name.startswith("test_"))


def flags(words: list[str]) -> list[str]:
    """The options among some words."""
    return [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
