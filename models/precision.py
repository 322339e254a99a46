"""Choose the precision that a model computes in.

Half precision changes scores in the third digit. Replicas on different machines may choose
differently under `auto`; name a dtype where their answers must be equal.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from models.blocks import run_block
from models.clip import PromptedCLIP

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

MIN_SPEEDUP = 1.5
"""Below it, bfloat16 on a CPU is not worth its rounding. Far enough from 1 for noise."""

MIN_WIDTH = 512
"""The narrowest image tower that `auto` computes in half precision; that of ViT-B is 768 wide. In
bfloat16 `embedded-hardened`, 192 wide, gives another label for 1% to 2% of photographs: see
docs/performance.md."""

MIN_RUNS, MAX_RUNS, MEASURED_SECONDS = 5, 100, 1.0
_BFLOAT16, _TENSOR_CORES = 8, 7  # compute capabilities of CUDA from which there are such units


@dataclass(frozen=True, slots=True)
class Precision:
    """A dtype and the reason for it, in half a sentence. `tentative`: a measurement on the loaded
    model may choose another, see `compare_precisions`."""

    dtype: torch.dtype
    reason: str
    tentative: bool = False


def choose_precision(dtype: Dtype, device: torch.device, width: int) -> Precision:
    """The precision that `dtype` means on a device for an image tower of this width."""
    if dtype != "auto":
        return Precision(getattr(torch, dtype), "as configured")
    if width < MIN_WIDTH:
        return Precision(torch.float32, "bfloat16 changes too many labels of a model this small")
    if device.type == "cuda":
        generation, _ = torch.cuda.get_device_capability(device)
        if generation >= _BFLOAT16:
            return Precision(torch.bfloat16, "this GPU computes bfloat16 natively")
        if generation >= _TENSOR_CORES:
            return Precision(torch.float16, "this GPU computes float16 natively, but not bfloat16")
        return Precision(torch.float32, "this GPU computes neither bfloat16 nor float16 natively")
    if not has_native_bfloat16():
        return Precision(torch.float32, "this processor does not compute bfloat16 natively")
    return Precision(torch.float32, "not measured", tentative=True)


def has_native_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16: AMX, AVX512-BF16, or ARM's."""
    found = torch.cpu.get_capabilities()
    return any(value is True for name, value in found.items() if "bf16" in name)


def compare_precisions(clip: PromptedCLIP) -> Precision:
    """Time a block of a float32 model on this CPU in float32 and in bfloat16, and choose."""
    ratio = bfloat16_speedup(clip)
    measured = f"bfloat16 is {ratio:.1f} times as fast as float32 here"
    if ratio >= MIN_SPEEDUP:
        return Precision(torch.bfloat16, measured)
    return Precision(torch.float32, f"{measured}, which is less than {MIN_SPEEDUP}")


def bfloat16_speedup(clip: PromptedCLIP, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds in float32 divided by seconds in bfloat16, of what a request consists of: a block of
    the image tower on a chunk of views, and on one view with the backward pass.

    The least of each, over alternating runs, so that a machine that is busy at times slows down
    neither.
    """
    tokens = 1 + clip.patches
    source = torch.Generator().manual_seed(0)
    shape = max(1, clip.chunk_tokens // tokens), tokens, clip.vision_width
    views = torch.randn(shape, generator=source)
    sides = [
        (copy.deepcopy(clip.model.vision_model.encoder.layers[0]).to(dtype), views.to(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    seconds: tuple[list[float], list[float]] = ([], [])
    began = clock()
    while len(seconds[1]) < MIN_RUNS or (
        clock() < began + MEASURED_SECONDS and len(seconds[1]) < MAX_RUNS
    ):
        for (block, many), runs in zip(sides, seconds, strict=True):
            one = many[:1].clone().requires_grad_()
            start = clock()
            with torch.no_grad():
                run_block(block, many)
            with torch.enable_grad():
                torch.autograd.grad(run_block(block, one)[0].float().sum(), one)
            runs.append(clock() - start)
    return min(seconds[0]) / min(seconds[1])
