"""The configuration of the service, read once and passed down.

A command line flag takes precedence over an environment variable (prefix `TAPT_`), which takes
precedence over the default. Unknown `TAPT_*` variables are errors, because a misspelled limit would
not limit anything.
"""

import os
import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Literal, Self, get_args, get_origin

from pydantic import Field, StringConstraints, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from models.defenses.catalog import Method, Readout
from models.shipped import DEFAULT_MODEL
from service.texts import check_template, read_templates

PREFIX = "TAPT_"

CLIENT_KEY = PREFIX + "KEY"
"""The API key that `classify --url` and `info --url` send."""

# What Kubernetes sets for a Service named `tapt` or `tapt-...`.
_SERVICE_LINK = re.compile(
    PREFIX
    + r"([A-Z0-9_]+_)?(SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?)?)"
)

Tier = Literal["fast", "standard", "deep"]
TIERS: tuple[Tier, ...] = get_args(Tier)
"""Cheapest first."""

Origin = Annotated[str, StringConstraints(pattern=r"^https?://[A-Za-z0-9.\-\[\]:]+$")]
FrameAncestor = Annotated[
    str, StringConstraints(pattern=r"^('self'|(https?://)?(\*\.)?[A-Za-z0-9.\-]+(:\d+)?)$")
]
HostPattern = Annotated[
    str, StringConstraints(pattern=r"^(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*(:\d+)?$")
]


