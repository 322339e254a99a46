"""Schemas of the JSON files that an operator hands over: config, image processor, defense bundle.

They are checked before anything is built from them: a config can ask for a billion layers, and a
threshold that is not a number suspects nobody. Fields that nothing here depends on are ignored.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

MAX_FILE = 64 * 2**20  # bytes

Side = Annotated[int, Field(ge=1, le=4096)]
"""Of an image or a patch, in pixels."""

Finite = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class FileSchema(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


Model = TypeVar("Model", bound=FileSchema)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an object in JSON, or larger than MAX_FILE.
    """
    with path.open("rb") as file:
        content = file.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise ValueError(f"{path.name} is larger than {MAX_FILE} bytes")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name} is not JSON") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return values


def check(schema: type[Model], values: Mapping[str, Any], name: str) -> Model:
    """The values as a model. Raises ValueError with the first problem in one sentence; `name` is
    that of the file."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:64]
        what = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{name}: {where}: {what}" if where else f"{name}: {what}") from None


# A checkpoint.


def _refuse_kernel(name: str | None) -> str | None:
    if name is not None and "/" in name:
        raise ValueError("code from the hub is never run, so no kernel is taken from there")
    return name


Attention = Annotated[str | None, AfterValidator(_refuse_kernel)]


class _Tower(FileSchema):
    """One of the two transformers. What is absent, transformers fills in."""

    hidden_size: int = Field(default=512, ge=1, le=16_384)
    intermediate_size: int = Field(default=2048, ge=1, le=65_536)
    num_hidden_layers: int = Field(default=12, ge=1, le=256)
    num_attention_heads: int = Field(default=8, ge=1, le=256)
    attention: Attention = Field(default=None, alias="_attn_implementation")

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size is no multiple of num_attention_heads")
        return self


class _VisionTower(_Tower):
    image_size: Side = 224
    patch_size: Side = 32
    hidden_size: int = Field(default=768, ge=1, le=16_384)
    num_attention_heads: int = Field(default=12, ge=1, le=256)

    @model_validator(mode="after")
    def _check_patches(self) -> Self:
        if self.patch_size > self.image_size:
            raise ValueError("patch_size is larger than image_size")
        return self


class _TextTower(_Tower):
    vocab_size: int = Field(default=49_408, ge=1, le=2_000_000)
    max_position_embeddings: int = Field(default=77, ge=3, le=8192)


def _refuse(value: object) -> object:
    if value is not None:
        raise ValueError("quantized checkpoints are not supported")
    return value


class CheckpointConfig(FileSchema):
    """`config.json` of a CLIP, as far as sizes follow from it. Where an old one has `*_dict` as
    well, transformers lets that win."""

    text_config: _TextTower | None = None
    vision_config: _VisionTower | None = None
    text_config_dict: _TextTower | None = None
    vision_config_dict: _VisionTower | None = None
    attention: Attention = Field(default=None, alias="_attn_implementation")
    projection_dim: int = Field(default=512, ge=1, le=16_384)
    quantization_config: Annotated[Any, AfterValidator(_refuse)] = None


class _Size(FileSchema):
    """A size as transformers names it: by a set of keys."""

    model_config = ConfigDict(extra="forbid")

    shortest_edge: Side | None = None
    longest_edge: Side | None = None
    height: Side | None = None
    width: Side | None = None
    max_height: Side | None = None
    max_width: Side | None = None

    @property
    def named(self) -> dict[str, int]:
        """The keys that are there."""
        return self.model_dump(exclude_none=True)


def _check_written_size(value: object) -> object:
    match value:
        case bool():
            pass
        case None | int() | [int(), int()] | [int(), int(), int()]:
            return value
        case dict() if any(side is not None for side in value.values()):
            return value
    raise ValueError(
        'should be pixels, [height, width], or an object such as {"shortest_edge": 224}'
    )


_WrittenSize = Annotated[Any, AfterValidator(_check_written_size)]


class ImageProcessorFile(FileSchema):
    """What must hold of `preprocessor_config.json` so that transformers, which interprets it, does
    not fail with an error that names nothing."""

    image_processor_type: str | None = None
    feature_extractor_type: str | None = None
    size: _WrittenSize = None
    crop_size: _WrittenSize = None
    pad_size: _WrittenSize = None


def _each_channel(value: object) -> object:
    """One value for all channels, as three."""
    return (value,) * 3 if isinstance(value, int | float) else value


Deviation = Annotated[Finite, Field(gt=0)]


class ImageProcessorConfig(FileSchema):
    """The attributes of an image processor of transformers that its result depends on. None for
    `do_*` is false."""

    size: _Size
    crop_size: _Size
    pad_size: _Size
    do_resize: bool | None
    do_center_crop: bool | None
    do_rescale: bool | None
    do_normalize: bool | None
    resample: Annotated[int, Field(strict=False)] | None
    rescale_factor: Annotated[Finite, Field(gt=0)] | None
    image_mean: Annotated[tuple[Finite, Finite, Finite] | None, BeforeValidator(_each_channel)]
    image_std: Annotated[
        tuple[Deviation, Deviation, Deviation] | None, BeforeValidator(_each_channel)
    ]


# A bundle.


def _check_template(template: str) -> str:
    if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
        raise ValueError("a template holds exactly one {} and no other brace")
    return template


Share = Annotated[Finite, Field(ge=0, le=1)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class BundleMetadata(FileSchema):
    """`bundle.json`."""

    format: Literal[2]
    design: Literal["v", "vli", "vlj"]
    template: Annotated[str, Field(max_length=1024), AfterValidator(_check_template)]
    layers: int = Field(ge=0, le=256)
    checkpoint_sha256: Digest
    prompts_sha256: Digest
    suspicion: dict[Literal["learned", "none"], Finite]
    false_positive_rate: Share | None
    provenance: dict[str, Any]
