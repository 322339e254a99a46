"""The memory that a batch takes is known beforehand, and many labels do not run out of it."""

import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models import memory
from models.checkpoint import load_checkpoint
from models.clip import gpu_chunk_tokens
from models.defenses.catalog import DEFENSES
from models.evaluation.trial import views_at_once
from models.memory import footprint, free_bytes
from service.engine.price import count_tokens
from service.messages import Answer, Task
from service.settings import Settings
from service.worker.runner import Runner
from tests import tiny

linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc on Linux"
)


def test_the_budget_follows_the_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny.save_checkpoint(tmp_path)
    tokens = []
    for free in (2**30, 2**32):
        monkeypatch.setattr("service.worker.loading.free_bytes", lambda device, free=free: free)
        runner = Runner(Settings(model=str(directory), device="cpu"), 0)
        tokens.append(runner.ready.max_batch_tokens)
        shown = runner.ready.info["memory"]
        assert shown["batch_tokens"] == tokens[-1]
        assert 0 < shown["peak_bytes"] - shown["resident_bytes"] <= free
    assert 0 < 3 * tokens[0] < tokens[1]
    two = Runner(Settings(model=str(directory), device="cpu", workers=2), 0)
    assert two.ready.max_batch_tokens < tokens[1]
    set_by_hand = Runner(Settings(model=str(directory), device="cpu", max_batch_tokens=77), 0)
    assert set_by_hand.ready.max_batch_tokens == 77


def test_a_chunk_on_a_gpu_follows_its_memory_and_the_text_tower() -> None:
    gpu = 80 * 2**30
    base, huge = 12 * 14 * 512 * 2, 24 * 14 * 1024 * 4  # ViT-B in bfloat16, ViT-H in float32
    assert gpu_chunk_tokens(gpu, base) == 80 * 1024
    assert gpu_chunk_tokens(gpu // 2, base) == 40 * 1024
    assert gpu_chunk_tokens(gpu, huge) * huge == pytest.approx(gpu / 6, rel=0.01)
    assert gpu_chunk_tokens(1, huge) == 1


def test_an_adaptive_attack_on_a_gpu_takes_no_more_views_than_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = 80 * 2**30
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gpu)
    )

    def views(patches: int, token: int) -> int:
        clip = SimpleNamespace(
            device=torch.device("cuda"), patches=patches, image_graph_bytes=token
        )
        return views_at_once(clip)  # type: ignore[arg-type]

    assert views(64, 6 * 14 * 192 * 4) == 4096  # the embedded model
    base = 12 * 14 * 768 * 4  # ViT-B/16 in float32
    assert views(196, base) * 197 * base == pytest.approx(gpu / 4, rel=0.01)


def test_a_container_counts_what_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert free_bytes(cpu) > 0
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_bytes(cpu) == 2000
    # Page cache, as of the weight files that were just read, is given back on demand.
    (tmp_path / "memory.stat").write_text("active_file 300\ninactive_file 600\ninactive_anon 50\n")
    assert free_bytes(cpu) == 2600
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu) > 2000


def test_a_system_that_reports_no_free_pages_counts_half_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = os.sysconf

    def sysconf(name: str) -> int:
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return known(name)

    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.setattr(Path, "exists", lambda self: False)  # neither /proc nor cgroups
    total = known("SC_PHYS_PAGES") * known("SC_PAGE_SIZE")
    assert free_bytes(torch.device("cpu")) == pytest.approx(total / 2, abs=2**16)


def _measure(method: str, labels: int, requests: int, views: int) -> tuple[int, int]:
    """Predicted and measured peak of a batch of the default model, in a fresh process."""
    runner = Runner(Settings(device="cpu"), 0)
    clip, bundle = runner.classifier.checkpoint.clip, runner.classifier.bundle
    assert bundle is not None
    ready = runner.ready
    batch = [
        Task(
            id=str(number),
            image=tiny.draw_image(number, 96, 112).astype(np.uint8),
            labels=tuple(f"label {i}" for i in range(labels)),
            template=None,
            method=method,
            steps=DEFENSES[method].steps or 1,
            views=views,
            readout=DEFENSES[method].readout or "all",
            seed=number,
            deadline=time.monotonic() + 3600,
        )
        for number in range(requests)
    ]
    resident = ready.info["memory"]["resident_bytes"]
    settings = Settings(hypothesis_template=bundle.template)
    cost = footprint(clip, resident, settings.selection_ratio, ready.image_tokens)
    still = sum(count_tokens(replace(work, steps=0), ready, settings) for work in batch)
    text = still - requests * views * ready.image_tokens
    image = sum(count_tokens(work, ready, settings) for work in batch) - text
    Path("/proc/self/clear_refs").write_text("5")
    settled: list[object] = []
    runner.run(batch, lambda id, result: settled.append(result), lambda id: False)
    assert len(settled) == requests
    assert all(isinstance(result, Answer) and result.steps for result in settled)
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return cost.peak(image, text), 1024 * int(peak.split()[1])


@linux
@pytest.mark.parametrize(
    ("method", "labels", "requests", "views"),
    [
        ("tapt", 10, 8, 64),
        ("tapt", 10, 64, 4),
        ("ttc", 10, 64, 1),
        pytest.param("tapt", 1000, 8, 16, marks=pytest.mark.heavy),
        pytest.param("tapt", 1000, 8, 64, marks=pytest.mark.heavy),
    ],
)
def test_the_peak_is_predicted_within_a_fifth(
    method: str, labels: int, requests: int, views: int
) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        predicted, measured = pool.apply(_measure, (method, labels, requests, views))
    assert predicted == pytest.approx(measured, rel=0.2)


def test_a_footprint_grows_with_its_tokens(tmp_path: Path) -> None:
    clip = load_checkpoint(str(tiny.save_checkpoint(tmp_path)), tiny.CPU).clip
    cost = footprint(clip, 1000, 0.1, 17)
    assert cost.peak(0, 0) >= 1000
    assert cost.peak(2000, 0) > cost.peak(1000, 0)
    assert cost.peak(cost.budget(10**9), 0) <= 1000 + 10**9
    assert cost.budget(0) == 0