class Settings(BaseSettings):
    """The service's configuration; `docs/configuration.md` is this class as a table."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 picks a free one."""
    root_path: str = Field("", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    """Path prefix that a proxy serves this server under, for example `/clip`. The proxy may strip
    it or leave it."""
    keep_alive_s: int = Field(75, ge=1)
    """How long an idle connection is kept open (s). Longer than the proxy in front keeps its own,
    so that the proxy never sends a request on a connection that is being closed."""

    model: str = DEFAULT_MODEL
    """`embedded-hardened` or `embedded`, which are part of the package; a Hugging Face hub id; or a
    directory with a CLIP checkpoint, in the format of transformers or of OpenCLIP. See
    [checkpoints](checkpoints.md)."""
    model_revision: str = ""
    """Commit, tag or branch of a hub id. Only a full commit hash is immutable."""
    model_sha256: str = Field("", pattern="^([0-9a-fA-F]{64})?$")
    """SHA-256 that the weights must have, as shown by `tapt-serve info`."""
    tokenizer: str = ""
    """Directory or hub id (`owner/name` or `owner/name@revision`) of the tokenizer; empty: the
    model's own."""
    quick_gelu: Literal["auto", "true", "false"] = "auto"
    """Activation of the model: CLIP's approximate GELU (`true`) or the exact one (`false`). `auto`
    follows the model's configuration."""
    bundle: str = ""
    """Directory or hub id (`owner/name` or `owner/name@revision`) of the defense bundle; empty:
    `bundle` beside the model, if any."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the model. `auto` keeps a model whose image tower is narrower than 512 (ViT-B:
    768) in float32. For others it means bfloat16 on CUDA (float16 on GPUs before Ampere); on a CPU,
    bfloat16 if the processor computes it natively and is measured to be at least 1.5 times as fast,
    else float32. `/info` says which and why. Replicas may choose differently; name a precision if
    their answers must be equal. float16 is slow on a CPU."""

    method: Method = "tapt"
    """Default defense."""
    design: Literal["v", "vli", "vlj"] = "vli"
    """Design of the adapted prompts. A bundle of another design is refused."""
    steps: int = Field(1, ge=0)
    """Default number of adaptation steps."""
    max_steps: int = Field(8, ge=0)
    """Maximum number of steps; higher requests are lowered to it."""
    views: int = Field(16, ge=1)
    """Default number of views."""
    max_views: int = Field(64, ge=1)
    """Maximum number of views; higher requests are lowered to it."""
    selection_ratio: float = Field(0.1, gt=0, le=1)
    """Share of the views that the loss is computed on, the most confident ones; at least one view.
    The variance part of the alignment needs at least two."""
    learning_rate: float = Field(5e-4, gt=0)
    """Learning rate of AdamW."""
    alignment_weight: float = Field(100.0, ge=0)
    """Weight of the token alignment loss relative to the entropy."""
    gamma: float = Field(0.5, ge=0, le=1)
    """Share of the adversarial statistics in the alignment, against the clean ones."""
    adapts: Literal["all", "vision", "text"] = "vision"
    """Which prompts adapt. `vision` is cheapest; if the bundle has none of that kind, all adapt."""
    early_stop: float = Field(0.0, ge=0)
    """Stop adapting prompts once a step changes the entropy by less than this (nats); 0 disables.
    No effect on requests with one step: the first is always taken."""
    readout: Readout = "all"
    """Views that the prediction is computed from after adapting."""
    hypothesis_template: Annotated[str | tuple[str, ...], NoDecode] = "a photo of a {}."
    """Default prompt around a label, with one `{}`; or a JSON array of several, of which the mean
    of the label's features counts. Used where labels are not read with the bundle's learned
    prompts."""

    max_batch_size: int = Field(16, ge=1)
    """Maximum number of requests in a batch."""
    max_batch_tokens: int = Field(0, ge=0)
    """Maximum number of image and text tokens in a batch; 0: set by free memory. See
    [memory](performance.md#memory)."""
    max_queue_delay_ms: float = Field(0.0, ge=0)
    """How long an idle worker waits for a batch to fill (ms). Requests that arrive while a batch
    runs share the next one in any case."""
    max_queue_size: int = Field(64, ge=1)
    """Maximum number of admitted requests without an answer; more get a 429. One batch per worker
    may always wait."""
    request_timeout_ms: int = Field(60_000, ge=1)
    """Maximum time of a request (ms), from its admission, after the upload, to its answer. The
    `deadline_ms` of a request may shorten it."""
    latency_objective_ms: int = Field(3000, ge=1)
    """Answers that take longer count as slow (ms); an alert fires at more than 1% of them."""
    upload_timeout_ms: int = Field(30_000, ge=1)
    """Time for a request body to arrive (ms)."""
    max_body_bytes: int = Field(16 * 2**20, ge=1024)
    """Maximum size of a request body (bytes); larger ones get a 413."""
    max_image_pixels: int = Field(40_000_000, ge=1)
    """Maximum width times height of an image; larger ones get a 413."""
    max_labels: int = Field(1000, ge=2)
    """Maximum number of candidate labels in a request, times its templates."""
    max_label_chars: int = Field(256, ge=1)
    """Maximum length of a label or template (characters)."""
    decoders: int = Field(0, ge=0, le=64)
    """Number of processes that decode images; 0: one per core, at most 4."""
    decode_timeout_ms: int = Field(2000, ge=10)
    """Maximum processor time to decode an image (ms); more costly images get a 422. With the wait
    for a decoder it takes at most 1.5 times that; images that waited too long get a 429."""
    decode_memory_bytes: int = Field(464 * 2**20, ge=64 * 2**20)
    """Maximum memory to decode an image (bytes), at up to 12 per pixel; more costly images get
    a 422. Images that need over an eighth of it are decoded one at a time."""

    api_keys: Annotated[tuple[str, ...], NoDecode] = Field((), repr=False)
    """Comma-separated API keys, each as printed by `tapt-serve key`. Without any here or in a file,
    no key is required."""
    api_keys_file: str = ""
    """File with one API key per line; reloaded when it changes."""
    open_routes: Annotated[tuple[Literal["pages", "metrics"], ...], NoDecode] = ()
    """Comma-separated routes that need no key: `pages` (playground and docs), `metrics`. The
    latter includes metrics that otherwise need the scope `diagnostics`: keep the port private,
    behind a gateway that does not route `/metrics`."""
    key_concurrency: int = Field(0, ge=0)
    """Maximum number of concurrent requests per key; more get a 429; 0 disables."""
    key_rate: float = Field(0.0, ge=0)
    """Average number of typical requests per second and key; more get a 429; 0 disables. A typical
    request has this server's defaults and 10 labels; a more expensive one counts as several, by its
    views, steps and labels."""
    key_burst: int = Field(20, ge=1)
    """Typical requests that a key may send in a burst above `key_rate`."""
    key_similar_per_hour: int = Field(0, ge=0, le=1000)
    """Similar images that a key may send in an hour; 0 disables. The same image counts again with
    another method, readout, or number of views or steps."""
    view_secret: str = Field("", pattern="^(.{16,})?$", repr=False)
    """Secret that the random views of an image are derived from, at least 16 characters. Replicas
    with the same secret give the same answers. Empty: random at startup."""
    allow_client_seed: bool = False
    """Accept the `seed` of a request. With a known seed, an attacker can target the views."""
    allow_image_urls: bool = False
    """Fetch images by URL, from `image_url_hosts` at public addresses only."""
    image_url_hosts: Annotated[tuple[HostPattern, ...], NoDecode] = ()
    """Comma-separated hosts to fetch images from: `example.org`, `*.example.org`,
    `example.org:8443`."""
    allow_http_image_urls: bool = False
    """Fetch images by unencrypted `http` too."""
    image_url_timeout_ms: int = Field(5000, ge=1)
    """Time to fetch an image (ms)."""
    expose: Literal["full", "rounded", "label"] = "full"
    """Scores in answers: `full`, `rounded` to two digits, or `label` (1 and 0)."""
    cors_origins: Annotated[tuple[Origin, ...], NoDecode] = ()
    """Comma-separated origins whose pages may call the API from a browser, for example
    `https://app.example.org`; empty: none."""
    frame_ancestors: Annotated[tuple[FrameAncestor, ...], NoDecode] = ()
    """Comma-separated sites that may show the playground and the docs in a frame, for example
    `'self'` or `https://portal.example.org`; empty: none."""
    enable_attack_demo: bool = False
    """Offer attacks and views in the playground. Needs a loopback `host`."""

    drain_timeout_s: float = Field(65.0, ge=0)
    """How long a shutdown waits for running requests (s); the rest get a 503. At least 5 s more
    than `request_timeout_ms`: every accepted request is answered."""
    workers: int = Field(1, ge=1)
    """Worker processes. On CUDA each has its own device; else they share the cores."""
    tier: Tier = "standard"
    """Default tier. `fast`: the mean over half of the views, without adapting; `standard`: these
    settings; `deep`: four times the views and twice the steps."""
    max_tier: Tier = "deep"
    """Highest tier; higher requests are lowered to it. It limits what a request leaves to the
    server; `TAPT_MAX_VIEWS` and `TAPT_MAX_STEPS` limit the views and steps that it names."""
    log_format: Literal["text", "json"] = "text"
    """Format of the log."""

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, values: dict[str, object]) -> dict[str, object]:
        lists = ("api_keys", "open_routes", "image_url_hosts", "cors_origins", "frame_ancestors")
        for name in lists:
            text = values.get(name)
            if isinstance(text, str):
                values[name] = tuple(part.strip() for part in text.split(",") if part.strip())
        return values

    @field_validator("hypothesis_template", mode="before")
    @classmethod
    def _read_templates(cls, value: object) -> str | tuple[str, ...]:
        templates = read_templates(value)
        if not templates:
            raise ValueError("at least one template is needed")
        for template in templates:
            if not isinstance(template, str):
                raise ValueError("a template is a string")
            check_template(template)
        return tuple(templates) if len(templates) > 1 else templates[0]

    @property
    def templates(self) -> tuple[str, ...]:
        """The default templates, at least one."""
        default = self.hypothesis_template
        return (default,) if isinstance(default, str) else default

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if not isinstance(self.hypothesis_template, str):
            self._check_templates(self.hypothesis_template)
        if self.steps > self.max_steps:
            raise ValueError(f"steps ({self.steps}) is above max_steps ({self.max_steps})")
        if self.views > self.max_views:
            raise ValueError(f"views ({self.views}) is above max_views ({self.max_views})")
        if TIERS.index(self.tier) > TIERS.index(self.max_tier):
            raise ValueError(f"tier ({self.tier}) is above max_tier ({self.max_tier})")
        if self.enable_attack_demo and not _is_loopback(self.host):
            raise ValueError(
                f"enable_attack_demo is for a loopback host only, but host is {self.host}"
            )
        if self.enable_attack_demo and self.expose != "full":
            raise ValueError("enable_attack_demo shows all scores, so expose must be full")
        if self.allow_image_urls and not self.image_url_hosts:
            raise ValueError("allow_image_urls needs image_url_hosts")
        return self

    def _check_templates(self, templates: tuple[str, ...]) -> None:
        """Several templates have the limits of a request's."""
        if any(len(template) > self.max_label_chars for template in templates):
            raise ValueError(
                f"a template of hypothesis_template is longer than max_label_chars "
                f"({self.max_label_chars})"
            )
        if 2 * len(templates) > self.max_labels:
            raise ValueError(
                f"two labels in the {len(templates)} templates of hypothesis_template are more "
                f"texts than max_labels ({self.max_labels})"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The names in `environ` that have our prefix and are no setting, sorted."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(
        name for name in environ if name.upper().startswith(PREFIX) and name.upper() not in known
    )


