"""Make a defense bundle for a checkpoint: prompts, the statistics taken with them, a threshold.

    tapt-serve calibrate --data DIR --out BUNDLE [--model embedded-hardened] ...

Labelled images teach prompts. Unlabelled ones take fresh statistics for the prompts of a bundle
that exists (`--prompts BUNDLE --labels cat,dog,...`). A run that was stopped goes on from
`BUNDLE.partial` when it is started again with the same settings. Several GPUs of one machine share
the batches:

    torchrun --nproc-per-node N -m models.calibration.calibrate --device cuda ...
"""

import argparse
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress as Bar
from torch import Tensor

from models.bundle import DefenseBundle, load_bundle
from models.calibration import processes
from models.calibration.options import parse
from models.calibration.progress import resume_progress, save_progress
from models.calibration.prompt_tuning import Progress, Tuning, attack, begin, tune
from models.checkpoint import Checkpoint, load_checkpoint
from models.classifier import DEFAULT_TEMPLATE, DefendedClassifier, ImageQuery
from models.data import DataError, Dataset, check_labels, class_names, open_dataset
from models.device import pick_device
from models.errors import LoadError
from models.labels import LabelBatch, tokenize
from models.prompts import DefensePrompts
from models.statistics import TokenStatistics, token_moments
from models.views import make_views

CHUNK = 64  # images at once outside of the tuning
SAVE_SECONDS = 30.0
"""Progress is saved after the step that ends later than this, so at least once a minute where a
step takes less than half of one."""
CPU = torch.device("cpu")


@dataclass(slots=True)
class Images:
    """View 0 of images, uint8 [3, S, S] each, and their labels, -1 where there is none."""

    pixels: list[Tensor] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pixels)

    def add(self, view: Tensor, label: int) -> None:
        self.pixels.append(view)
        self.labels.append(label)

    def stack(self) -> tuple[Tensor, Tensor]:
        """uint8 [N, 3, S, S] and [N]."""
        return torch.stack(self.pixels), torch.tensor(self.labels)


def gather(
    checkpoint: Checkpoint, data: Dataset, shots: int, images: int, seed: int, bar: Bar
) -> tuple[Images, Images, int]:
    """Images to learn from, `shots` a class, and at most `images` others for statistics and
    threshold, in an order drawn by `seed`; and how many of the others are learned from as well,
    which happens where the data has no more.

    Raises:
        DataError: there is no image.
    """
    learned, others, seen = Images(), Images(), Counter[int]()
    most = shots * len(data.names)
    task = bar.add_task("reading images", total=most + images)
    for example in data.examples(images if most == 0 else None, seed, checkpoint.preprocessing):
        pile = learned if seen[example.label] < shots else others
        if pile is others and len(others) == images:
            continue
        seen[example.label] += 1
        view = make_views(example.pixels, 1, 0, checkpoint.preprocessing, CPU, example.view)[0]
        pile.add((view * 255).round().byte(), example.label)
        bar.advance(task)
        if len(learned) == most and len(others) == images:
            break
    again = min(images - len(others), len(learned))
    for place in range(again):
        others.add(learned.pixels[place], learned.labels[place])
    if not others:
        raise DataError("there are no images to calibrate with")
    bar.update(task, total=len(learned) + len(others) - again)
    return learned, others, again


def learn(
    checkpoint: Checkpoint,
    texts: LabelBatch,
    words: Tensor,
    names: list[str],
    pixels: Tensor,
    targets: Tensor,
    tuning: Tuning,
    partial: Path,
    bar: Bar,
) -> DefensePrompts:
    """Learn prompts, going on from the files in `partial` and leaving them there as it goes.

    `texts` are the names in their template behind the prompts' slots, `words` as in `begin`.
    """
    settings = {**asdict(tuning), "names": names, "checkpoint": checkpoint.sha256}
    settings |= {"pictures": len(pixels), "tokens": texts.ids.tolist()}
    clip = checkpoint.clip
    progress = resume_progress(partial, settings, checkpoint) or begin(clip, tuning, words)
    task = bar.add_task("learning prompts", total=tuning.steps, completed=progress.step)

    done, saved = replace(progress), time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal done, saved
        text = f"learning prompts, loss {progress.losses[-1]:.3f}"
        bar.update(task, completed=progress.step, description=text)
        # A copy: an interruption may find the next step half done.
        done = replace(progress, losses=[*progress.losses])
        if progress.step == tuning.steps or time.monotonic() >= saved + SAVE_SECONDS:
            save_progress(partial, settings, done)
            saved = time.monotonic()

    prepared = checkpoint.preprocessing
    try:
        return tune(clip, texts, pixels, targets, prepared, tuning, progress, report)
    except KeyboardInterrupt:
        save_progress(partial, settings, done)
        raise


