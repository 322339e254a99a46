"""The checkpoints that all peers load: the embedded one, and a random one of ViT-B/32 size."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.peers.peer import Model
from benchmarks.sides import build_classifier
from models.checkpoint import load_checkpoint
from models.preprocessing import OPENAI_MEAN, OPENAI_STD
from models.shipped import EMBEDDED

SIZES = ("embedded", "vit-b-32")


def prepare_model(size: str, cache: Path) -> Model:
    """The checkpoint of a size with its bundle. The random one is written below `cache`, once."""
    if size == "embedded":
        return Model(size, EMBEDDED, EMBEDDED / "bundle")
    model = Model(size, (cache / size).absolute(), (cache / f"{size}-bundle").absolute())
    if not model.bundle.is_dir():  # written last
        _write(model)
    return model


def _write(model: Model) -> None:
    classifier = build_classifier(model.name, "cpu", "fp32")
    clip, bundle = classifier.checkpoint.clip, classifier.bundle
    assert bundle is not None
    clip.model.save_pretrained(model.directory)
    classifier.checkpoint.tokenizer.save_pretrained(model.directory)
    side = clip.image_size
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": 3,
        "image_mean": OPENAI_MEAN,
        "image_std": OPENAI_STD,
    }
    (model.directory / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    written = load_checkpoint(str(model.directory), torch.device("cpu"))
    replace(bundle, checkpoint_sha256=written.sha256).save(model.bundle)
