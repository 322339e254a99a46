"""`tapt-serve convert`: the same model in transformers' format, and no code of a pickle run."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel

from models.checkpoint import load_checkpoint
from models.errors import LoadError
from service.cli import main
from tests import open_clip, tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("models") / "whole", legacy_eos=True)


def model_cfg(model: CLIPModel) -> dict[str, Any]:
    text, vision = model.config.text_config, model.config.vision_config
    return {
        "embed_dim": 48,
        "quick_gelu": True,
        "vision_cfg": {
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // 2,
            "layers": 3,
            "patch_size": 8,
            "image_size": 32,
            "mlp_ratio": 2,
        },
        "text_cfg": {
            "width": text.hidden_size,
            "heads": 2,
            "layers": 3,
            "mlp_ratio": 2,
            "vocab_size": text.vocab_size,
            "context_length": 32,
        },
    }


def make_pickled(whole: Path, directory: Path) -> Path:
    model = CLIPModel.from_pretrained(whole)
    preprocess = {"mean": [0.4] * 3, "std": [0.2] * 3, "resize_mode": "squash"}
    return open_clip.write(directory, model, model_cfg(model), preprocess, pickled=True)


def logits(directory: Path) -> torch.Tensor:
    model = CLIPModel.from_pretrained(directory).eval()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[3, 40, 60, 90], [5, 50, 100, 70]])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, pixel_values=pixels).logits_per_image
    return found


def test_a_pickled_checkpoint_is_converted(whole: Path, tmp_path: Path, capsys: Any) -> None:
    source, out = make_pickled(whole, tmp_path / "source"), tmp_path / "out"
    with pytest.raises(LoadError, match=r"no safetensors weights.*`tapt-serve convert`"):
        load_checkpoint(str(source), tiny.CPU)
    assert main(["convert", str(source), str(out)]) == 0
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644  # for a container's user
    assert "without a tokenizer: set TAPT_TOKENIZER" in capsys.readouterr().out
    torch.testing.assert_close(logits(out), logits(whole), atol=1e-5, rtol=0)
    found = load_checkpoint(str(out), tiny.CPU, tokenizer=str(whole)).preprocessing
    assert (found.size, found.short_side, found.mean) == ((32, 32), None, (0.4, 0.4, 0.4))


def test_the_tokenizer_and_the_activation_can_be_named(whole: Path, tmp_path: Path) -> None:
    source, out = make_pickled(whole, tmp_path / "source"), tmp_path / "out"
    arguments = ["convert", str(source), str(out), "--tokenizer", str(whole), "--no-quick-gelu"]
    assert main(arguments) == 0
    checkpoint = load_checkpoint(str(out), tiny.CPU)
    text = "a photo of a dog"
    assert checkpoint.tokenizer(text) == load_checkpoint(str(whole), tiny.CPU).tokenizer(text)
    assert json.loads((out / "config.json").read_text())["vision_config"]["hidden_act"] == "gelu"


@pytest.mark.parametrize("wrap", [False, True])
def test_weights_of_a_training_run_are_found(whole: Path, tmp_path: Path, wrap: bool) -> None:
    source, out = make_pickled(whole, tmp_path / "source"), tmp_path / "out"
    file = source / "open_clip_pytorch_model.bin"
    half = {f"module.{name}": value.half() for name, value in torch.load(file).items()}
    torch.save({"epoch": 3, "state_dict": half} if wrap else half, file)
    assert main(["convert", str(source), str(out)]) == 0
    stored = load_file(out / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}


def test_transformers_own_pickle_is_converted(whole: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(whole, tmp_path / "source"))
    (source / "model.safetensors").unlink()
    torch.save(CLIPModel.from_pretrained(whole).state_dict(), source / "pytorch_model.bin")
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert torch.equal(logits(tmp_path / "out"), logits(whole))
    load_checkpoint(str(tmp_path / "out"), tiny.CPU)  # with its tokenizer


def test_code_in_a_pickle_is_not_run(whole: Path, tmp_path: Path, capsys: Any) -> None:
    source, mark = make_pickled(whole, tmp_path / "source"), tmp_path / "executed"
    (source / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(tiny.Payload(mark)))
    assert main(["convert", str(source), str(tmp_path / "out")]) == 1
    assert "without running its code" in capsys.readouterr().err
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_files_are_not_overwritten(whole: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "kept").write_text("mine")
    assert main(["convert", str(whole), str(tmp_path)]) == 1
    assert "not an empty directory" in capsys.readouterr().err
    assert (tmp_path / "kept").read_text() == "mine"