def take_statistics(
    checkpoint: Checkpoint,
    texts: LabelBatch,
    pixels: Tensor,
    targets: Tensor,
    prompts: DefensePrompts,
    tuning: Tuning,
    bar: Bar,
) -> TokenStatistics:
    """Clean and adversarial token moments with exactly these prompts.

    Images without a label are attacked away from what the prompted model says of them.
    """
    clip = checkpoint.clip
    text = clip.encode_labels(texts, prompts.text)
    task = bar.add_task("taking statistics", total=2 * len(pixels))

    def batches(attacked: bool) -> Iterator[Tensor]:
        for start in range(0, len(pixels), CHUNK):
            batch = (pixels[start : start + CHUNK].float() / 255).to(clip.device)
            if attacked:
                goals = targets[start : start + CHUNK].to(clip.device)
                with torch.no_grad():
                    seen = clip.encode_images(batch.unsqueeze(0), prompts.vision).features[0]
                goals = torch.where(goals < 0, (seen @ text.T).argmax(dim=-1), goals)
                budget = tuning.epsilon, tuning.attack_steps
                batch = attack(clip, batch, goals, text, prompts, *budget)
            yield batch
            bar.advance(task, len(batch))

    clean = token_moments(clip, batches(False), prompts)
    return TokenStatistics(*clean, *token_moments(clip, batches(True), prompts))


def set_thresholds(
    checkpoint: Checkpoint,
    bundle: DefenseBundle,
    names: list[str],
    pixels: Tensor,
    views: int,
    rate: float,
    bar: Bar,
) -> dict[str, float]:
    """The suspicion that a share `rate` of these clean images exceeds, by the prompts that their
    views are read with.

    Args:
        pixels: view 0 of the images, uint8 [N, 3, S, S]. Views are cut from these pixels; the
            service cuts them from the whole image, where another share may exceed a threshold.
    """
    classifier = DefendedClassifier(checkpoint, bundle).without_resize()
    task = bar.add_task("setting the thresholds", total=len(pixels))
    doubts: dict[str, list[float]] = {"learned": [], "none": []}
    for number, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        query = ImageQuery(image, tuple(names), None, "single", number, steps=0)
        for name, method in (("learned", "tapt"), ("none", "ensemble")):
            (batch,) = classifier.prepare([query], method)
            (prediction,) = classifier.classify(batch, views)
            doubts[name].append(prediction.suspicion)
        bar.advance(task)
    return {name: float(torch.tensor(seen).quantile(1 - rate)) for name, seen in doubts.items()}


