"""The list of defenses and their facts, readable without importing torch.

Every module of this package that assigns a `SPEC` is a defense. The assignment is read from the
source text, so that the API process, the command line and the docs can list defenses without
loading the code that runs them. To add a defense, add a file.
"""

import ast
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal, get_args

Readout = Literal["single", "kept", "all", "weighted"]
READOUTS: tuple[Readout, ...] = get_args(Readout)


@dataclass(frozen=True, slots=True, kw_only=True)
class DefenseSpec:
    """The facts of a defense that its callers need.

    Attributes:
        name: what a request's `method` says; the module is named alike, with `_` for `-`.
        description: what it does, for users.
        prompts: what it starts from: no prompts, the template's leading words, or the bundle's
            learned prompts. Without a bundle the words stand in for learned prompts.
        views: whether it looks at the image alone or at all random views.
        adapts: whether it takes optimization steps.
        readout: the only readout that it knows; None to let the request choose.
        steps: default number of steps; None for the server's `steps`.
        images: images that it encodes, and takes steps on, for each view that it is given; more
            than 1 where it augments the image itself.
        order: position in lists; smaller comes first, ties go by name.
    """

    name: str
    description: str
    prompts: Literal["none", "words", "learned"]
    views: Literal["one", "all"]
    adapts: bool
    readout: Readout | None = None
    steps: int | None = None
    images: int = 1
    order: int = 100

    @property
    def needs_bundle(self) -> bool:
        """Words that were not learned and never move would be no defense."""
        return self.prompts == "learned" and not self.adapts

    @property
    def adapts_prompts(self) -> bool:
        """Whether steps change prompts, rather than the image's pixels."""
        return self.adapts and self.prompts != "none"

    @property
    def random(self) -> bool:
        """Whether two answers to one image may differ by the seed."""
        return self.views == "all" or self.adapts

    @property
    def module(self) -> str:
        """Dotted name of the module that implements it."""
        return f"{__package__}.{self.name.replace('-', '_')}"

    def describe(self) -> dict[str, Any]:
        """The facts in JSON types, for `/info`."""
        facts = dataclasses.asdict(self) | {"needs_bundle": self.needs_bundle}
        del facts["name"], facts["images"], facts["order"]
        return facts


def _read_specs() -> dict[str, DefenseSpec]:
    specs = []
    for file in files(__package__).iterdir():
        if file.name.endswith(".py"):
            specs += _read_spec(file.read_text(encoding="utf-8"), file.name)
    return {spec.name: spec for spec in sorted(specs, key=lambda spec: (spec.order, spec.name))}


def _read_spec(source: str, file: str) -> list[DefenseSpec]:
    """The spec that a module assigns to `SPEC` with literal keyword arguments; [] if none.

    Raises TypeError, naming the file, if the arguments are others.
    """
    calls = [
        node.value
        for node in ast.parse(source, file).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and [ast.unparse(target) for target in node.targets] == ["SPEC"]
    ]
    try:
        return [
            DefenseSpec(**{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
            for call in calls
        ]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{file}: SPEC takes literal keyword arguments: {error}") from error


DEFENSES: Mapping[str, DefenseSpec] = _read_specs()

# The names as a type: pydantic, OpenAPI and `--help` list them.
if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(DEFENSES)]


def table() -> str:
    """The defenses as a Markdown table, for the docs."""
    rows = [f"| `{spec.name}` | {spec.description} |" for spec in DEFENSES.values()]
    return "\n".join(["| `--defenses`, `defense.method` | what |", "|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
