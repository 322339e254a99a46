"""OpenCLIP's format: `open_clip_config.json` and `open_clip_model.safetensors`.

Its plain ViT towers compute what transformers' `CLIPModel` does, under other names. Anything else
that OpenCLIP can build is refused. Defaults are those of open_clip 3.3.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from models.errors import LoadError
from models.file_schemas import CheckpointConfig, Deviation, FileSchema, Finite, Side
from models.formats.checkpoint_format import (
    Architecture,
    check_config,
    check_report,
    read_config,
)
from models.images.preprocess import BICUBIC, BILINEAR, Preprocessing
from models.preprocessing import OPENAI_MEAN, OPENAI_STD

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
PICKLED = "open_clip_pytorch_model.bin"

CLIP_VOCABULARY, CLIP_END = 49_408, 49_407
LARGEST_ID = 2
"""As `eos_token_id`, makes transformers pool the text at its largest id, as OpenCLIP does."""

FILTERS = {"bicubic": BICUBIC, "bilinear": BILINEAR, "random": BICUBIC}


# The configuration.

# Keys that change nothing at inference, or nothing unless a key that is checked asks for it.
WITHOUT_EFFECT = re.compile(
    r"custom_text|init_logit_scale|nonscalar_logit_scale|output_dict|cast_dtype|output_tokens"
    r"|patch_dropout|pos_embed_type|attn_pooler_\w+|timm_\w+|hf_\w+|pad_id|bos_id|eos_id"
    r"|tiktoken_name"
)


def _only(supported: object, meaning: str) -> AfterValidator:
    """Of a field with one supported value; `meaning` is what any other asks for. None, 0 and empty
    values mean that a feature is off."""

    def refuse(value: object) -> object:
        if value and value != supported:
            raise ValueError(f"{meaning} ({str(value)[:64]}) is not supported")
        return value

    return AfterValidator(refuse)


def _square(value: object) -> object:
    if isinstance(value, list) and len(value) == 2:
        if value[0] != value[1]:
            raise ValueError(f"sides of different lengths ({value}) are not supported")
        return value[0]
    return value


def _refuse_resnet(value: object) -> object:
    if isinstance(value, list):
        raise ValueError("a ResNet image tower is not supported")
    return value


def _refuse_longest(mode: str) -> str:
    if mode == "longest":
        raise ValueError("fitting the longest side and padding (longest) is not supported")
    return mode


Count = Annotated[int, Field(ge=1)]
Ratio = Annotated[Finite, Field(gt=0, le=64)]
Sides = Annotated[Side, BeforeValidator(_square)]


class _Part(FileSchema, extra="allow"):
    @model_validator(mode="after")
    def _check_unknown(self) -> Self:
        for key, value in (self.model_extra or {}).items():
            if value and not WITHOUT_EFFECT.fullmatch(key):
                raise ValueError(f"{key} ({str(value)[:64]}) is not supported")
        return self


class _NormSettings(FileSchema, extra="forbid"):
    eps: Annotated[Finite, Field(gt=0, lt=1)] = 1e-5


class _Tower(_Part):
    layers: Annotated[Count, BeforeValidator(_refuse_resnet)] = 12
    mlp_ratio: Ratio = 4.0
    norm_kwargs: _NormSettings | None = None
    ls_init_value: Annotated[Any, _only(None, "layer scale")] = None
    block_type: Annotated[Any, _only("default", "this type of blocks")] = None
    act_kwargs: Annotated[Any, _only(None, "another activation")] = None
    final_ln_after_pool: Annotated[Any, _only(False, "a norm after the pooling")] = False


class _VisionTower(_Tower):
    timm_model_name: Annotated[Any, _only(None, "a timm image tower")] = None
    image_size: Sides = 224
    patch_size: Sides = 16
    width: Count = 768
    head_width: Count = 64
    pool_type: Annotated[Any, _only("tok", "this pooling")] = "tok"
    attentional_pool: Annotated[Any, _only(False, "attentional pooling")] = False
    no_ln_pre: Annotated[Any, _only(False, "a tower without a first norm")] = False


class _TextTower(_Tower):
    hf_model_name: Annotated[Any, _only(None, "a Hugging Face text tower")] = None
    text_arch: Annotated[Any, _only("clip", "this text tower")] = "clip"
    context_length: Count = 77
    vocab_size: Count = 49_408
    width: Count = 512
    heads: Count = 8
    pool_type: Annotated[Any, _only("argmax", "this pooling")] = "argmax"
    no_causal_mask: Annotated[Any, _only(False, "attention without a causal mask")] = False
    embed_cls: Annotated[Any, _only(False, "a class token")] = False
    proj_type: Annotated[Any, _only("linear", "this projection")] = "linear"
    proj_bias: Annotated[Any, _only(False, "a projection with a bias")] = False


class _Model(_Part):
    embed_dim: Count
    vision_cfg: _VisionTower
    text_cfg: _TextTower
    quick_gelu: bool = False
    init_logit_bias: Annotated[Any, _only(None, "a logit bias")] = None
    multimodal_cfg: Annotated[Any, _only(None, "a text decoder")] = None


def _three(value: object) -> object:
    if isinstance(value, int | float):
        return (value,) * 3
    return tuple(value) if isinstance(value, list) else value


class _Preprocess(FileSchema):
    mean: Annotated[tuple[Finite, Finite, Finite], BeforeValidator(_three)] = OPENAI_MEAN
    std: Annotated[tuple[Deviation, Deviation, Deviation], BeforeValidator(_three)] = OPENAI_STD
    mode: Literal["RGB"] = "RGB"
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Annotated[
        Literal["shortest", "squash", "longest"], AfterValidator(_refuse_longest)
    ] = "shortest"

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: object) -> object:
        """Null stands for a default."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}