def calibrate(options: argparse.Namespace, bar: Bar) -> DefenseBundle | None:
    """The whole way from the command's options to a bundle; None in all processes but the first.

    Raises:
        LoadError, DataError: checkpoint, bundle or images cannot be used.
    """
    device = processes.own_device(pick_device(options.device))
    checkpoint = load_checkpoint(options.model, device, tokenizer=options.tokenizer)
    deepest = max(checkpoint.clip.vision_layers, checkpoint.clip.text_layers)
    if options.depth > deepest and options.depth != Tuning().depth:
        raise ValueError(f"--depth {options.depth}: {checkpoint.name} has {deepest} layers")
    data = open_dataset(options.data)
    names = class_names(data, options.labels, options.data)
    tuning = Tuning(**{name: getattr(options, name) for name in asdict(Tuning())})
    if not (options.prompts or data.names):
        raise DataError(f"{options.data} has no labels to learn from; see --prompts")
    shots = 0 if options.prompts else options.shots
    taught, others, again = gather(checkpoint, data, shots, options.images, tuning.seed, bar)
    check_labels([*taught.labels, *others.labels], names, options.data)
    if options.prompts:
        old = load_bundle(options.prompts, checkpoint.clip, checkpoint.sha256)
        prompts, template, layers = old.prompts, old.template, old.layers
        # Statistics of the attack that the prompts were learned against.
        known = {**asdict(tuning), **old.provenance, **old.provenance.get("tuning", {})}
        tuning = replace(tuning, **{n: known[n] for n in ("epsilon", "attack_steps")})
        made: dict[str, Any] = {
            "prompts_from": old.describe(),
            "epsilon": tuning.epsilon,
            "attack_steps": tuning.attack_steps,
            "seed": tuning.seed,
        }
    else:
        pixels, targets = taught.stack()
        partial = options.out.with_name(options.out.name + ".partial")
        template, words = _begin_text(checkpoint, tuning.design)
        slots = {"v": 0, "vli": words.shape[1] - 1}.get(tuning.design, tuning.tokens)
        texts = _tokenize(checkpoint, names, template, slots)
        prompts = learn(checkpoint, texts, words, names, pixels, targets, tuning, partial, bar)
        shape = prompts.vision if prompts.vision is not None else prompts.text
        layers = 0 if shape is None else shape.shape[1]
        made = {"tuning": asdict(tuning), "shots": options.shots, "pictures": len(pixels)}
    if processes.rank():
        return None
    pixels, targets = others.stack()
    slots = 0 if prompts.text is None else prompts.text.shape[2]
    texts = _tokenize(checkpoint, names, template, slots)
    statistics = take_statistics(checkpoint, texts, pixels, targets, prompts, tuning, bar)
    bundle = DefenseBundle(
        prompts=prompts,
        statistics=statistics,
        template=template,
        layers=layers,
        checkpoint_sha256=checkpoint.sha256,
        provenance={
            **made,
            "data": options.data.name,
            "classes": len(names),
            "statistics_pictures": len(pixels),
            "statistics_pictures_learned_from": again,
            "threshold_views": options.threshold_views,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
    rate = options.false_positive_rate
    views = options.threshold_views
    thresholds = set_thresholds(checkpoint, bundle, names, pixels, views, rate, bar)
    return replace(bundle, suspicion=thresholds, false_positive_rate=rate)


def _begin_text(checkpoint: Checkpoint, design: str) -> tuple[str, Tensor]:
    """The template behind the prompts, and the tokens [1, 1 + n] of the words that VLI's prompts
    begin as and stand for, the start token included."""
    lead, _, rest = DEFAULT_TEMPLATE.partition("{}")
    ids = checkpoint.tokenizer(lead.strip())["input_ids"][:-1]
    words = torch.tensor([ids], device=checkpoint.clip.device)
    return ("{}" + rest if design == "vli" else DEFAULT_TEMPLATE), words


def _tokenize(checkpoint: Checkpoint, names: list[str], template: str, slots: int) -> LabelBatch:
    clip = checkpoint.clip
    texts = [template.replace("{}", name) for name in names]
    end = clip.model.config.text_config.eos_token_id
    return tokenize(checkpoint.tokenizer, end, texts, clip.context_length, slots).to(clip.device)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.out.exists() and not options.force:
        print(f"{options.out} exists; name another --out or add --force", file=sys.stderr)
        return 1
    try:
        with processes.joined(options.device) as rank, Bar(disable=rank > 0) as bar:
            bundle = calibrate(options, bar)
    except (LoadError, DataError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. The same command resumes.", file=sys.stderr)
        return 130
    if bundle is None:
        return 0
    bundle.save(options.out)
    shutil.rmtree(options.out.with_name(options.out.name + ".partial"), ignore_errors=True)
    print(f"{options.out}: {bundle.prompts.design} prompts {bundle.prompts_sha256[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
