"""The parts of pages that commands write, each between a pair of comments."""

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Put `text` between `<!-- name -->` and `<!-- /name -->`. Raises ValueError without them."""
    before = page.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    after, found = pattern.subn(lambda match: f"{match[1]}{text.strip()}\n{match[2]}", before)
    if not found:
        raise ValueError(f"{page} has no section {name}")
    page.write_text(after)


def machine() -> str:
    """One sentence: processor, cores, load, Python, day."""
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpu.read_text()) if cpu.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    load = os.getloadavg()[0]
    return (
        f"Machine: {name}, {os.cpu_count()} cores, load average {load:.1f} at the end, "
        f"Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}."
    )
