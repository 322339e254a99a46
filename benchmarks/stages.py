"""Where the time of a run goes, and its peak memory."""

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Stages:
    """Seconds by stage, of functions that are wrapped while it watches."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device
        self._undo: list[Callable[[], None]] = []

    def watch(self, owner: Any, name: str, stage: Callable[..., str]) -> None:
        """Count the time of calls of `owner.name`; `stage` names it from the arguments."""
        call = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            key, before, start = stage(*arguments, **named), sum(self.seconds.values()), self.now()
            result = call(*arguments, **named)
            inside = sum(self.seconds.values()) - before  # what it called is counted already
            self.seconds[key] += self.now() - start - inside
            return result

        setattr(owner, name, timed)
        self._undo.append(lambda: setattr(owner, name, call))

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def end(self) -> None:
        for undo in reversed(self._undo):
            undo()


def resident_bytes(field: str = "VmRSS") -> int:
    """Memory of this process, now or at its peak (`VmHWM`); 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def forget_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most memory in use at once: of this process, or of the allocator of a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes("VmHWM")
