"""Tables of docs/robustness.md and the README, from the JSON files of `tapt-serve evaluate`."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from models.attacks.strong import STRONG
from models.evaluation.scores import Interval, difference
from models.evaluation.table import read_shares, tabulate
from models.evaluation.trial import BY_QUERIES

KNOWN = {  # to the attacker
    "transfer": "`transfer` attacks undefended CLIP and knows nothing about the defense",
    "static": "`static` attacks CLIP with the learned prompts and knows nothing about views or "
    "adaptation",
    "adaptive": "`adaptive` attacks the whole defense and knows all but the seed of the views, and "
    "an image must also withstand the attacks of the other threat models",
}


def accuracy_table(figures: dict[str, Any], short: bool = False) -> str:
    """Accuracy by defense and threat, and everything that a figure must name.

    Args:
        short: leave out `static`, and the share of images with all answers right but for the
            adaptive attack.
    """
    rows = figures["rows"]
    found = {(row["threat"], row["epsilon"], row["defense"]): row for row in rows}
    measured = dict.fromkeys((row["threat"], row["epsilon"]) for row in rows)
    columns = [column for column in measured if not (short and column[0] == "static")]
    asked = max(row.get("answers", 1) for row in rows)
    digits = 1 if figures["data"]["n"] >= 1000 else 0
    timed = figures.get("merged", 1) == 1  # shards may have shared a machine
    lines = {defense: [f"`{defense}`"] for defense in dict.fromkeys(row["defense"] for row in rows)}
    heads = ["defense"]
    for threat, epsilon in columns:
        whole = asked > 1 and (not short or threat == "adaptive")
        head = "clean" if threat == "clean" else f"{threat} {epsilon:g}/255"
        heads += [head, f"{head}, all {asked}"] if whole else [head]
        for defense, line in lines.items():
            row = found[threat, epsilon, defense]
            line.append(_percent(row["accuracy"], row["interval"], digits))
            if whole:
                every = row["all_right"]
                line.append(_percent(every["value"], every["interval"], digits))
    if timed:
        heads.append("ms per image")
        for defense, line in lines.items():
            line.append(f"{found[*columns[0], defense]['ms_a_picture']:.0f}")
    table = tabulate(tuple(heads), [tuple(line) for line in lines.values()])
    settings, machine, data = figures["settings"], figures["machine"], figures["data"]
    attack, defense = settings["attack"], settings["defense"]
    spent = [count(attack["steps"], "step"), count(attack["restarts"], "random start")]
    if "square" in figures["attacks"]:
        spent.append(f"{attack['queries']} queries of Square")
    if figures.get("queried") is not None:
        spent[-1] += f" and RayS on the first {figures['queried']} images{_queried(figures)}"
    attacks = list(figures["attacks"])
    if any(row["threat"] == "adaptive" for row in rows):
        draws = count(attack["draws"], "draw")
        spent.append(f"gradients averaged over {draws} of random views")
    else:  # the others have a single view, on which some attacks of the recipe are the same
        attacks = [name for name in attacks if name not in STRONG or STRONG[name].alone]
    timing = f"Time is measured in batches of {figures['batch']}. " if timed else ""
    attacked = (
        "Under attack, an image counts if it is right both without the attack and with it. "
        f"{_answered(asked)}"
        f"Attacks: {', '.join(attacks)} with {', '.join(spent)}. "
        f"{'; '.join(KNOWN[t] for t in dict.fromkeys(t for t, _ in columns) if t in KNOWN)}. "
    )
    caption = (
        f"Top-1 accuracy in % with 95% intervals, on the same {data['n']} images of "
        f"`{data['name']}` and {data['classes']} labels in every row. "
        f"{attacked if any(threat != 'clean' for threat, _ in columns) else ''}"
        f"{count(defense['views'], 'view')}, {count(defense['steps'], 'step')} on the "
        f"`{defense['adapts']}` prompts. "
        f"{timing}"
        f"Machine: {_hardware(machine)}, torch {machine['torch']}."
    )
    made = f"Made by `{figures['command']}` and `python -m benchmarks.readme --table OUT`."
    return f"{table}\n\n{caption}\n\n{made}"


def differences_table(figures: dict[str, Any]) -> str:
    """How far each row lies from undefended CLIP under the attack made on itself, from the plain
    mean over views, and from that with prompts but without a step, where these were measured; and
    what of its clean accuracy it keeps."""
    rows = {(row["defense"], row["threat"], row["epsilon"]): row for row in figures["rows"]}
    lines = []
    for (defense, threat, epsilon), row in rows.items():
        own = [rows.get(("plain", each, epsilon)) for each in ("transfer", "adaptive", "clean")]
        others = (
            next(filter(None, own), None),
            rows.get(("ensemble", threat, epsilon)),
            None if defense == "ensemble" else rows.get(("apt-ensemble", threat, epsilon)),
        )
        points = [_above(row, None if other is row else other) for other in others]
        if any(points) and defense != "plain":
            kept = f"{row['accuracy'] / rows[defense, 'clean', 0]['accuracy']:.0%}"
            lines.append((f"`{defense}`", _under(row), *points, kept))
    heads = (
        "defense",
        "under",
        "points above `plain` under its own attack (paired 95%)",
        "points above `ensemble`",
        "points above `apt-ensemble`",
        "share of its clean accuracy",
    )
    return tabulate(heads, lines) if lines else ""


def paired_table(figures: dict[str, Any], others: dict[str, Any]) -> str:
    """The rows of another run with other settings beside these, on the images that both have.

    Raises SystemExit if they have none in common.
    """
    shared = [image for image in figures["pictures"] if image in others["pictures"]]
    if not shared:
        raise SystemExit("the two runs are of different images")

    def right(run: dict[str, Any], row: dict[str, Any]) -> list[float]:
        found = dict(zip(run["pictures"], read_shares(row), strict=True))
        return [found[image] for image in shared]

    where = {(row["threat"], row["epsilon"]): row for row in figures["rows"]}
    (base,) = {row["defense"] for row in figures["rows"]}
    views = [each["settings"]["defense"]["views"] for each in (others, figures)]
    lines = []
    for row in others["rows"]:
        if (place := (row["threat"], row["epsilon"])) in where:
            theirs, ours = right(others, row), right(figures, where[place])
            points = _points(difference(theirs, ours))
            lines.append((f"`{row['defense']}`", _under(row), f"{100 * mean(theirs):.0f}", points))
    heads = (
        f"defense of the other run, {views[0]} views",
        "under",
        f"accuracy on the same {len(shared)} images",
        f"points above `{base}` of this run, {views[1]} views",
    )
    return tabulate(heads, lines)


def detection_table(figures: dict[str, Any]) -> str:
    """How well the suspicion score tells attacked images from clean ones, where it was noted."""
    lines = []
    for row in figures["rows"]:
        if found := row.get("suspicion"):
            rates = found["true_positive_rate_at"].values()
            caught = [f"{100 * rate['value']:.0f}" for rate in rates]
            score = f"{found['auroc']:.2f}"
            counted = str(found["attacked"])
            lines.append((f"`{row['defense']}`", _under(row), score, *caught, counted))
    heads = (
        "defense",
        "under",
        "AUROC",
        "% detected at 1% false positives",
        "% detected at 5% false positives",
        "attacked images",
    )
    return tabulate(heads, lines) if lines else ""


def _under(row: dict[str, Any]) -> str:
    return "clean" if row["threat"] == "clean" else f"{row['threat']} {row['epsilon']:g}/255"


def _above(row: dict[str, Any], other: dict[str, Any] | None) -> str:
    """The paired difference of two rows of a file in points; nothing without the other one."""
    return "" if other is None else _points(difference(read_shares(row), read_shares(other)))


def _points(far: Interval) -> str:
    """A difference in points with its interval."""
    value, low, high = (100 * each for each in (far.value, far.low, far.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _queried(figures: dict[str, Any]) -> str:
    """How many of the first images queries were made on: those with a right answer after all
    gradient attacks. They still have one, or a query took the last."""
    counts = []
    for row in figures["rows"]:
        if row["threat"] == "adaptive":
            first = read_shares(row)[: figures["queried"]]
            taken = sum(row["broken_first_by"].get(name, 0) for name in BY_QUERIES)
            counts.append(f"{taken + sum(share > 0 for share in first)} for `{row['defense']}`")
    return f" that are still right ({', '.join(counts)} under `adaptive`)" if counts else ""


def count(number: int, what: str) -> str:
    """A number of things, in words."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _hardware(machine: dict[str, Any]) -> str:
    if machine["accelerator"]:
        return f"{machine['accelerator']} with {machine['cores']} cores of {machine['cpu']}"
    return f"{machine['cpu']}, {count(machine['threads'], 'thread')} on {machine['cores']} cores"


def _answered(asked: int) -> str:
    """What the two figures of a table mean whose random defenses answered several times."""
    if asked == 1:
        return ""
    return (
        f"A random defense answers {asked} times with other draws: the first figure is the "
        f"accuracy of one answer, the second the share of images with all {asked} right. "
    )


def _percent(value: float, interval: Sequence[float], digits: int) -> str:
    low, high = interval
    return f"{100 * value:.{digits}f} ({100 * low:.{digits}f} to {100 * high:.{digits}f})"