class _OpenClipConfig(FileSchema):
    model_cfg: _Model
    preprocess_cfg: _Preprocess = _Preprocess()


def recognizes(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def read_architecture(directory: Path, files: Sequence[Path], name: str) -> Architecture:
    values = read_config(directory / CONFIG, name)
    whole = check_config(_OpenClipConfig, values, name, CONFIG)
    config = _clip_config(whole.model_cfg)
    check_config(CheckpointConfig, config, name, CONFIG)
    size, settings = whole.model_cfg.vision_cfg.image_size, whole.preprocess_cfg
    squash = settings.resize_mode == "squash"
    preprocessing = Preprocessing(
        crop=size,
        short_side=None if squash else size,
        size=(size, size) if squash else None,
        resample=FILTERS[settings.interpolation],
        mean=settings.mean,
        std=settings.std,
    )
    return Architecture(CLIPConfig(**config), preprocessing)


def _clip_config(model: _Model) -> dict[str, Any]:
    """The arguments of a `CLIPConfig`."""
    vision, text = model.vision_cfg, model.text_cfg

    def tower(of: _VisionTower | _TextTower, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": of.width,
            "intermediate_size": int(of.width * of.mlp_ratio),
            "num_hidden_layers": of.layers,
            "num_attention_heads": heads,
            "hidden_act": "quick_gelu" if model.quick_gelu else "gelu",
            "layer_norm_eps": of.norm_kwargs.eps if of.norm_kwargs else 1e-5,
        }

    is_clips = text.vocab_size == CLIP_VOCABULARY
    return {
        "projection_dim": model.embed_dim,
        "vision_config": {
            **tower(vision, vision.width // vision.head_width),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text_config": {
            **tower(text, text.heads),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "bos_token_id": CLIP_END - 1 if is_clips else None,
            "eos_token_id": CLIP_END if is_clips else LARGEST_ID,
            "pad_token_id": CLIP_END if is_clips else None,
        },
    }


# The weights.

_DIRECT = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_IN_PROJECTION = re.compile(
    r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)"
)
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_DROPPED = {"attn_mask", "context_length", "input_resolution", "vocab_size"}  # no weights


def load_model(config: CLIPConfig, files: Sequence[Path], name: str) -> CLIPModel:
    if files[0].suffix == ".safetensors":
        tensors = load_file(files[0])
    else:
        tensors = _load_pickled(files[0], name)
    model, report = CLIPModel.from_pretrained(
        None,
        config=config,
        state_dict=_rename(tensors, name),
        dtype=torch.float32,
        attn_implementation="sdpa",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that the report names them
    )
    check_report(report, name)
    return model


def _load_pickled(file: Path, name: str) -> dict[str, Tensor]:
    """The state dict of a model or of a training run, read without running any of its code."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged and of hostile files alike
        raise LoadError(
            f"{name} has no weights in {file.name} that can be read without running its code"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise LoadError(f"{name} has no state dict in {file.name}")
    return {str(key).removeprefix("module."): value for key, value in found.items()}


def _rename(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors under a `CLIPModel`'s names and in its shapes.

    Raises:
        LoadError: one of them has no place there.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        short = key.removeprefix("text.")  # where the configuration says `custom_text`
        if short in _DIRECT:
            renamed[_DIRECT[short]] = value.reshape(()) if short == "logit_scale" else value
        elif short in _TRANSPOSED:
            renamed[_TRANSPOSED[short]] = value.T.contiguous()
        elif found := _IN_PROJECTION.fullmatch(short):
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{_layer(found)}.self_attn.{letter}_proj.{found[3]}"] = part
        elif (found := _BLOCK.fullmatch(short)) and found[3] in _IN_BLOCK:
            renamed[f"{_layer(found)}.{_IN_BLOCK[found[3]]}.{found[4]}"] = value
        elif short not in _DROPPED:
            raise LoadError(
                f"{name} cannot be loaded as a CLIP: a CLIPModel has no place for its weights {key}"
            )
    return renamed


def _layer(found: re.Match[str]) -> str:
    return f"{'vision' if found[1] else 'text'}_model.encoder.layers.{found[2]}"
