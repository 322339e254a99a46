"""Every knob of the service, read once in main and passed down.

Order of precedence: command line flag, environment variable (prefix `TAPT_`), default. A
`TAPT_*` variable that is no knob is an error, because a misspelt limit would be no limit.
"""

import os
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Literal, Self, get_args, get_origin

from pydantic import AfterValidator, Field, StringConstraints, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from models.defenses.catalog import Method, Readout

PREFIX = "TAPT_"

Tier = Literal["fast", "standard", "deep"]
TIERS: tuple[Tier, ...] = get_args(Tier)
"""The cheapest first."""


def _must_be_off(value: bool) -> bool:
    if value:
        raise ValueError("not available yet, only false is accepted")
    return value


Off = Annotated[bool, AfterValidator(_must_be_off)]
"""A knob whose feature is not built yet. A literal False would refuse the text `false`."""

HostPattern = Annotated[
    str, StringConstraints(pattern=r"^(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*(:\d+)?$")
]


class Settings(BaseSettings):
    """The service's configuration; `docs/configuration.md` is this class as a table."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", protected_namespaces=()
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")

    model: str = Field(
        "embedded", description="`embedded`, a hub id, or a directory with a CLIP checkpoint."
    )
    model_revision: str = Field(
        "", description="Commit, tag or branch of a hub id; only a full commit cannot move."
    )
    model_sha256: str = Field(
        "",
        pattern="^([0-9a-fA-F]{64})?$",
        description="Hash that the weights must have, as `tapt-serve info` shows it.",
    )
    bundle: str = Field(
        "", description="Directory of a defense bundle; empty: the one beside the model, if any."
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of the model; `auto`: float32 on the CPU, bfloat16 on CUDA."
    )

    method: Method = Field("tapt", description="Defense of a request that names none.")
    design: Literal["v", "vli", "vlj"] = Field(
        "vli", description="Which prompts adapt; a bundle of another design is refused."
    )
    steps: int = Field(1, ge=0, description="Adaptation steps of a request that names none.")
    max_steps: int = Field(8, ge=0, description="More steps than this are clamped.")
    views: int = Field(16, ge=1, description="Views of a request that names none.")
    max_views: int = Field(64, ge=1, description="More views than this are clamped.")
    selection_ratio: float = Field(
        0.1, gt=0, le=1, description="Share of the views kept for the loss, most confident first."
    )
    learning_rate: float = Field(5e-4, gt=0, description="AdamW's learning rate.")
    alignment_weight: float = Field(
        100.0, ge=0, description="Weight of the token alignment against the entropy."
    )
    gamma: float = Field(
        0.5, ge=0, le=1, description="Share of the adversarial statistics in the alignment."
    )
    adapts: Literal["all", "vision", "text"] = Field(
        "vision",
        description="Whose prompts a step moves, all where there are none of these; without the "
        "text's it costs far less.",
    )
    early_stop: float = Field(
        0.0,
        ge=0,
        description="A request whose entropy a step moved by less, in nats, takes no more; 0: off.",
    )
    readout: Readout = Field(
        "all", description="Views that the prediction is read from after the adaptation."
    )
    hypothesis_template: str = Field(
        "a photo of a {}.", description="Prompt of a request that names none; holds one `{}`."
    )

    max_batch_size: int = Field(16, ge=1, description="Requests in one batch.")
    max_batch_tokens: int = Field(
        0, ge=0, description="Image and text tokens in one batch; 0: from the free memory."
    )
    max_queue_delay_ms: float = Field(
        5.0, ge=0, description="Longest wait for company while the device is idle, milliseconds."
    )
    max_queue_size: int = Field(
        64,
        ge=1,
        description="Requests accepted and not answered; more are answered 429. However many run, "
        "a batch for each worker may wait.",
    )
    request_timeout_ms: int = Field(
        60_000, ge=1, description="Time from a request's slot to its answer, milliseconds."
    )
    upload_timeout_ms: int = Field(
        30_000, ge=1, description="Time for a request's body to arrive, milliseconds."
    )
    max_body_bytes: int = Field(
        16 * 2**20, ge=1024, description="Largest request body, bytes; more is answered 413."
    )
    max_image_pixels: int = Field(
        40_000_000, ge=1, description="Largest image, width times height; more is answered 413."
    )
    max_labels: int = Field(1000, ge=2, description="Most candidate labels of a request.")
    max_label_chars: int = Field(256, ge=1, description="Longest label or template, characters.")

    api_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Comma-separated bearer keys, each as `tapt-serve key` lists it; none here "
        "and no file: no key is asked for.",
        repr=False,
    )
    api_keys_file: str = Field(
        "", description="File that lists bearer keys, one a line; read again when it changes."
    )
    open_routes: Annotated[tuple[Literal["pages", "metrics"], ...], NoDecode] = Field(
        (),
        description="Comma-separated routes that ask for no key though others do: `pages` "
        "(playground, docs), `metrics`.",
    )
    key_concurrency: int = Field(
        0, ge=0, description="Requests of one key under way at once; more are 429; 0: no limit."
    )
    key_rate: float = Field(
        0.0, ge=0, description="Requests of one key a second, on average; 0: no limit."
    )
    key_burst: int = Field(
        20, ge=1, description="Requests that a key may send at once before `key_rate` holds it."
    )
    key_similar_per_hour: int = Field(
        0,
        ge=0,
        le=1000,
        description="Images alike, but not the same, that a key may send in an hour; 0: no limit.",
    )
    allow_client_seed: bool = Field(
        False,
        description="Accept a request's `seed`. A known seed lets an attacker aim at the views.",
    )
    allow_image_urls: bool = Field(
        False, description="Fetch images by URL, from the hosts listed and public addresses only."
    )
    image_url_hosts: Annotated[tuple[HostPattern, ...], NoDecode] = Field(
        (),
        description="Comma-separated hosts that images are fetched from: `example.org`, "
        "`*.example.org`, `example.org:8443`.",
    )
    allow_http_image_urls: bool = Field(
        False, description="Fetch images by plain `http` as well as by `https`."
    )
    image_url_timeout_ms: int = Field(
        5000, ge=1, description="Time for an image to be fetched, milliseconds."
    )
    on_overload: Literal["reject"] = Field(
        "reject", description="What a full queue does. Only `reject` (429) is available yet."
    )
    expose: Literal["full", "rounded", "label"] = Field(
        "full", description="Scores in answers: all digits, two digits, or 1 and 0 only."
    )
    enable_attack_demo: bool = Field(
        False,
        description="Let the page attack pictures and show the views. Only on a loopback `host`.",
    )

    drain_timeout_s: float = Field(
        30.0, ge=0, description="Longest wait for running requests at shutdown, seconds."
    )
    workers: int = Field(
        1,
        ge=1,
        description="Worker processes; on CUDA, one device each, on a CPU its cores are divided.",
    )
    compile: Off = Field(False, description="torch.compile. Not available yet.")
    tier: Tier = Field(
        "standard",
        description="Cost of a request that names no tier. `fast`: the plain mean over half of "
        "the views; `standard`: these settings; `deep`: four times the views, twice the steps.",
    )
    max_tier: Tier = Field("deep", description="A client's higher tier is lowered to this.")
    log_format: Literal["text", "json"] = Field("text", description="Shape of the log lines.")

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, values: dict[str, object]) -> dict[str, object]:
        for name in ("api_keys", "open_routes", "image_url_hosts"):
            text = values.get(name)
            if isinstance(text, str):
                values[name] = tuple(part.strip() for part in text.split(",") if part.strip())
        return values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.hypothesis_template.replace("{}", "", 1).count("{") or (
            self.hypothesis_template.count("{}") != 1
        ):
            raise ValueError("hypothesis_template must hold exactly one {}")
        if self.steps > self.max_steps:
            raise ValueError(f"steps ({self.steps}) is above max_steps ({self.max_steps})")
        if self.views > self.max_views:
            raise ValueError(f"views ({self.views}) is above max_views ({self.max_views})")
        if TIERS.index(self.tier) > TIERS.index(self.max_tier):
            raise ValueError(f"tier ({self.tier}) is above max_tier ({self.max_tier})")
        if self.enable_attack_demo and not _is_loopback(self.host):
            raise ValueError(
                f"enable_attack_demo is for a loopback host only, and host is {self.host}"
            )
        if self.enable_attack_demo and self.expose != "full":
            raise ValueError("enable_attack_demo shows every score, so expose must be full")
        if self.allow_image_urls and not self.image_url_hosts:
            raise ValueError("allow_image_urls needs image_url_hosts, the hosts to fetch from")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names in `environ` with our prefix that are no knob, sorted."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(
        name for name in environ if name.upper().startswith(PREFIX) and name.upper() not in known
    )


def table() -> str:
    """`docs/configuration.md`: every knob with its variable, flag and default."""
    lines = [
        "# Configuration",
        "",
        "Each knob is an environment variable or a flag of `tapt-serve`; the flag wins. A "
        "`TAPT_*` variable that is no knob is an error. Made by `python -m service.settings`.",
        "",
        "| variable | flag | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        default = "" if field.default in ("", ()) else f"`{_shown(field.default)}`"
        meaning = f"{field.description}{_choices(field.annotation)}"
        lines.append(f"| `{PREFIX}{name.upper()}` | `{flag}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _choices(annotation: object) -> str:
    """A sentence with the words that a knob takes, empty where they are not a closed set."""
    words = get_args(annotation) if get_origin(annotation) is Literal else ()
    # A single one is named by its description.
    return f" One of {', '.join(f'`{word}`' for word in words)}." if len(words) > 1 else ""


def _shown(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    print(table(), end="")
