"""Estimate a batch's memory: linear in its image tokens and its text tokens.

The text tower computes label rows in chunks of bounded size and keeps only their features. Of the
views, those that a step differentiates through hold each layer's activations until the backward
pass. Their expected share is part of the cost of an image token. Where the share is larger, count
more image tokens.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from models.clip import PromptedCLIP

PASS = 14  # values that a pass without gradient holds per token, in widths
FEATURES = 7  # copies of a label's features at once: cached, joined, padded, pulled
VIEWS = 3  # copies of a view's pixels: as made, stacked, normalized
TOKENS_PER_LABEL = 10  # assumed, to spread the memory of a label's features over its tokens
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory in bytes.

    Attributes:
        resident: of the loaded model and its process.
        passing: of one chunk of views without a gradient.
        image_token: of each image token of a batch, if steps differentiate through the expected
            share of the views.
        text_token: of each text token of a batch.
        text_graph: of each text token in the chunk of `chunk_tokens` with a backward pass.
    """

    resident: int
    passing: int
    image_token: float
    text_token: float
    text_graph: float
    chunk_tokens: int

    def peak(self, image_tokens: int, text_tokens: int) -> int:
        """Peak bytes in use during a batch."""
        tokens = image_tokens * self.image_token + text_tokens * self.text_token
        chunk = max(self.passing, min(text_tokens, self.chunk_tokens) * self.text_graph)
        return self.resident + int(tokens + chunk)

    def budget(self, free: int) -> int:
        """Number of tokens, of either kind, that fit into `free` bytes."""
        chunk = max(self.passing, self.chunk_tokens * self.text_graph)
        return int(max(0, free - chunk) / max(self.image_token, self.text_token))


def footprint(clip: PromptedCLIP, resident: int, ratio: float, image_tokens: int) -> Footprint:
    """The footprint of adapting with views of `image_tokens` tokens, of which a step differentiates
    through the share `ratio`."""
    pixels = VIEWS * 3 * clip.image_size**2 * 4 / image_tokens
    return Footprint(
        resident=resident,
        passing=clip.chunk_tokens * PASS * clip.vision_width * clip.dtype.itemsize,
        image_token=ratio * clip.image_graph_bytes + pixels,
        text_token=FEATURES * clip.model.config.projection_dim * 4 / TOKENS_PER_LABEL,
        text_graph=clip.text_graph_bytes,
        chunk_tokens=clip.chunk_tokens,
    )


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 if the system does not report it."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> int:
    """Free memory on a device; on a CPU, what the machine or the container's limit leaves. Page
    cache that the kernel can reclaim counts as free, as in Kubernetes' working set."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES")
    except ValueError:  # macOS reports no free pages; half of all leaves room for other programs
        pages = os.sysconf("SC_PHYS_PAGES") // 2
    available = os.sysconf("SC_PAGE_SIZE") * pages
    available = 1024 * _read_entry(Path("/proc/meminfo"), "MemAvailable:") or available
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip().isdecimal():
        cache = _read_entry(CGROUP / "memory.stat", "inactive_file ")
        working_set = max(0, int(used.read_text()) - cache)
        available = min(available, int(limit.read_text()) - working_set)
    return max(0, available)


def _read_entry(file: Path, name: str) -> int:
    """The number on the line of a file that begins with `name`; 0 if there is none."""
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith(name):
            return int(line.removeprefix(name).split()[0])
    return 0
