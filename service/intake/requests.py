"""The bodies of requests: what a client may ask for, and how it is validated."""

import unicodedata
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from models.defenses.catalog import Method, Readout
from service.settings import Settings
from service.texts import HIDDEN, check_template, read_list, read_templates

SEED_LIMIT = 2**63
"""Seeds are smaller than this."""


@dataclass(frozen=True, slots=True)
class TextLimits:
    """How many labels a request may hold, and how many characters a label or the template.

    Passed to pydantic as the validation context: texts are measured before anything else is done
    with them, because Unicode normalization takes quadratic time for a run of combining marks.
    """

    labels: int = 1000
    characters: int = 256

    @classmethod
    def of(cls, settings: Settings) -> "TextLimits":
        return cls(settings.max_labels, settings.max_label_chars)

    def check_count(self, count: int, what: str = "labels") -> None:
        if count > self.labels:
            message = "There are {count} {what}; the limit is {limit}"
            context = {"count": count, "what": what, "limit": self.labels}
            raise PydanticCustomError("text_limit", message, context)

    def check_text(self, text: object) -> None:
        if isinstance(text, str) and len(text) > self.characters:
            message = "A label or the template is longer than {limit} characters"
            raise PydanticCustomError("text_limit", message, {"limit": self.characters})


def _limits(info: ValidationInfo) -> TextLimits:
    return info.context if isinstance(info.context, TextLimits) else TextLimits()


def _measure(text: Any, info: ValidationInfo) -> Any:
    _limits(info).check_text(text)
    return text


def _split_and_measure(labels: Any, info: ValidationInfo) -> Any:
    limits = _limits(info)
    if isinstance(labels, str) and labels.lstrip().startswith("["):
        labels = read_list(labels)
    elif isinstance(labels, str):
        limits.check_count(labels.count(",") + 1)
        labels = labels.split(",")
    if isinstance(labels, list):
        limits.check_count(len(labels))
        for label in labels:
            limits.check_text(label)
    return labels


_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Zs"}  # Unicode categories


def _check_labels(labels: list[str]) -> list[str]:
    if len(labels) < 2:
        raise ValueError("at least two labels are needed")
    for label in labels:
        if HIDDEN.search(label):
            raise ValueError("a label holds a control character")
        if all(unicodedata.category(char) in _INVISIBLE for char in label):
            raise ValueError("a label is blank")
    # Tokenizers, like people, read the composed and decomposed forms of a letter as the same.
    if len({unicodedata.normalize("NFC", label) for label in labels}) < len(labels):
        raise ValueError("a label is repeated")
    return labels


def _read_templates(templates: Any, info: ValidationInfo) -> Any:
    """The templates as a list, measured and checked."""
    templates = read_templates(templates)
    limits = _limits(info)
    limits.check_count(len(templates), "templates")
    for template in templates:
        limits.check_text(template)
        if isinstance(template, str):
            check_template(template)
    return templates


Label = Annotated[str, StringConstraints(strip_whitespace=True), BeforeValidator(_measure)]
Labels = Annotated[
    list[Label],
    BeforeValidator(_split_and_measure, json_schema_input_type=list[str] | str),
    AfterValidator(_check_labels),
    Field(
        description="Two or more different labels. Surrounding white space is removed. A single "
        "string is read as a JSON array, or split at its commas.",
        examples=[["cat", "dog"]],
    ),
]
Templates = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(_read_templates, json_schema_input_type=str | list[str]),
    Field(
        description="The prompt around a label, with one `{}`; null for the server's default. Of "
        "several, the mean of the label's features counts. Labels times templates may not exceed "
        "the limit of labels.",
    ),
]


_STRICT = ConfigDict(strict=True, use_attribute_docstrings=True)


class DefenseOptions(BaseModel):
    """How to defend, and at what cost. The server's defaults fill in what is missing. Values above
    the server's limits are lowered to them; the answer reports what was used."""

    model_config = _STRICT | ConfigDict(extra="forbid")

    tier: Literal["fast", "standard", "deep"] | None = None
    """Cost of the options below that are missing; lowered to the server's highest tier."""
    method: Method | None = None
    steps: int | None = Field(default=None, ge=0)
    """Adaptation steps."""
    views: int | None = Field(default=None, ge=1)
    """Random views, the image itself included."""
    readout: Readout | None = None
    deadline_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Answer within this time, milliseconds: with fewer steps if need be, or with a 504."""
    seed: int | None = Field(default=None, ge=0, lt=SEED_LIMIT)
    """Seed of the random views; accepted only if the server allows it."""


class ClassifyOptions(BaseModel):
    """Everything in a request except its image."""

    model_config = _STRICT | ConfigDict(extra="forbid")

    candidate_labels: Labels
    top_k: int | None = Field(default=None, ge=1)
    """How many labels to return; all by default."""
    hypothesis_template: Templates | None = None
    defense: DefenseOptions | None = None


class ClassifyRequest(ClassifyOptions):
    """The JSON body of `POST /v1/classify`."""

    image: str
    """An image file as base64 or as a `data:` URI; or its `https:` URL, if the server allows it."""

    def without_image(self) -> Self:
        """A copy that does not hold the image in memory while the request waits."""
        return self.model_copy(update={"image": ""})


class AttackOptions(BaseModel):
    """The attack to demonstrate. Values above the limits are lowered to them."""

    model_config = _STRICT | ConfigDict(extra="forbid")

    epsilon: int = Field(ge=1)
    """Largest change of a color channel, in levels of 255."""
    steps: int = Field(ge=1)
    """Steps of projected gradient descent."""
    target: Label | None = None
    """Label to reach; null to leave the current one."""
    adaptive: bool = False
    """Whether to attack through the defense."""


class AttackRequest(ClassifyRequest):
    """The JSON body of `POST /demo/attack`."""

    attack: AttackOptions

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.attack.target not in (None, *self.candidate_labels):
            raise ValueError("the attack's target is none of the labels")
        return self


def _refuse_multi_label(value: Any) -> None:
    if value not in (None, False):
        raise ValueError("labels cannot be scored independently; all scores sum to 1")


class HFParameters(BaseModel):
    """Unknown fields are ignored, as in transformers: newer clients may send more."""

    model_config = _STRICT

    candidate_labels: Labels
    hypothesis_template: Templates | None = None
    multi_label: Annotated[Any, AfterValidator(_refuse_multi_label)] = None
    """Must be false: the scores of all labels sum to 1."""


class HFRequest(BaseModel):
    """The JSON body of Hugging Face's zero-shot-image-classification task.

    The older shapes `{"image": ...}` and `{"inputs": {"image": ...}}`, and labels beside the image
    instead of in `parameters`, are accepted too.
    """

    model_config = _STRICT

    inputs: str
    """An image file as base64 or as a `data:` URI."""
    parameters: HFParameters

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        inputs = body.get("inputs", body.get("image"))
        if isinstance(inputs, dict):
            inputs = inputs.get("image")
        parameters = body.get("parameters")
        if parameters is None:
            parameters = body
        return {"parameters": parameters} | ({} if inputs is None else {"inputs": inputs})

    @property
    def options(self) -> ClassifyOptions:
        return ClassifyOptions.model_construct(
            candidate_labels=self.parameters.candidate_labels,
            hypothesis_template=self.parameters.hypothesis_template,
        )
