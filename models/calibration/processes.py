"""Processes that share the batches of a training, started by torchrun."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=12)  # of processes that wait while the first decodes or validates


@contextmanager
def joined(device: str) -> Iterator[int]:
    """Join the other processes of torchrun, if it started this one; the rank, 0 if alone."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield rank()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    """The place of this process among those that share a training."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes share a training."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Return when all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def own_device(device: torch.device) -> torch.device:
    """A GPU for each process of a machine, if GPUs are wanted."""
    if device.type == "cuda" and dist.is_initialized():
        return torch.device("cuda", dist.get_node_local_rank())
    return device


def add_up(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of tensors over all processes, in one exchange."""
    if count() == 1:
        return dict(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view_as(tensor)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }
