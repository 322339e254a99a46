"""Command that trains the embedded model: a small CLIP on Tiny-ImageNet, in OpenAI's text space.

The text tower learns OpenAI CLIP's published features of 1,378 nouns, and for 37,000 more nouns
what WordNet makes of them; then the image tower learns to find the class's caption and to rank the
published nouns as the class does. Resolution grows during the run (CLIPA, Li et al. 2023); an
average of the weights is exported. There are no adversarial examples. A run goes on from its last
checkpoint by itself.
"""

import argparse
import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from models.data import DataError, open_dataset
from research.embedded.losses import Targets
from research.embedded.recipe import RECIPES, build_model
from research.embedded.tokenizer import train_tokenizer
from research.embedded.trainer import Budget, Measure, Trainer, run
from research.embedded.zeroshot import MEAN, STD, stack, top1


def load_images(shards: list[Path], cache: Path, size: int) -> tuple[Any, Tensor]:
    """Training images as memory-mapped uint8 [count, 3, size, size] and labels int64 [count].

    They are decoded once, into two files under `cache`.
    """
    images, labels = cache / f"images_{size}.npy", cache / f"labels_{size}.npy"
    if not labels.exists():
        cache.mkdir(parents=True, exist_ok=True)
        datasets = [open_dataset(shard) for shard in shards]
        shape = (sum(map(len, datasets)), 3, size, size)
        written = np.lib.format.open_memmap(images, mode="w+", dtype=np.uint8, shape=shape)
        found, row = [], 0
        with Progress() as bar:
            task = bar.add_task("decode", total=shape[0])
            for dataset in datasets:
                pixels, values = stack(dataset, size)
                written[row : row + len(pixels)] = pixels.numpy()
                found.append(values.numpy())
                row += len(pixels)
                bar.advance(task, len(pixels))
        written.flush()
        # Written last: its presence says that the images are whole.
        np.save(labels, np.concatenate(found))
    return np.load(images, mmap_mode="r"), torch.from_numpy(np.load(labels))


def measure_on(data: Path, tokenizer: Any, size: int, limit: int | None) -> Measure:
    """Zero-shot top-1 on the validation images and on the unseen classes."""
    files = {"val": "tiny_imagenet_val.parquet", "unseen": "imagenette_unseen.parquet"}
    held = {}
    for name, file in files.items():
        dataset = open_dataset(data / file)
        held[name] = (*stack(dataset, size, limit, seed=0), dataset.names)

    def measure(model: Any) -> dict[str, float]:
        model.eval()
        with torch.autocast(model.device.type, torch.bfloat16):
            return {
                name: float(top1(model, tokenizer, *known).float().mean())
                for name, known in held.items()
            }

    return measure


def export(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write the model for `from_pretrained`: fp16 safetensors, tokenizer, preprocessor."""
    directory.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).cpu().half().save_pretrained(directory)
    # Padding and truncation of the last call would be saved with the vocabulary.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(directory)
    size = model.config.vision_config.image_size
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def warm_start(model: Any, tokenizer: Any, directory: Path) -> None:
    """Take over the weights of an exported model: all, or without the text tower's where its
    vocabulary is another."""
    known = CLIPModel.from_pretrained(directory, dtype=torch.float32).state_dict()
    if AutoTokenizer.from_pretrained(directory).get_vocab() != tokenizer.get_vocab():
        known = {name: value for name, value in known.items() if not name.startswith("text_")}
    model.load_state_dict({**model.state_dict(), **known})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded CLIP.")
    parser.add_argument("--data", type=Path, required=True, help="directory of the parquet files")
    parser.add_argument(
        "--wordnet",
        type=Path,
        default=Path("/usr/share/wordnet"),
        help="directory of WordNet's database files (Debian: wordnet-base)",
    )
    parser.add_argument("--config", choices=sorted(RECIPES), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/embedded"))
    parser.add_argument("--cache", type=Path, help="decoded images (default: OUT/cache)")
    parser.add_argument("--minutes", type=float, default=90.0, help="training time in all")
    parser.add_argument("--steps", type=int, help="number of steps, in place of --minutes")
    parser.add_argument("--init", type=Path, help="start from the weights of an exported model")
    parser.add_argument("--export", type=Path, help="write the model here (default: OUT/model)")
    parser.add_argument("--every", type=float, default=240.0, help="seconds between checkpoints")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=JSON", help="change values of the recipe"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    changes = dict(pair.split("=", 1) for pair in options.set)
    recipe = replace(
        RECIPES[options.config], **{key: json.loads(value) for key, value in changes.items()}
    )
    shards = sorted(options.data.glob("tiny_imagenet_train_*.parquet"))
    if not shards:
        raise SystemExit(f"no tiny_imagenet_train_*.parquet in {options.data}")
    try:
        images, labels = load_images(shards, options.cache or options.out / "cache", recipe.size)
        targets = Targets.read(options.data, options.wordnet, device)
    except (DataError, OSError) as error:
        raise SystemExit(str(error)) from error
    tokenizer = train_tokenizer(targets.texts, recipe.vocabulary, recipe.context)
    model = build_model(recipe, tokenizer)
    if options.init:
        warm_start(model, tokenizer, options.init)
    budget = Budget(options.steps, None if options.steps else options.minutes * 60)
    model = model.to(device).train()
    trainer = Trainer(model, tokenizer, targets, images, labels, recipe, budget)
    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"going on from step {trainer.step}, epoch {trainer.epoch:.1f}")
    measure = measure_on(options.data, tokenizer, recipe.size, limit=1000)
    for row in run(trainer, options.out, measure, options.every):
        print(json.dumps(row), flush=True)
    export(trainer.average, tokenizer, options.export or options.out / "model")


if __name__ == "__main__":
    main()
