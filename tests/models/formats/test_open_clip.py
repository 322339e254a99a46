"""A CLIP in OpenCLIP's layout is the same model; what a `CLIPModel` cannot be is refused."""

import contextlib
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from models.checkpoint import build_clip, find_checkpoint, load_checkpoint
from models.classifier import DefendedClassifier
from models.errors import LoadError
from tests import open_clip, tiny

VOCABULARY, CONTEXT = 700, 24

# Each as OpenCLIP and as transformers say it.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gelu": (
        {"width": 64, "head_width": 32, "layers": 2, "patch_size": 8, "image_size": 32},
        {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2},
    ),
    "wide heads and a fractional ratio, as ViT-g": (
        {
            "width": 88,
            "head_width": 44,
            "layers": 3,
            "patch_size": 14,
            "image_size": 42,
            "mlp_ratio": 4.3637,
        },
        {"hidden_size": 88, "intermediate_size": 384, "num_attention_heads": 2},
    ),
    "pixels beyond the last whole patch": (
        {"width": 64, "layers": 2, "patch_size": [16, 16], "image_size": [40, 40]},
        {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1},
    ),
    "another epsilon": (
        {
            "width": 48,
            "head_width": 16,
            "layers": 2,
            "patch_size": 8,
            "image_size": 32,
            "norm_kwargs": {"eps": 0.01},
        },
        {
            "hidden_size": 48,
            "intermediate_size": 192,
            "num_attention_heads": 3,
            "layer_norm_eps": 0.01,
        },
    ),
}


def side(value: Any) -> int:
    return int(value[0] if isinstance(value, list) else value)


def make(shape: str, act: str = "gelu") -> tuple[CLIPModel, dict[str, Any]]:
    """A random model and its `model_cfg`."""
    vision, ours = SHAPES[shape]
    config = CLIPConfig(
        projection_dim=40,
        vision_config={
            **ours,
            "num_hidden_layers": vision["layers"],
            "image_size": side(vision["image_size"]),
            "patch_size": side(vision["patch_size"]),
            "hidden_act": act,
        },
        text_config={
            "hidden_size": 48,
            "intermediate_size": 168,
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "max_position_embeddings": CONTEXT,
            "vocab_size": VOCABULARY,
            "hidden_act": act,
            "eos_token_id": 2,  # pooled at the largest id, as in OpenCLIP
        },
    )
    torch.manual_seed(3)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.3 if parameter.dim() == 1 else 0.05))
        model.logit_scale.fill_(2.5)
    text = {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": 48,
        "heads": 3,
        "layers": 2,
        "mlp_ratio": 3.5,
    }
    given: dict[str, Any] = {"embed_dim": 40, "vision_cfg": vision, "text_cfg": text}
    return model, given | ({"quick_gelu": True} if act == "quick_gelu" else {})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but a tokenizer."""
    source = tiny.save_checkpoint(tmp_path_factory.mktemp("tokenizer") / "whole", context=CONTEXT)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (source / name).unlink()
    return source


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_clip.write(tmp_path_factory.mktemp("models") / "original", *make("gelu"))


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def change(directory: Path, part: str, **values: Any) -> None:
    """Set keys of the model's configuration; `part` is one of its towers, or empty."""
    file = directory / "open_clip_config.json"
    config = json.loads(file.read_text())
    model = config["model_cfg"]
    (model[part] if part else model).update(copy.deepcopy(values))
    file.write_text(json.dumps(config))


def features(directory: Path, tokenizer: Path, **options: Any) -> torch.Tensor:
    """Image and label features of a few views and labels."""
    checkpoint = load_checkpoint(str(directory), tiny.CPU, tokenizer=str(tokenizer), **options)
    size = checkpoint.clip.image_size
    pixels = torch.rand(1, 5, 3, size, size, generator=torch.Generator().manual_seed(1))
    images = checkpoint.clip.encode_images(pixels).features[0]
    encoder = DefendedClassifier(checkpoint, None).encoder
    labels = encoder.encode(tiny.LABELS, None, "none")
    logits = checkpoint.clip.class_logits(images[None], labels.features, labels.batch)
    return torch.cat([images.flatten(), labels.features.flatten(), logits.flatten()])


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_layouts_are_one_model(tmp_path: Path, tokenizer: Path, shape: str, act: str) -> None:
    model, given = make(shape, act)
    model.save_pretrained(tmp_path / "transformers")
    expected = features(tmp_path / "transformers", tokenizer)
    for name, custom in (("flat", False), ("custom", True)):
        source = open_clip.write(tmp_path / name, model, given | {"custom_text": custom})
        torch.testing.assert_close(features(source, tokenizer), expected, atol=1e-5, rtol=0)


def test_the_activation_can_be_overridden(directory: Path, tokenizer: Path) -> None:
    plain = features(directory, tokenizer)
    other = features(directory, tokenizer, quick_gelu=True)
    assert (plain - other).abs().max() > 1e-3
    change(directory, "", quick_gelu=True)
    assert torch.equal(features(directory, tokenizer), other)
    assert torch.equal(features(directory, tokenizer, quick_gelu=False), plain)


def test_half_precision_and_a_scale_of_one_dimension(directory: Path, tokenizer: Path) -> None:
    file = directory / "open_clip_model.safetensors"
    rounded = {name: value.half() for name, value in load_file(file).items()}
    save_file({name: value.float() for name, value in rounded.items()}, file)
    expected = features(directory, tokenizer)
    save_file(rounded | {"logit_scale": rounded["logit_scale"].reshape(1)}, file)
    torch.testing.assert_close(features(directory, tokenizer), expected, atol=1e-6, rtol=0)


def test_the_clip_vocabulary_ends_texts_with_its_own_token(tmp_path: Path) -> None:
    model, given = make("gelu")
    del given["text_cfg"]["vocab_size"]
    config = find_checkpoint(str(open_clip.write(tmp_path / "a", model, given))).config
    assert (config.text_config.vocab_size, config.text_config.eos_token_id) == (49_408, 49_407)


@pytest.mark.parametrize(
    ("given", "short_side", "size", "resample", "mean"),
    [
        ({}, 32, None, 3, 0.48145466),
        ({"resize_mode": None, "mean": None}, 32, None, 3, 0.48145466),
        ({"resize_mode": "shortest", "interpolation": "bilinear"}, 32, None, 2, 0.48145466),
        ({"resize_mode": "squash", "mean": [0.5, 0.4, 0.3], "size": 9}, None, (32, 32), 3, 0.5),
        ({"interpolation": "random", "mean": 0.25, "std": 0.5}, 32, None, 3, 0.25),
    ],
)
def test_preprocessing(
    tmp_path: Path, given: Any, short_side: Any, size: Any, resample: int, mean: float
) -> None:
    source = find_checkpoint(str(open_clip.write(tmp_path / "a", *make("gelu"), given)))
    found = source.preprocessing
    assert (found.crop, found.short_side, found.size) == (32, short_side, size)
    assert (found.resample, found.mean[0]) == (resample, mean)
    assert build_clip(source, tiny.CPU)._mean.flatten().tolist() == pytest.approx(found.mean)


@pytest.mark.parametrize(
    ("part", "values", "sentence"),
    [
        ("vision_cfg", {"timm_model_name": "vitamin_base_224"}, "timm image tower.*vitamin_base"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "Hugging Face text tower.*roberta-base"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "ResNet image tower"),
        ("vision_cfg", {"pool_type": "avg"}, "pool_type.*avg"),
        ("text_cfg", {"pool_type": "eos", "eos_id": 2}, "pool_type.*eos"),
        ("vision_cfg", {"attentional_pool": True}, "attentional pooling"),
        ("text_cfg", {"no_causal_mask": True}, "causal mask"),
        ("vision_cfg", {"ls_init_value": 1e-5}, "layer scale"),
        ("text_cfg", {"ls_init_value": 1e-5}, "layer scale"),
        ("text_cfg", {"embed_cls": True}, "class token"),
        ("vision_cfg", {"qk_norm": True}, "qk_norm"),
        ("vision_cfg", {"norm_kwargs": {"elementwise_affine": False}}, "elementwise_affine"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "canonicalize"}}, "tokenizer_kwargs"),
        ("", {"multimodal_cfg": {"width": 512}}, "text decoder"),
        ("", {"init_logit_bias": -10}, "logit bias"),
        ("vision_cfg", {"image_size": [32, 64]}, "sides of different lengths"),
        ("vision_cfg", {"head_width": 100}, "num_attention_heads"),
        ("vision_cfg", {"width": "wide"}, "vision_cfg.width"),
        ("vision_cfg", {"layers": 10**9}, "num_hidden_layers"),
        ("vision_cfg", {"mlp_ratio": -1}, "mlp_ratio"),
    ],
)
def test_what_is_no_clip_model_is_named(
    directory: Path, part: str, values: dict[str, Any], sentence: str
) -> None:
    change(directory, part, **values)
    with pytest.raises(LoadError, match=sentence) as refused:
        find_checkpoint(str(directory))
    assert "\n" not in str(refused.value)
    assert "open_clip_config.json" in str(refused.value)


