"""The service beside what people would use instead, on the same machine with the same checkpoint.

python -m benchmarks.peers --repeats 3 --seconds 10 --write
python -m benchmarks.peers --peers pipeline plain --sizes embedded    # some of them
python -m benchmarks.peers --python infinity=VENV/bin/python          # in your environment

Peers: transformers' pipeline behind FastAPI, LitServe, infinity-emb, and tapt-serve with several
methods. pip installs each of the others into an environment of its own below `--cache`. One server
runs at a time; the repeats take turns and every other one goes backwards, so that a machine whose
speed drifts favors none. A peer that cannot be installed or started is in the table with its error.
Writes JSON and, beside it, the tables in Markdown.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import machine
from benchmarks.harness.report import DOCS, ROOT, command_line, make_parser, publish, write_section
from benchmarks.peers.checkpoints import SIZES, prepare_model
from benchmarks.peers.environment import install, versions
from benchmarks.peers.infinity import Infinity
from benchmarks.peers.litserve import LitServe
from benchmarks.peers.ours import Ours
from benchmarks.peers.peer import Model, Peer, PeerError
from benchmarks.peers.pipeline import Pipeline
from benchmarks.peers.report import headline, write_page
from benchmarks.peers.trial import run_trial

METHODS = ("plain", "ensemble", "apt-ensemble", "tapt")
OURS = (Ours("plain", "float32"), *map(Ours, METHODS))
PEERS: dict[str, Peer] = {peer.name: peer for peer in (Pipeline(), Infinity(), LitServe(), *OURS)}
PAGE, README = DOCS / "performance.md", ROOT / "README.md"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    peers = [PEERS[name] for name in options.peers]
    given = dict(options.python)
    sizes = {}
    for size in options.sizes:
        model = prepare_model(size, options.cache)
        rows = [_install(peer, options.cache, given.get(peer.name)) for peer in peers]
        for repeat in range(options.repeats):
            turn = list(zip(peers, rows, strict=True))
            for peer, row in reversed(turn) if repeat % 2 else turn:
                _run(peer, row, model, options.seconds, repeat)
        sizes[size] = rows
    return {
        "command": command_line("benchmarks.peers"),
        "machine": machine(),
        "settings": {"repeats": options.repeats, "seconds": options.seconds},
        "sizes": sizes,
    }


def _install(peer: Peer, cache: Path, python: Path | None) -> dict[str, Any]:
    """The row of a peer without a run; with its error if it cannot be installed."""
    row: dict[str, Any] = {
        "name": peer.name,
        "title": peer.title,
        "defended": peer.defended,
        "own_environment": bool(peer.requirements),
        "python": None,
        "versions": {},
        "error": None,
        "runs": [],
    }
    try:
        row["python"] = python or install(peer, cache)
        row["versions"] = versions(row["python"], peer.packages)
    except PeerError as error:
        row["error"] = str(error)
    return row


def _run(peer: Peer, row: dict[str, Any], model: Model, seconds: float, repeat: int) -> None:
    """Add a trial to the row, or the error that ends its trials."""
    if row["error"]:
        return
    try:
        trial = run_trial(peer, row["python"], model, seconds, repeat)
        row["runs"].append(asdict(trial))
        said = [f"{load} {found['throughput']:.2f}/s" for load, found in trial.loads.items()]
        said.append(f"{1000 * trial.cpu_seconds:.1f} CPU ms per answer")
    except PeerError as error:
        row["error"] = str(error)
        said = [row["error"]]
    news = f"{model.name}, repeat {repeat + 1}, {peer.name}: {', '.join(said)}"
    print(news, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("benchmarks.peers", __doc__)
    add = parser.add_argument
    add("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    add("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of the checkpoint")
    add("--repeats", type=int, default=3)
    add("--seconds", type=float, default=10.0, help="of each load")
    add("--cache", type=Path, default=Path("runs/peers"), help="for environments and checkpoints")
    add(
        "--python",
        type=_named_path,
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="Python of an environment that has the peer's packages, instead of a new one",
    )
    add("--json", type=Path, metavar="OUT", default=Path("runs/benchmarks/peers.json"))
    add("--write", action="store_true", help="write docs/performance.md and README.md")
    return parser.parse_args(arguments)


def _named_path(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if name not in PEERS or not separator:
        raise argparse.ArgumentTypeError(f"{text} is not PEER=PATH")
    return name, Path(path).absolute()


def main() -> int:
    options = parse()
    figures = measure(options)
    pages = {size: write_page(figures, size) for size in options.sizes}
    publish(figures, "\n".join(pages.values()), options.json, None, PAGE)
    if options.write:
        for size, page in pages.items():
            write_section(f"peers {size}", page, PAGE)
            write_section(f"peers {size}", headline(figures, size), README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
