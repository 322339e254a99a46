"""Which precision `auto` means, and what a half precision costs in answers."""

from pathlib import Path

import pytest
import torch

from models import precision
from models.classifier import DefendedClassifier, ImageQuery
from models.loading import load_classifier
from models.precision import Dtype, Precision, choose_precision, compare_precisions
from models.tapt import Objective
from tests import tiny

CUDA = torch.device("cuda:0")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("clip") / "model")


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16"), ((6, 1), "float32")],
)
def test_auto_on_a_gpu_takes_what_it_computes_natively(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", CUDA, 768).dtype == getattr(torch, dtype)
    assert choose_precision("float32", CUDA, 768).dtype == torch.float32


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": False, "avx2": True, "cpu_name": "bf16"}, False),
        ({}, False),
    ],
)
def test_auto_on_a_cpu_asks_for_native_bfloat16_and_then_measures(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    found = choose_precision("auto", tiny.CPU, 768)
    assert found.tentative is native
    assert found.dtype == torch.float32
    chosen = choose_precision("bfloat16", tiny.CPU, 768)
    assert chosen == Precision(torch.bfloat16, "as configured")


@pytest.mark.parametrize("device", [CUDA, tiny.CPU])
def test_auto_keeps_a_small_model_in_float32(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Rounding changes more of its labels; see the half precisions in docs/performance.md."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: True)
    found = choose_precision("auto", device, 192)
    assert found.dtype == torch.float32
    assert not found.tentative
    assert choose_precision("bfloat16", device, 192).dtype == torch.bfloat16


@pytest.mark.parametrize(("ratio", "dtype"), [(2.04, torch.bfloat16), (1.2, torch.float32)])
def test_the_measurement_decides_and_is_told(
    directory: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "bfloat16_speedup", lambda clip: ratio)
    monkeypatch.setattr(precision, "MIN_WIDTH", 64)
    classifier = load_classifier(str(directory))
    clip = classifier.checkpoint.clip
    assert clip.dtype == clip.model.visual_projection.weight.dtype == dtype
    assert clip.model.logit_scale.dtype == torch.float32
    assert f"{ratio:.1f} times as fast" in classifier.checkpoint.dtype_reason


def test_the_embedded_model_stays_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "bfloat16_speedup", lambda clip: 9.0)
    checkpoint = load_classifier("embedded").checkpoint
    assert checkpoint.clip.dtype == torch.float32
    assert "small" in checkpoint.dtype_reason


def test_the_speedup_is_measured_on_the_model(directory: Path) -> None:
    clip = tiny.load(directory).clip
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    assert precision.bfloat16_speedup(clip) > 0
    assert compare_precisions(clip).reason.startswith("bfloat16 is ")
    after = clip.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    ticks = iter(range(10**6))
    slower = precision.bfloat16_speedup(clip, lambda: 1.1 ** next(ticks))
    assert slower < 1


@pytest.mark.parametrize("method", ["plain", "ensemble", "tapt", "rtpt", "ttc", "mac"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_converted_model_answers_as_one_loaded_in_that_dtype(
    directory: Path, dtype: Dtype, method: str
) -> None:
    """And close to float32."""
    loaded = load_classifier(str(directory), dtype=dtype).checkpoint
    converted, whole = tiny.load(directory), tiny.load(directory)
    converted.clip.convert(getattr(torch, dtype))
    objective = Objective(learning_rate=5e-3)
    answers = []
    for checkpoint in (loaded, converted, whole):
        classifier = DefendedClassifier(checkpoint, None, objective)
        query = ImageQuery(tiny.draw_image(0), tiny.LABELS, seed=3)
        (batch,) = classifier.prepare([query], method)
        (found,) = classifier.classify(batch, 8)
        answers.append(found.probabilities)
    assert torch.equal(answers[0], answers[1])
    tolerance = 0.1 if dtype == "bfloat16" else 0.02  # random weights magnify rounding
    torch.testing.assert_close(answers[1], answers[2], rtol=0, atol=tolerance)