def injected_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The names in `environ` that Kubernetes sets for a Service whose name begins with `tapt`,
    sorted. `TAPT_PORT` is one if its value is an address."""
    own = PREFIX + "PORT"
    return sorted(
        name
        for name, value in environ.items()
        if _SERVICE_LINK.fullmatch(name) and (name != own or "://" in value)
    )


def table() -> str:
    """The text of `docs/configuration.md`."""
    lines = [
        "# Configuration",
        "",
        "Each setting has an environment variable and a flag of `tapt-serve`; the flag takes "
        "precedence. Unknown `TAPT_*` variables are errors. `TAPT_KEY` is not one of them: it is "
        "the API key that `tapt-serve classify --url` and `info --url` send. Generated by "
        "`python -m service.settings`.",
        "",
        "| variable | flag | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        default = "" if field.default in ("", ()) else f"`{_shown(field.default)}`"
        description = " ".join((field.description or "").split())
        meaning = description + _choices(field.annotation)
        lines.append(f"| `{PREFIX}{name.upper()}` | `{flag}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _choices(annotation: object) -> str:
    """A sentence with the allowed words; empty if the value is not one of a fixed set."""
    words = get_args(annotation) if get_origin(annotation) is Literal else ()
    return f" One of {', '.join(f'`{word}`' for word in words)}." if words else ""


def _shown(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    print(table(), end="")
