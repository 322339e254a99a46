"""Command that measures an exported model and writes its figures, its curve and its model card.

`python -m research.embedded.report --data DIR --curve models/embedded/curve.jsonl RUN/curve.jsonl`
joins the curves of a run and of what it started from, and writes `curve.jsonl`, `curve.svg` and the
part of `MODEL_CARD.md` between the two figure marks; the prose around them is written by hand.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPModel
from transformers import __version__ as transformers_version

from models.data import open_dataset
from models.evaluation.machine import cpu_name
from models.evaluation.scores import wilson
from models.evaluation.table import percent, tabulate
from research.embedded.lexicon import held_out_table
from research.embedded.zeroshot import image_features, rank, stack

BEGIN, END = "<!-- figures: written by research.embedded.report -->", "<!-- end of figures -->"
SETS = {
    "tiny_imagenet_val": "the 200 classes it was trained on, unseen photographs",
    "imagenette_unseen": "10 classes without a training photograph",
    "caltech101": "101 classes of another domain",
}
# What somebody would type, the right label first, on photographs of real size.
TRIED = {
    "school bus": ("school bus", "bicycle", "dog", "pizza"),
    "convertible": ("a red sports car", "cat", "tree", "sandwich"),
    "Bernese mountain dog": ("dog", "cat", "bird", "fish"),
    "banana": ("banana", "hammer", "airplane", "shirt"),
    "cheeseburger": ("hamburger", "car", "flower", "bed"),
    "electric guitar": ("guitar", "boat", "horse", "lamp"),
    "hen": ("bird", "truck", "keyboard", "mountain"),
    "fire engine": ("fire truck", "golden retriever", "chair", "apple"),
    "jellyfish": ("jellyfish", "laptop", "bridge", "hat"),
    "castle": ("castle", "monkey", "spoon", "shoe"),
    "bee": ("insect", "building", "ship", "clock"),
    "suspension bridge": ("bridge", "rabbit", "cup", "sofa"),
}


def table_of_accuracy(model: Any, tokenizer: Any, data: Path, size: int) -> str:
    rows = []
    for name, what in SETS.items():
        dataset = open_dataset(data / f"{name}.parquet")
        images, labels = stack(dataset, size)
        order = rank(model, tokenizer, images, dataset.names).argsort(1, descending=True)
        first = int((order[:, 0] == labels).sum())
        fifth = (order[:, :5] == labels[:, None]).any(1).float().mean()
        rate = percent(wilson(first, len(labels)))
        chance = f"{100 / len(dataset.names):.1f}"
        rows.append((f"`{name}`", what, rate, f"{100 * fifth:.1f}", chance, str(len(labels))))
    heads = ("set", "what", "top-1 % (95% interval)", "top-5 %", "chance %", "n")
    return tabulate(heads, rows)


def table_of_rankings(model: Any, tokenizer: Any, photographs: Path, size: int) -> str:
    """The first photograph of each tried class and how the model scores the tried labels."""
    dataset = open_dataset(photographs)
    images, labels = stack(dataset, size)
    scale = float(model.logit_scale.detach().exp())
    rows = []
    for photograph, tried in TRIED.items():
        index = int((labels == dataset.names.index(photograph)).nonzero()[0])
        scores = (scale * rank(model, tokenizer, images[index : index + 1], list(tried)))[0]
        shares = scores.softmax(0)
        ordered = [f"{tried[i]} {shares[i]:.2f}" for i in shares.argsort(descending=True).tolist()]
        rows.append((photograph, "yes" if shares.argmax() == 0 else "no", ", ".join(ordered)))
    return tabulate(("photograph of", "first right", "labels tried, with scores"), rows)


def time_forward(model: Any, size: int) -> float:
    """Median seconds of one plain forward of 64 views over five tries."""
    views = torch.zeros(64, 3, size, size, device=model.device)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        with torch.no_grad():
            image_features(model, views)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def describe_machine() -> str:
    return (
        f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers_version}"
    )


def read_curves(paths: list[Path]) -> list[dict[str, float]]:
    """Rows of runs of which each began with the weights of the one before, counted on."""
    rows: list[dict[str, float]] = []
    for path in paths:
        before = {key: rows[-1][key] if rows else 0 for key in ("epoch", "step", "seconds")}
        rows.extend(
            {**row, **{key: round(row[key] + before[key], 4) for key in before}}
            for row in map(json.loads, path.read_text().splitlines())
        )
    return rows


def draw_curve(curve: list[dict[str, float]], path: Path) -> None:
    """Loss and zero-shot accuracy over the epochs, as SVG; the same curve gives the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "embedded", "svg.fonttype": "none"})
    from matplotlib import pyplot

    curve = [row for row in curve if "loss_image" in row]
    epochs = [row["epoch"] for row in curve]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(epochs, [row["loss_image"] for row in curve], marker=".")
    left.set(xlabel="epoch", ylabel="image loss")
    for name, label in (("val", "200 classes, validation"), ("unseen", "10 unseen classes")):
        right.plot(epochs, [100 * row[name] for row in curve], marker=".", label=label)
    for before, after in itertools.pairwise(curve):
        if before["pixels"] != after["pixels"]:
            right.axvline(before["epoch"], color="0.8", zorder=0)
            right.text(before["epoch"], 0, f" {after['pixels']:.0f} px", color="0.5")
    right.set(xlabel="epoch", ylabel="zero-shot top-1, %")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write_between_marks(card: Path, text: str) -> None:
    """Replace what is between the figure marks. Raises ValueError where the card lacks them."""
    page = card.read_text()
    if BEGIN not in page or END not in page:
        raise ValueError(f"{card} has no figure marks")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    card.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def describe(
    model: Any, tokenizer: Any, data: Path, wordnet: Path, weights: Path, last: dict[str, float]
) -> str:
    """The figures of the card, in Markdown."""
    size = model.config.vision_config.image_size
    parameters: int = sum(parameter.numel() for parameter in model.parameters())
    seconds = time_forward(model, size)
    trained = (
        f"Trained for {last['epoch']:.1f} epochs, {last['step']:.0f} steps, "
        f"{last['seconds'] / 60:.0f} minutes."
    )
    facts = (
        f"{trained} {parameters / 1e6:.2f} million parameters, "
        f"{weights.stat().st_size / 1e6:.1f} MB of weights; a plain forward of 64 views takes "
        f'{seconds:.2f} s in fp32. Measured in fp32 with the template "a photo of a {{}}." on: '
        f"{describe_machine()}."
    )
    return "\n\n".join(
        (
            facts,
            table_of_accuracy(model, tokenizer, data, size),
            "![Training curve](curve.svg)",
            "The curve is measured during the run, in bfloat16, on 1,000 images of each set.",
            "Labels that a user might type, on the first photograph of each class in "
            "`photographs.parquet` (center crop, 64 pixels). One photograph per class is a sanity "
            "check, not a measurement.",
            table_of_rankings(model, tokenizer, data / "photographs.parquet", size),
            held_out_table(data, wordnet),
            "Made by `python -m research.embedded.report --data DIR`.",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure an exported CLIP and write its card.")
    parser.add_argument("--data", type=Path, required=True, help="directory of the parquet files")
    parser.add_argument("--model", type=Path, default=Path("models/embedded"))
    parser.add_argument(
        "--curve", type=Path, nargs="+", help="curves of its runs (default: the model's own)"
    )
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    options = parser.parse_args()
    kept = options.model / "curve.jsonl"
    curve = read_curves(options.curve or [kept])
    kept.write_text("".join(json.dumps(row) + "\n" for row in curve))
    draw_curve(curve, options.model / "curve.svg")
    model = CLIPModel.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    weights = options.model / "model.safetensors"
    text = describe(model, tokenizer, options.data, options.wordnet, weights, curve[-1])
    write_between_marks(options.model / "MODEL_CARD.md", text)
    print(text)


if __name__ == "__main__":
    main()