@pytest.mark.parametrize(
    "given", [{"resize_mode": "longest"}, {"mean": [0.5]}, {"std": 0}, {"interpolation": "area"}]
)
def test_other_preprocessing_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    source = open_clip.write(tmp_path / "a", *make("gelu"), given)
    with pytest.raises(LoadError, match=next(iter(given))):
        find_checkpoint(str(source))


def test_neutral_values_are_accepted(directory: Path) -> None:
    change(directory, "vision_cfg", ls_init_value=None, pool_type="tok", patch_dropout=0.5)
    change(directory, "text_cfg", hf_tokenizer_name="some/tokenizer", no_causal_mask=False)
    change(directory, "", custom_text=True, init_logit_scale=2.6, multimodal_cfg=None)
    find_checkpoint(str(directory))


@pytest.mark.parametrize(
    ("rename", "sentence"),
    [
        ("visual.transformer.resblocks.0.ls_1.gamma", "no place for its weights .*ls_1.gamma"),
        ("logit_bias", "no place for its weights logit_bias"),
        (None, "lacks weights .*post_layernorm"),
    ],
)
def test_other_weights_are_named(directory: Path, rename: str | None, sentence: str) -> None:
    file = directory / "open_clip_model.safetensors"
    tensors = load_file(file)
    value = tensors.pop("visual.ln_post.weight")
    save_file(tensors if rename is None else tensors | {rename: value}, file)
    with pytest.raises(LoadError, match=sentence):
        build_clip(find_checkpoint(str(directory)), tiny.CPU)


def test_weights_of_another_shape_are_named(directory: Path) -> None:
    change(directory, "vision_cfg", image_size=48)
    with pytest.raises(LoadError, match=r"another shape: vision_model.*position_embedding"):
        build_clip(find_checkpoint(str(directory)), tiny.CPU)


def test_damaged_files_are_refused(directory: Path) -> None:
    (directory / "open_clip_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(LoadError, match="cannot be loaded"):
        build_clip(find_checkpoint(str(directory)), tiny.CPU)
    (directory / "open_clip_config.json").write_text("{")
    with pytest.raises(LoadError, match="not JSON"):
        find_checkpoint(str(directory))


def test_of_two_formats_the_one_with_weights_is_loaded(directory: Path, tmp_path: Path) -> None:
    model, _ = make("gelu")
    model.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", directory)
    assert find_checkpoint(str(directory)).files[0].name == "open_clip_model.safetensors"
    shutil.copy(tmp_path / "other" / "model.safetensors", directory)
    assert find_checkpoint(str(directory)).files[0].name == "model.safetensors"
    (directory / "config.json").write_text('{"architecture": "vit_base_patch16_clip_224"}')
    assert find_checkpoint(str(directory)).files[0].name == "open_clip_model.safetensors"


def places(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every value in an object of objects."""
    found = []
    for name, value in values.items():
        found.append((*path, name))
        found += places(value, (*path, name)) if isinstance(value, dict) else []
    return found


@pytest.mark.parametrize("odd", [None, True, -1, 0, 2**70, 1e308, "x", [], [1, [2]], {}], ids=repr)
def test_an_odd_value_anywhere_is_refused_or_does_no_harm(directory: Path, odd: Any) -> None:
    file = directory / "open_clip_config.json"
    whole = json.loads(file.read_text())
    whole["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    for *parents, name in places(whole):
        changed = copy.deepcopy(whole)
        part = changed
        for parent in parents:
            part = part[parent]
        part[name] = odd
        file.write_text(json.dumps(changed))
        with contextlib.suppress(LoadError):
            build_clip(find_checkpoint(str(directory)), tiny.CPU)
