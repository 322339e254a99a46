"""Parse a multipart body in memory: the image file and the other fields.

Starlette's own form parser writes files to disk.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import BadRequest, Unprocessable
from service.intake.body import check_value_count
from service.intake.requests import DefenseOptions
from service.texts import describe_json

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

LABELS = {"labels", "candidate_labels"}
NUMBERS = {"top_k", "steps", "views", "deadline_ms", "seed"}
DEFENSE = set(DefenseOptions.model_fields)
TEMPLATES = "hypothesis_template"
OTHERS = {"top_k", TEMPLATES, "defense"}
FIELDS = {"image"} | LABELS | DEFENSE | OTHERS


@dataclass
class _Parts:
    """Collects the parts of a body by name."""

    limit: int
    values: dict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    complete: bool = False
    _header: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    _name: str = ""
    _data: bytearray = field(default_factory=bytearray)
    _count: int = 0

    def on_part_begin(self) -> None:
        self._count += 1
        if self._count > self.limit:
            raise Unprocessable(f"The form has more than {self.limit} parts.")
        self._name, self._data = "", bytearray()

    def on_header_begin(self) -> None:
        self._header = bytearray(), bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def on_header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._header[1]))
            self._name = options.get(b"name", b"").decode(errors="replace")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += memoryview(data)[start:end]

    def on_part_end(self) -> None:
        if self._name not in FIELDS:
            raise Unprocessable(f"The field `{self._name[:64]}` is unknown.")
        self.values[self._name].append(bytes(self._data))

    def on_end(self) -> None:
        self.complete = True


def read_form(body: bytes, content_type: str, max_labels: int) -> tuple[bytes, dict[str, Any]]:
    """The image file, and the other fields in the shape of `ClassifyOptions`, to be validated.

    Raises BadRequest if the body is no form, Unprocessable for unknown or repeated fields.
    """
    _, options = parse_options_header(content_type)
    if b"boundary" not in options:
        raise BadRequest(
            "The Content-Type of the form has no boundary; let the HTTP client set this header."
        )
    parts = _Parts(limit=max_labels + len(FIELDS))
    callbacks: MultipartCallbacks = {
        "on_part_begin": parts.on_part_begin,
        "on_header_begin": parts.on_header_begin,
        "on_header_field": parts.on_header_field,
        "on_header_value": parts.on_header_value,
        "on_header_end": parts.on_header_end,
        "on_part_data": parts.on_part_data,
        "on_part_end": parts.on_part_end,
        "on_end": parts.on_end,
    }
    try:
        parser = MultipartParser(options.get(b"boundary", b""), callbacks)
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise BadRequest("The multipart body is malformed.") from None
    if not parts.complete:
        raise BadRequest("The multipart body is truncated.")
    image = parts.values.pop("image", [])
    if len(image) != 1:
        raise Unprocessable("The form must have one `image` file.")
    return image[0], _to_options(parts.values)


def _to_options(values: dict[str, list[bytes]]) -> dict[str, Any]:
    labels: list[str] = []
    templates: list[str] = []
    texts: dict[str, str] = {}
    for name, parts in values.items():
        decoded = [_text(name, part) for part in parts]
        if name in LABELS:
            labels += decoded
        elif name == TEMPLATES and len(decoded) > 1:
            templates = [text for text in decoded if text]
        elif len(decoded) > 1:
            raise Unprocessable(f"The field `{name}` is given twice.")
        elif decoded[0]:  # HTML forms send empty fields too
            texts[name] = decoded[0]
    body: dict[str, Any] = {}
    if labels:
        body["candidate_labels"] = labels[0] if len(labels) == 1 else labels
    if templates:
        body[TEMPLATES] = templates
    defense = _json("defense", texts.pop("defense")) if "defense" in texts else {}
    for name, text in texts.items():
        value = _number(text) if name in NUMBERS else text
        if name not in DEFENSE:
            body[name] = value
        elif not isinstance(defense, dict) or name in defense:
            raise Unprocessable(f"The field `{name}` is given twice.")
        else:
            defense[name] = value
    return body | ({"defense": defense} if defense != {} else {})


def _text(name: str, part: bytes) -> str:
    check_value_count(part)
    try:
        return part.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRequest(f"The field `{name}` is not UTF-8 text.") from None


def _json(name: str, text: str) -> Any:
    try:
        return from_json(text)
    except ValueError as error:
        raise BadRequest(f"The field `{name}` {describe_json(str(error))}.") from None


def _number(text: str) -> Any:
    try:
        return from_json(text)
    except ValueError:
        return text  # validation refuses it
