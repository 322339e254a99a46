"""A fresh server's answer to curl, as the README shows it."""

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.harness.server import Server

LABELS = ["espresso", "dog", "school bus", "lemon"]


def ask(image: Path) -> str:
    """The command as a user types it, and the answer of a fresh server."""
    with Server() as server:
        form = ["-F", f"image=@{image}", "-F", f"labels={','.join(LABELS)}"]
        curl = ["curl", "--silent", "--fail-with-body", f"{server.url}/v1/classify", *form]
        answer = subprocess.run(curl, capture_output=True, text=True, check=True).stdout
    typed = (
        "curl -s http://127.0.0.1:8000/v1/classify \\\n"
        f"    -F image=@{image.name} -F labels='{','.join(LABELS)}'"
    )
    return f"```\n{typed}\n```\n\n```json\n{_indent(json.loads(answer))}\n```"


def _indent(answer: dict[str, Any]) -> str:
    """A line for each of the answer's own fields."""
    lines = [f'  "{name}": {json.dumps(_round(value))}' for name, value in answer.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: _round(one) for name, one in value.items()}
    return [_round(one) for one in value] if isinstance(value, list) else value
