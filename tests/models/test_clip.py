"""PromptedCLIP against transformers' own CLIPModel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from models.blocks import run_block
from models.checkpoint import load_checkpoint
from models.classifier import DefendedClassifier, ImageQuery
from models.clip import Interrupted, PromptedCLIP, _spread
from models.errors import LoadError
from models.label_encoder import LabelEncoder
from models.labels import LabelBatch, tokenize
from tests import tiny

SHAPES = [
    {},
    {"act": "gelu"},
    {"legacy_eos": True},
    {"image_size": 56, "patch": 14, "layers": 2},
    {"image_size": 60, "patch": 14, "layers": 2},  # with a rest that is no whole patch
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_scores_equal_transformers(tmp_path: Path, shape: dict[str, object]) -> None:
    checkpoint = tiny.load(tiny.save_checkpoint(tmp_path, **shape))  # type: ignore[arg-type]
    image = tiny.draw_image(0, 90, 120)
    classifier = DefendedClassifier(checkpoint, None)
    (batch,) = classifier.prepare([ImageQuery(image, tiny.LABELS, "a photo of a {}.")], "plain")
    (prediction,) = classifier.classify(batch, 1)

    model = CLIPModel.from_pretrained(tmp_path)
    pixels = CLIPImageProcessorPil.from_pretrained(tmp_path)(Image.fromarray(image))
    texts = [f"a photo of a {label}." for label in tiny.LABELS]
    tokens = checkpoint.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=torch.as_tensor(np.asarray(pixels["pixel_values"])),
        ).logits_per_image
    expected = logits[0].softmax(dim=-1)
    assert expected.max() - expected.min() > 0.05  # the labels are told apart
    torch.testing.assert_close(prediction.probabilities, expected, atol=2e-4, rtol=0)


def test_half_precision_files_load(tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path)
    weights = {k: v.half() for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert tiny.load(tmp_path).clip.dtype == torch.float32


def test_in_bfloat16_the_logits_keep_their_scale(tmp_path: Path) -> None:
    directory = tiny.save_checkpoint(tmp_path)
    weights = load_file(directory / "model.safetensors")
    weights["logit_scale"] = torch.tensor(100.0).log()  # bfloat16 would make 98.9 of it
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    clip = load_checkpoint(str(directory), tiny.CPU, "bfloat16").clip
    assert clip.dtype == torch.bfloat16
    assert float(clip.logit_scale) == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize(
    "compute",
    [
        lambda clip, labels, prompts: clip.encode_labels(labels, prompts),
        lambda clip, *_: clip.encode_images(torch.full((2, 4, 3, 32, 32), 0.5)).features,
        torch.enable_grad()(
            lambda clip, labels, prompts: clip.text_gradient(labels, prompts, torch.ones(8, 48))
        ),
    ],
    ids=["labels", "views", "text gradient"],
)
@torch.no_grad()
def test_work_stops_between_chunks_and_leaves_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compute: Callable[[PromptedCLIP, LabelBatch, torch.Tensor], torch.Tensor],
) -> None:
    checkpoint = tiny.load(tiny.save_checkpoint(tmp_path))
    clip, bundle = checkpoint.clip, tiny.make_bundle(checkpoint)
    clip.chunk_tokens = 8
    batch = LabelEncoder(checkpoint, bundle, "{}").encode(tiny.LABELS, "{}", "learned").batch
    prompts = bundle.prompts.text
    assert prompts is not None
    events = []

    def count(*arguments: Any, **options: Any) -> Any:
        events.append("block")
        return run_block(*arguments, **options)

    def stop() -> bool:
        events.append("stop?")
        return events.count("stop?") == 3

    monkeypatch.setattr("models.clip.run_block", count)
    undisturbed = compute(clip, batch, prompts)
    assert "stop?" not in events
    events.clear()
    with pytest.raises(Interrupted), clip.interruptible(stop):
        compute(clip, batch, prompts)
    assert events.count("stop?") == 3
    assert "block" in events
    assert events[-1] == "stop?"  # no chunk is computed after it said so
    events.clear()
    assert torch.equal(compute(clip, batch, prompts), undisturbed)
    assert "stop?" not in events


def test_what_requests_share_reaches_each_of_their_rows() -> None:
    shared = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4)
    for counts in ([2, 2], [1, 3]):
        for part, found in zip(shared, _spread(shared, counts), strict=True):
            rows = [part[0]] * counts[0] + [part[1]] * counts[1]
            assert torch.equal(found, torch.stack(rows))


def test_slots_never_eat_one_token_labels(tmp_path: Path) -> None:
    checkpoint = tiny.load(tiny.save_checkpoint(tmp_path))
    encoder = LabelEncoder(checkpoint, tiny.make_bundle(checkpoint), "{}")
    features = encoder.encode(["cat", "dog"], "{}", "learned").features
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_a_label_beyond_the_context_is_cut_and_counted(tmp_path: Path) -> None:
    checkpoint = tiny.load(tiny.save_checkpoint(tmp_path))
    end = checkpoint.clip.model.config.text_config.eos_token_id
    texts = ["cat", "dog " * 40]
    batch = tokenize(checkpoint.tokenizer, end, texts, checkpoint.clip.context_length, slots=4)
    assert batch.truncated == (1,)
    assert batch.ids.shape[1] == checkpoint.clip.context_length
    assert [int(batch.ids[row, batch.ends[row]]) for row in range(2)] == [end, end]


def test_text_is_cut_behind_its_end_without_changing_it(tmp_path: Path) -> None:
    checkpoint = tiny.load(tiny.save_checkpoint(tmp_path))
    encoder = LabelEncoder(checkpoint, None, "{}")
    short = encoder.encode(["cat", "dog"], "{}", "none")
    long = encoder.encode(["cat", "dog", "dog " * 20], "{}", "none")
    assert short.batch.ids.shape[1] < long.batch.ids.shape[1]
    torch.testing.assert_close(short.features, long.features[:2], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no readable config.json"),
        (lambda d: (d / "config.json").write_text('{"model_type": "bert"}'), "bert checkpoint"),
        (lambda d: (d / "model.safetensors").unlink(), "no safetensors weights"),
        (lambda d: (d / "model.safetensors").write_bytes(b"nonsense"), "cannot be loaded"),
        (lambda d: [f.unlink() for f in d.glob("*token*")], "no tokenizer that fits"),
    ],
)
def test_a_wrong_checkpoint_is_one_sentence(tmp_path: Path, spoil: object, message: str) -> None:
    tiny.save_checkpoint(tmp_path)
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(LoadError, match=message) as raised:
        tiny.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_missing_checkpoint_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match="not a local directory"):
        load_checkpoint("nobody/nothing", tiny.CPU)
