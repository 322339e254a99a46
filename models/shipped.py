"""The checkpoints that are part of the package, by the names that `TAPT_MODEL` takes."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"
HARDENED = Path(__file__).parent / "embedded_hardened"
SHIPPED = {"embedded": EMBEDDED, "embedded-hardened": HARDENED}

DEFAULT_MODEL = "embedded-hardened"
"""What is served and evaluated unless a setting or an option names another model."""
