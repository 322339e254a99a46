"""Write the README's answer: start the service, ask it with curl, keep what came back.

python -m benchmarks.readme --image cat.png
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
LABELS = ["cat", "dog", "school bus", "lemon"]


def ask(image: Path) -> tuple[str, str]:
    """The command as a user types it, and the answer of a fresh server, indented."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        if found is None:
            raise SystemExit("the service did not start")
        form = ["-F", f"image=@{image}", "-F", f"labels={','.join(LABELS)}"]
        curl = ["curl", "--silent", "--fail-with-body", f"{found.group()}/v1/classify", *form]
        answer = subprocess.run(curl, capture_output=True, text=True, check=True).stdout
        server.terminate()
    typed = (
        "curl -s http://127.0.0.1:8000/v1/classify \\\n"
        f"    -F image=@{image.name} -F labels='{','.join(LABELS)}'"
    )
    return typed, _indent(json.loads(answer))


def _indent(answer: dict[str, object]) -> str:
    """A line for each of the answer's own fields."""
    lines = [f'  "{name}": {json.dumps(_round(value))}' for name, value in answer.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def _round(value: object) -> object:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: _round(one) for name, one in value.items()}
    return [_round(one) for one in value] if isinstance(value, list) else value


def fill(text: str, block: str, content: str) -> str:
    """Replace what stands between the marks of a block."""
    pattern = rf"(<!-- {block} -->\n).*?(<!-- /{block} -->)"
    if not re.search(pattern, text, re.DOTALL):
        raise SystemExit(f"README.md has no marks for {block}")
    return re.sub(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", type=Path, required=True, help="a photograph of a cat")
    command, answer = ask(parser.parse_args().image)
    content = f"```\n{command}\n```\n```json\n{answer}\n```"
    README.write_text(fill(README.read_text(), "answer", content))


if __name__ == "__main__":
    main()
