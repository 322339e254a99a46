"""Fine-tune a checkpoint's image tower against attacks, and write it as a new checkpoint.

    tapt-serve harden --data DIR --out DIR [--model embedded] ...

Labelled images are learned by their class names, unlabelled ones by the original's embeddings.
`OUT.partial` holds the decoded images, the states of the run and `log.jsonl`. The same command
continues a run that was stopped; another `--steps` extends it or ends it early. Several GPUs of one
machine share the batches:

    torchrun --nproc-per-node N -m models.calibration.harden --device cuda ...
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress as Bar
from torch import Tensor

from models.arguments import read_number
from models.calibration import processes
from models.calibration.decoded import decode_once
from models.calibration.hardening import Hardening, HardeningTrainer, image_parameters
from models.calibration.hardening_run import Run, Validation
from models.checkpoint import Checkpoint, load_checkpoint
from models.classifier import DEFAULT_TEMPLATE
from models.clip import PromptedCLIP
from models.data import DataError, open_dataset
from models.device import pick_device
from models.errors import LoadError
from models.export import stored_dtype, write_checkpoint
from models.labels import tokenize
from models.shipped import SHIPPED
from models.views import make_views

CPU = torch.device("cpu")


def harden(options: argparse.Namespace, settings: Hardening, bar: Bar) -> bool:
    """From the command's options to the new checkpoint; whether the run reached its end.

    Raises:
        LoadError, DataError, ValueError: checkpoint, images or an earlier run cannot be used.
    """
    rank, device = processes.rank(), processes.own_device(pick_device(options.device))
    checkpoint = load_checkpoint(options.model, device, tokenizer=options.tokenizer)
    data = open_dataset(*options.data)
    partial = options.out.with_name(options.out.name + ".partial")
    source = ", ".join(path.name for path in options.data)
    task = bar.add_task("reading images", total=len(data))

    def read() -> Any:
        return decode_once(
            data,
            source,
            checkpoint.preprocessing,
            partial,
            lambda done: bar.update(task, completed=done),
        )

    if rank == 0:
        read()
    processes.wait_for_all()
    pixels, labels = read()  # the second time, the files are there
    bar.remove_task(task)
    labelled = bool(data.names) and not options.unsupervised
    text = encode_names(checkpoint, data.names) if labelled else None
    trainer = HardeningTrainer(
        checkpoint.clip, pixels, labels if labelled else None, text, settings
    )
    identity = {
        "checkpoint_sha256": checkpoint.sha256,
        "data": source,
        "pictures": len(pixels),
        "loss": "labelled" if labelled else "unsupervised",
        "batch": settings.batch,
        "seed": settings.seed,
    }
    if options.tokenizer:
        identity["tokenizer"] = options.tokenizer
    run = Run(trainer, partial, identity)
    run.resume()
    validation = None
    if options.validate and rank == 0:
        validation = read_validation(checkpoint, options.validate, options.validate_limit)
    if not run.train(validation, bar):
        return False
    if rank == 0:
        provenance = {
            "base": checkpoint.name,
            **identity,
            "classes": len(data.names) if labelled else 0,
            "steps": trainer.step,
            "phases": run.phases,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        _write(checkpoint, trainer.average, options.out, provenance)
    return True


def _write(
    checkpoint: Checkpoint, hardened: PromptedCLIP, out: Path, provenance: dict[str, Any]
) -> None:
    """Write the image weights of `hardened` with everything else of `checkpoint`, in the dtype of
    its files. `checkpoint` takes over the weights."""
    with torch.no_grad():
        own = image_parameters(checkpoint.clip)
        for name, value in image_parameters(hardened).items():
            own[name].copy_(value)
    write_checkpoint(
        checkpoint.clip.model.to(stored_dtype(checkpoint.directory)),
        checkpoint.tokenizer,
        checkpoint.preprocessing,
        out,
        {"hardening.json": provenance},
    )


def encode_names(checkpoint: Checkpoint, names: list[str]) -> Tensor:
    """Unit-length text features [C, D] of class names in the default template."""
    clip = checkpoint.clip
    texts = [DEFAULT_TEMPLATE.replace("{}", name) for name in names]
    end = clip.model.config.text_config.eos_token_id
    batch = tokenize(checkpoint.tokenizer, end, texts, clip.context_length)
    return clip.encode_labels(batch.to(clip.device))


def read_validation(checkpoint: Checkpoint, path: Path, limit: int) -> Validation:
    """A random sample of labelled images. Raises DataError where there are no labels."""
    data, device = open_dataset(path), checkpoint.clip.device
    if not data.names:
        raise DataError(f"{path} has no labels to validate with")
    prepared = checkpoint.preprocessing
    examples = list(data.examples(limit, 0, prepared))
    if not examples:
        raise DataError(f"there are no images to validate with: the limit is {limit}")
    views = [make_views(e.pixels, 1, 0, prepared, CPU, e.view)[0] for e in examples]
    labels = torch.tensor([example.label for example in examples], device=device)
    return Validation(torch.stack(views).to(device), labels, encode_names(checkpoint, data.names))


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="tapt-serve harden",
        description="Fine-tune a checkpoint's image tower against attacks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="embedded",
        help=f"{', '.join(SHIPPED)}, a directory, or a hub id [env: TAPT_MODEL]",
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        help="directory or hub id, which the new checkpoint gets too; default: the model's own "
        "[env: TAPT_TOKENIZER]",
    )
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        help="a directory of images, or one or several parquet files",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the new checkpoint")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    parser.add_argument("--unsupervised", action="store_true", help="ignore the labels")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--validate", type=Path, help="labelled images to measure in the log")
    parser.add_argument("--validate-limit", type=int, default=400, help="how many of them")
    training = parser.add_argument_group("training")
    for option in fields(Hardening):
        flag, value = f"--{option.name.replace('_', '-')}", option.default
        more: dict[str, Any] = {"default": value, "help": option.metadata["help"]}
        if choices := option.metadata.get("choices"):
            more["choices"] = choices
        elif isinstance(value, tuple):
            more |= {"type": read_number, "nargs": 2, "metavar": ("LOW", "HIGH")}
        else:
            more |= {"type": read_number if isinstance(value, float) else int, "metavar": "N"}
        training.add_argument(flag, **more)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status: 1 where it failed or was stopped, 2 for a wrong option."""
    parser = make_parser()
    options = parser.parse_args(argv)
    values = {option.name: getattr(options, option.name) for option in fields(Hardening)}
    try:
        settings = Hardening(**values | {"crop_area": tuple(options.crop_area)})
    except ValueError as error:
        parser.error(str(error))
    if options.out.exists() and not options.force:
        parser.error(f"{options.out} exists; --force replaces it")
    try:
        with processes.joined(options.device) as rank, Bar(disable=rank > 0) as bar:
            ended = harden(options, settings, bar)
    except (LoadError, DataError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    partial = options.out.with_name(options.out.name + ".partial")
    if not ended:
        print(f"stopped; the same command continues from {partial}", file=sys.stderr)
        return 1
    print(f"{options.out}: {settings.steps} steps; {partial} can be removed, or extended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
