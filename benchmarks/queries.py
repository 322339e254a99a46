"""What a black-box attacker has to spend, and what the throttle refuses of ordinary traffic.

    python -m benchmarks.queries --data tiny_imagenet_val.parquet --json OUT.json

starts the service for every setting and runs the Square attack on it over HTTP, with one key for
each image, until the first label is wrong. Then it runs ordinary traffic through the same
fingerprints. The tables go into SECURITY.md. OUT.json is written after each setting. With
`--attacks OUT.json` only the ordinary traffic is run, and the attacks of that earlier run, or of as
much of it as was done, are shown again.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.machine import machine
from benchmarks.harness.report import ROOT, command_line, make_parser, write_section
from benchmarks.harness.requests import classification, encode
from benchmarks.harness.server import Server
from benchmarks.ordinary import FRAMES, STREAMS, Pixels, clock, send
from models.attacks.attack import Budget
from models.attacks.square import search
from models.data import open_dataset
from models.evaluation.scores import wilson
from models.evaluation.table import tabulate
from service.http.authentication import entry
from service.settings import Settings

PAGE = ROOT / "SECURITY.md"
LABELS = 10  # an image's own and others, drawn
CLIENTS = 4  # images asked for at once
CALM = "not attacked"  # a setting: only asked again
DIGITS = ("all digits", "all digits, throttled")
"""The settings that every defense is attacked in: those that tell an attacker most. The others are
about the answers and not about the defense, and are tried on the first one alone."""


@dataclass(slots=True)
class Target:
    """One image under attack, with its queries and their outcome."""

    pixels: Tensor
    label: int
    names: list[str]
    key: str
    queries: int = 0
    broken: bool = False
    wait: int | None = None  # seconds to wait, by the 429 that ended it
    last: tuple[float, ...] = ()

    @property
    def over(self) -> bool:
        return self.broken or self.wait is not None

    def ask(self, http: httpx.Client, method: str, pixels: Tensor) -> None:
        """One query, sent without loss."""
        grid = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
        body = classification(encode(grid), self.names, method=method)
        header = {"Authorization": f"Bearer {self.key}"}
        answer = http.post("/v1/classify", json=body, headers=header)
        if answer.status_code == 429 and answer.json()["error_type"] == "rate_limited":
            self.wait = int(answer.headers["retry-after"])
            return
        answer.raise_for_status()
        scored = {one["label"]: one["score"] for one in answer.json()["labels"]}
        self.last = tuple(scored[name] for name in self.names)
        self.queries += 1
        self.broken = next(iter(scored)) != self.names[self.label]


def attack(
    examples: Sequence[tuple[Pixels, str]],
    names: list[str],
    options: argparse.Namespace,
    epsilon: float,
    method: str,
    *knobs: str,
) -> list[Target]:
    """The Square attack on every image that the service first gets right; with an `epsilon` of 0
    the same image again and again."""
    source = np.random.default_rng(options.seed)
    targets = []
    for number, (image, name) in enumerate(examples):
        others = [other for other in names if other != name]
        drawn = [str(other) for other in source.choice(others, LABELS - 1, replace=False)]
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
        targets.append(Target(pixels, 0, [name, *drawn], f"key-{number}"))
    keys = {"TAPT_API_KEYS": ",".join(entry(target.key) for target in targets)}
    with (
        Server(*knobs, env=keys) as server,
        httpx.Client(base_url=server.url, timeout=300) as http,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        list(pool.map(lambda target: target.ask(http, method, target.pixels), targets))
        correct = [target for target in targets if not target.broken][: options.limit]
        if not correct:
            raise SystemExit("no image is right at first")

        def model(pixels: Tensor) -> Tensor:
            """Log scores as the attacker sees them; of the last answer once a target is over."""

            def row(place: int) -> tuple[float, ...]:
                target = correct[place]
                if not target.over:
                    target.ask(http, method, pixels[place])
                return target.last

            scores = torch.tensor(list(pool.map(row, range(len(correct)))))
            return scores.clamp(min=1e-9).log()

        budget = Budget(epsilon / 255, queries=options.queries)
        rows = torch.stack([target.pixels for target in correct])
        seeds = [np.random.default_rng([options.seed, i]) for i in range(len(correct))]
        search(model, rows, torch.zeros(len(correct), dtype=torch.long), budget, seeds)
    return correct


def summarize(correct: Sequence[Target], limit: int) -> dict[str, Any]:
    """Of the targets of one setting. A query that a 429 refused is none."""
    broken = [target.queries for target in correct if target.broken]
    found = wilson(len(broken), len(correct))
    return {
        "n": len(correct),
        "broken": len(broken),
        "interval": [found.low, found.high],
        "median_queries": statistics.median(broken) if broken else None,
        "stopped": sum(target.wait is not None for target in correct),
        "queries_an_hour": limit or None,
    }


def throttled_hours(queries: int, throttle: int) -> int:
    """Hours that so many similar images take with a key that may send `throttle` of them an hour:
    the first batch at once, each further batch an hour later."""
    return max(0, math.ceil(queries / throttle) - 1)


def render(figures: dict[str, Any]) -> str:
    """What SECURITY.md shows."""
    rows = []
    for one in figures["attacks"]:
        low, high = one["interval"]
        share = f"{one['broken']} of {one['n']} ({100 * low:.0f} to {100 * high:.0f}%)"
        median = "" if one["median_queries"] is None else f"{one['median_queries']:g}"
        rows.append((f"`{one['method']}`", one["setting"], share, median, str(one["stopped"])))
    heads = ("defense", "answers", "broken (95%)", "median queries", "stopped by 429")
    asked = figures["options"]
    waits = throttled_hours(asked["queries"], asked["throttle"])
    alone = "Not attacked: the same file is sent as often. "
    if not any(one["setting"] == CALM for one in figures["attacks"]):
        alone = ""
    parts = [
        tabulate(heads, rows),
        f"Square over HTTP, {asked['epsilon']:g}/255, at most {asked['queries']} queries per "
        f"image, {LABELS} labels, model {asked['model']}, images of `{asked['data']}` that are "
        f"right at first. Broken: a wrong label came first at least once. {alone}Throttled: a key "
        f"may send {asked['throttle']} similar images an hour, so that {asked['queries']} queries "
        f"take {waits} {'hour' if waits == 1 else 'hours'}. Made by "
        f"`{figures['attacked_by']}`.",
    ]
    traffic = [
        (name, str(one["n"]), f"{100 * one['alike']:.0f}", f"{100 * one['refused']:.0f}")
        for name, one in figures["ordinary"].items()
    ]
    kinds = ("ordinary traffic of one key", "images", "counted as similar, %", "refused, %")
    spent = figures["microseconds"]
    parts += [
        tabulate(kinds, traffic),
        f"Within one hour, with {figures['options']['throttle']} similar images allowed; "
        f"photographs of `{figures['options']['ordinary']}`, and videos made from them. CPU time: "
        f"{spent['fingerprint_224']:.0f} us to fingerprint an image of 224 x 224 pixels, "
        f"{spent['fingerprint_512']:.0f} us for 512 x 512, and {spent['check']:.0f} us to compare "
        f"with a full hour of fingerprints. {figures['machine']} "
        f"Made by `{figures['command']}`.",
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = make_parser("benchmarks.queries", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="images to attack, with labels")
    parser.add_argument("--ordinary", type=Path, help="photographs of ordinary traffic [--data]")
    parser.add_argument("--limit", type=int, default=20, help="images to attack")
    parser.add_argument("--queries", type=int, default=200, help="for each of them")
    parser.add_argument("--epsilon", type=float, default=8.0, help="in 255ths")
    parser.add_argument("--throttle", type=int, default=50, help="images alike in an hour")
    parser.add_argument("--methods", default="plain", help="defenses, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", default="", help="defenses to ask as often without an attack")
    parser.add_argument("--attacks", type=Path, help="figures of a run, to show its attacks again")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    ordinary = options.ordinary or options.data
    photos = [one.pixels for one in open_dataset(ordinary).examples(FRAMES, seed=options.seed)]
    source = np.random.default_rng(options.seed)
    throttled = ("--key-similar-per-hour", str(options.throttle))
    settings = {
        "all digits": (),
        "two digits": ("--expose", "rounded"),
        "label only": ("--expose", "label"),
        "all digits, throttled": throttled,
        "label only, throttled": ("--expose", "label", *throttled),
    }
    command, model = command_line("benchmarks.queries"), Settings().model
    dataset = open_dataset(options.data)
    drawn = dataset.examples(3 * options.limit, seed=options.seed)
    examples = [(one.pixels, dataset.names[one.label]) for one in drawn]

    def run_attack(
        method: str, setting: str, epsilon: float, knobs: Sequence[str]
    ) -> dict[str, Any]:
        correct = attack(examples, dataset.names, options, epsilon, method, *knobs)
        limit = options.throttle if "throttled" in setting else 0
        row = {"method": method, "setting": setting} | summarize(correct, limit)
        print(json.dumps(row), flush=True)
        return row

    if options.attacks:
        kept = json.loads(options.attacks.read_text())
        results = {name: kept[name] for name in ("attacks", "options", "attacked_by")}
        if (
            kept["options"]["queries"] != options.queries
            or kept["options"]["data"] != options.data.name
            or kept["options"].get("model") != model
        ):
            raise SystemExit("the attacks are of another model, data or number of queries")
        runs = []
    else:
        asked = vars(options) | {"data": options.data.name, "ordinary": ordinary.name}
        asked["model"] = model
        results = {
            "attacks": [],
            "options": {
                name: asked[name]
                for name in ("model", "data", "ordinary", "queries", "epsilon", "throttle")
            },
            "attacked_by": command,
        }
        runs = [
            (method, setting, options.epsilon, knobs)
            for number, method in enumerate(options.methods.split(","))
            for setting, knobs in settings.items()
            if not number or setting in DIGITS
        ]
    runs += [(method, CALM, 0.0, ()) for method in filter(None, options.again.split(","))]

    def keep(found: dict[str, Any]) -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found, indent=2) + "\n")

    for run in runs:
        results["attacks"].append(run_attack(*run))
        keep(results)  # each takes minutes; a run that is cut short can be shown by --attacks
    figures = {
        **results,
        "ordinary": {
            name: send(stream(photos, source), options.throttle) for name, stream in STREAMS.items()
        },
        "microseconds": clock(),
        "machine": machine(),
        "command": command,
    }
    keep(figures)
    write_section("queries", render(figures), PAGE)


if __name__ == "__main__":
    main()
