"""Choose the device that a model runs on, and copy to it without waiting."""

from typing import Any

import torch
from torch import Tensor

from models.errors import LoadError


def pick_device(name: str, index: int = 0) -> torch.device:
    """The device of this name.

    Args:
        name: `cpu`, `cuda:N`, `cuda` for GPU number `index`, or `auto` for that GPU if there is
            one, else the CPU.

    Raises:
        LoadError: the device is unknown or missing.
    """
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        name = f"cuda:{index}"
    try:
        device = torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise LoadError(f"device {name!r} is unknown") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LoadError(f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise LoadError(f"device {name!r} is not supported; cpu and cuda are")
    return device


def upload(values: Any, device: torch.device) -> Tensor:
    """An array or list as a tensor on `device`.

    A plain copy to a GPU waits for all queued work. One from pinned memory is queued, and the host
    goes on.
    """
    if device.type != "cuda":
        return torch.tensor(values, device=device)
    # Not `torch.tensor(values, pin_memory=True)`: torch refuses to pin what it makes of an array.
    return torch.tensor(values).pin_memory().to(device, non_blocking=True)


def catch_up(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
