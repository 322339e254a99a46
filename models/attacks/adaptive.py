"""Attacks through a whole defense; not built yet."""

from models.attacks.attack import Model
from models.guard import Guard


def ways(
    guard: Guard,
    names: tuple[str, ...],
    method: str,
    views: int,
    steps: int,
    readout: str,
    seed: int,
) -> dict[str, Model]:
    """Raises ValueError."""
    raise ValueError("the adaptive threat is not built yet")
