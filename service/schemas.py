"""The bodies of HTTP requests and answers; no other room knows these shapes."""

import re
import unicodedata
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from models.defenses.catalog import Method, Readout

SEEDS = 2**63
"""Seeds lie below this."""


def _split(labels: Any) -> Any:
    return labels.split(",") if isinstance(labels, str) else labels


# Control characters but blanks, and those that make a text look like another (bidirectional
# embeddings, overrides and isolates).
_HIDDEN = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Zs"}  # categories of characters that leave no mark


def _check_labels(labels: list[str]) -> list[str]:
    if len(labels) < 2:
        raise ValueError("at least two labels are needed")
    for label in labels:
        if _HIDDEN.search(label):
            raise ValueError("a label holds a control character")
        if all(unicodedata.category(char) in _UNSEEN for char in label[:1000]):
            raise ValueError("a label is blank")
    # A tokenizer reads all spellings of a letter alike, and so do people.
    if len({unicodedata.normalize("NFC", label) for label in labels}) < len(labels):
        raise ValueError("a label is repeated")
    return labels


def _check_template(template: str) -> str:
    if _HIDDEN.search(template):
        raise ValueError("a template holds a control character")
    if template.count("{}") != 1 or "{" in (rest := template.replace("{}", "")) or "}" in rest:
        raise ValueError("a template holds exactly one {} and no other brace")
    return template


Label = Annotated[str, StringConstraints(strip_whitespace=True)]
Labels = Annotated[
    list[Label],
    BeforeValidator(_split, json_schema_input_type=list[str] | str),
    AfterValidator(_check_labels),
    Field(
        description="Two or more different labels; surrounding blanks are dropped. One string is "
        "split at its commas.",
        examples=[["cat", "dog"]],
    ),
]
Template = Annotated[
    str,
    AfterValidator(_check_template),
    Field(description="The sentence around a label, with one `{}`; null: the server's default."),
]


class DefenseOptions(BaseModel):
    """What a request may spend on its defense. Absent: the server's default. Values above the
    server's limits are lowered to them, and the answer tells what was spent."""

    model_config = ConfigDict(strict=True, extra="forbid")

    tier: Literal["fast", "standard", "deep"] | None = Field(
        default=None,
        description="How much to spend where nothing below is named; lowered to the server's "
        "highest.",
    )
    method: Method | None = None
    steps: int | None = Field(default=None, ge=0, description="Adaptation steps.")
    views: int | None = Field(
        default=None, ge=1, description="Random views, the image itself included."
    )
    readout: Readout | None = None
    deadline_ms: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="The answer is wanted within this time.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=SEEDS,
        description="Draws the views; only where the server allows it.",
    )


class Choices(BaseModel):
    """All of a request but its image."""

    model_config = ConfigDict(strict=True, extra="forbid")

    candidate_labels: Labels
    top_k: int | None = Field(default=None, ge=1, description="Labels in the answer; absent: all.")
    hypothesis_template: Template | None = None
    defense: DefenseOptions | None = None


class ClassifyRequest(Choices):
    """The JSON body of `POST /v1/classify`."""

    image: str = Field(
        description="An image file as base64 or as a `data:` URI; where the server allows it, its "
        "`https:` URL."
    )


class AttackOptions(BaseModel):
    """An attack to demonstrate. Values above the limits are lowered to them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    epsilon: int = Field(ge=1, description="Largest change of a channel, in levels of 255.")
    steps: int = Field(ge=1, description="Steps of projected gradient descent.")
    target: Label | None = Field(
        default=None, description="The label to be named; null: any but what is named now."
    )
    adaptive: bool = Field(default=False, description="Whether the attacker knows the defense.")


class AttackRequest(ClassifyRequest):
    """The JSON body of `POST /demo/attack`."""

    attack: AttackOptions

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.attack.target not in (None, *self.candidate_labels):
            raise ValueError("the attack's target is none of the labels")
        return self


class HFParameters(BaseModel):
    """Further fields, which newer clients may send, are ignored as transformers ignores them."""

    model_config = ConfigDict(strict=True)

    candidate_labels: Labels
    hypothesis_template: Template | None = None


class HFRequest(BaseModel):
    """The Hugging Face zero-shot-image-classification task. The older shapes `{"image": ...}`,
    `{"inputs": {"image": ...}}` and labels beside the image instead of in `parameters` are read
    as well."""

    model_config = ConfigDict(strict=True)

    inputs: str = Field(description="An image file as base64 or as a `data:` URI.")
    parameters: HFParameters

    @model_validator(mode="before")
    @classmethod
    def _modernize(cls, body: Any) -> Any:
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
    def choices(self) -> Choices:
        return Choices.model_construct(
            candidate_labels=self.parameters.candidate_labels,
            hypothesis_template=self.parameters.hypothesis_template,
        )


class ScoredLabel(BaseModel):
    label: str
    score: float = Field(ge=0, le=1)


class DefenseReport(BaseModel):
    """What the defense cost and what it saw. What it saw, from `entropy_before` on, is null where
    the server exposes labels only, and for a key without the scope `diagnostics`."""

    tier: str = Field(description="`fast`, `standard` or `deep`, as granted.")
    method: str
    design: str = Field(
        description="Its prompts: `v`, `vli`, `vlj`; `text`: the template's own words; `none`."
    )
    steps: int = Field(description="Adaptation steps done.")
    views: int
    views_kept: int = Field(description="Most confident views, which the loss was taken over.")
    readout: str
    truncated: str | None = Field(description="`deadline` when the adaptation was cut short.")
    labels_truncated: int = Field(description="Labels cut to the model's context.")
    entropy_before: float | None = Field(description="Nats, of the kept views' mean.")
    entropy_after: float | None
    agreement: float | None = Field(description="Share of the views that agree with the answer.")
    suspicion: float | None = Field(description="Grows with the signs of an attack.")
    suspected: bool | None = Field(
        description="Whether suspicion passed the bundle's threshold; null without one."
    )
    undefended_label: str | None = Field(description="What plain CLIP would have answered.")


class Timings(BaseModel):
    """Milliseconds."""

    queue: float
    decode: float
    adapt: float
    predict: float
    total: float = Field(description="From the first byte to the answer.")


class Classification(BaseModel):
    """The answer of `POST /v1/classify`."""

    id: str
    model: str
    labels: list[ScoredLabel] = Field(description="Best first.")
    defense: DefenseReport
    timings_ms: Timings


class View(BaseModel):
    """A view that the defense looked at, as it first saw it."""

    label: str
    score: float
    kept: bool = Field(description="Whether the loss was taken over it.")
    thumbnail: str = Field(description="A PNG as a `data:` URI.")


class ExhibitedClassification(Classification):
    """The answer of `POST /demo/classify`."""

    views: list[View]


class AttackStage(BaseModel):
    """A picture on the way of an attack, and what is said of it."""

    step: int
    steps: int
    image: str = Field(description="A PNG of the model's own size as a `data:` URI; lossless.")
    undefended: list[ScoredLabel]
    defended: list[ScoredLabel] | None = Field(description="Null where nobody asked the defense.")


class Status(BaseModel):
    """The answer of a health route when all is well."""

    status: Literal["ok"] = "ok"


class ErrorBody(BaseModel):
    """Every error."""

    error: str = Field(description="One sentence.")
    error_type: str
    request_id: str
