"""Whatever an operator's files hold, loading them ends: in a model that passed its warm-up, or in
one sentence."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.bundle import load_bundle
from models.checkpoint import Checkpoint
from models.errors import LoadError
from service.errors import ModelError
from service.settings import Settings
from service.worker import runner
from service.worker.runner import Runner
from tests import tiny

ODD: list[Any] = [None, True, -1, 0, 1.5, 10**9, 10**400, float("nan"), "x", "", [], [1], {}]
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.save_checkpoint(tmp_path_factory.mktemp("models") / "original")
    tiny.make_bundle(tiny.load(directory)).save(directory / "bundle")
    return directory


@pytest.fixture(scope="module")
def checkpoint(original: Path) -> Checkpoint:
    return tiny.load(original)


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def edit(file: Path, change: Edit) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def load(directory: Path) -> str | None:
    """The sentence with which it is refused, None where it is served."""
    began = time.monotonic()
    try:
        Runner(Settings(model=str(directory), device="cpu", views=2), 0)
    except ModelError as error:
        sentence = str(error)
        assert "\n" not in sentence
        assert len(sentence) < 500
        return sentence
    finally:
        assert time.monotonic() - began < 30
    return None


def test_the_files_load_as_they_are(directory: Path) -> None:
    assert load(directory) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_info_says_the_precision_and_why(directory: Path, dtype: Any) -> None:
    settings = Settings(model=str(directory), device="cpu", views=2, dtype=dtype)
    model = Runner(settings, 0).ready.info["model"]
    assert (model["dtype"], model["dtype_reason"]) == (dtype, "as configured")
    chosen = Runner(settings.model_copy(update={"dtype": "auto"}), 0).ready.info["model"]
    assert chosen["dtype"] == "float32"
    assert "small" in chosen["dtype_reason"]


CONFIGS: dict[str, Edit] = {
    "quantized by AWQ": lambda v: v.update(quantization_config={"quant_method": "awq", "bits": 4}),
    "quantized by itself": lambda v: v.update(quantization_config={"quant_method": "evil"}),
    "hidden_size a text": lambda v: v["text_config"].update(hidden_size="abc"),
    "no vision tower": lambda v: v.update(vision_config=None),
    "a list for a tower": lambda v: v.update(vision_config=[1]),
    "a kernel of the hub": lambda v: v["text_config"].update(_attn_implementation="evil/kernel"),
    "an activation of Python": lambda v: v["text_config"].update(hidden_act="os.system"),
    "no patches": lambda v: v["vision_config"].update(patch_size=0),
    "no heads": lambda v: v["text_config"].update(num_attention_heads=0),
    "three heads": lambda v: v["text_config"].update(num_attention_heads=3),
    "a billion layers": lambda v: v["text_config"].update(num_hidden_layers=10**9),
    "a billion layers, old style": lambda v: v.update(
        text_config_dict={"num_hidden_layers": 10**9}
    ),
    "a dtype that is none": lambda v: v.update(dtype="evil"),
    "a function for a dtype": lambda v: v.update(dtype="load"),
}
PROCESSORS: dict[str, Edit] = {
    "size a list": lambda v: v.update(size=[64]),
    "size a text": lambda v: v.update(size={"shortest_edge": "64"}),
    "size huge": lambda v: v.update(size={"shortest_edge": 10**9}),
    "crop_size a list": lambda v: v.update(crop_size=[64]),
    "a mean of one channel": lambda v: v.update(image_mean=[0.5]),
    "a mean in words": lambda v: v.update(image_mean="abc"),
    "a deviation of zero": lambda v: v.update(image_std=[0, 0, 0]),
    "resample a list": lambda v: v.update(resample=[3]),
}
BUNDLES: dict[str, Edit] = {
    "a billion layers": lambda v: v.update(layers=10**9),
    "layers in words": lambda v: v.update(layers="6"),
    "negative layers": lambda v: v.update(layers=-5),
    "half a layer": lambda v: v.update(layers=1.5),
    "no layers": lambda v: v.update(layers=0),
    "a template without a place": lambda v: v.update(template="x"),
    "a template with two": lambda v: v.update(template="{} {}"),
    "a number for a template": lambda v: v.update(template=5),
    "a threshold that is no number": lambda v: v.update(suspicion={"learned": float("nan")}),
    "a threshold of prompts unknown": lambda v: v.update(suspicion={"others": 0.5}),
    "a list for a rate": lambda v: v.update(false_positive_rate=[1]),
    "a rate above one": lambda v: v.update(false_positive_rate=7.0),
    "a hash that is none": lambda v: v.update(checkpoint_sha256=None),
    "a design unknown": lambda v: v.update(design="evil"),
    "a format unknown": lambda v: v.update(format="2"),
}
CASES = [
    *(("config.json", change) for change in CONFIGS.values()),
    *(("preprocessor_config.json", change) for change in PROCESSORS.values()),
    *(("bundle/bundle.json", change) for change in BUNDLES.values()),
]


@pytest.mark.parametrize(("file", "change"), CASES, ids=[*CONFIGS, *PROCESSORS, *BUNDLES])
def test_an_absurd_file_is_refused_in_a_sentence(directory: Path, file: str, change: Edit) -> None:
    edit(directory / file, change)
    assert load(directory)


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[" * 100_000, b"[]", b"null", b"{" + b" " * 2**27]
)
@pytest.mark.parametrize(
    "file", ["config.json", "preprocessor_config.json", "bundle/bundle.json", "tokenizer.json"]
)
def test_a_file_that_is_no_json_is_refused(directory: Path, file: str, content: bytes) -> None:
    (directory / file).write_bytes(content)
    assert load(directory)


def places(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every value in an object of objects."""
    for name, value in values.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_an_odd_value_anywhere_is_refused_or_does_no_harm(
    directory: Path, checkpoint: Checkpoint, odd: Any
) -> None:
    for file in ("preprocessor_config.json", "bundle/bundle.json", "config.json"):
        whole = (directory / file).read_text()
        for *parents, name in places(json.loads(whole)):

            def change(values: dict[str, Any], at: list[str] = parents, name: str = name) -> None:
                for parent in at:
                    values = values[parent]
                values[name] = odd

            edit(directory / file, change)
            with contextlib.suppress(LoadError):
                if file.startswith("bundle"):
                    load_bundle(directory / "bundle", checkpoint.clip, checkpoint.sha256)
                else:
                    tiny.load(directory)
            (directory / file).write_text(whole)


def reshape(
    prefix: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, torch.Tensor]], object]:
    """Change the tensors whose names begin with `prefix`."""
    return lambda tensors: tensors.update(
        {name: change(value) for name, value in tensors.items() if name.startswith(prefix)}
    )


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "a prompt that is no number": lambda t: t["prompts.text"].fill_(torch.nan),
    "an infinite mean": lambda t: t["statistics.adv_mean"].fill_(torch.inf),
    "a negative variance": lambda t: t["statistics.clean_var"].fill_(-1),
    "a flat prompt": lambda t: t.update({"prompts.text": t["prompts.text"].flatten()}),
    "an empty prompt": lambda t: t.update({"prompts.text": t["prompts.text"][:, :, :0]}),
    "a prompt of whole numbers": lambda t: t.update({"prompts.text": t["prompts.text"].long()}),
    "a prompt longer than the context": lambda t: t.update(
        {"prompts.text": t["prompts.text"].repeat(1, 1, 40, 1)}
    ),
    "prompts deeper than the model": lambda t: t.update(
        {"prompts.text": t["prompts.text"].repeat(1, 40, 1, 1)}
    ),
    "no statistics of attacks": lambda t: t.pop("statistics.adv_var"),
    "statistics of one layer": lambda t: t.update(
        {"statistics.adv_var": t["statistics.adv_var"][:1]}
    ),
    "a tensor unknown": lambda t: t.update({"evil.x": torch.zeros(1)}),
    "two sets of text prompts": reshape("prompts.text", lambda x: x.repeat(2, 1, 1, 1)),
    "two sets of image prompts": reshape("prompts.vision", lambda x: x.repeat(2, 1, 1, 1)),
    "text prompts of another width": reshape("prompts.text", lambda x: x[..., :-1]),
    "image prompts of another width": reshape("prompts.vision", lambda x: x[..., :-1]),
    "image prompts that the statistics lack": reshape("prompts.vision", lambda x: x[:, :, :1]),
    "image prompts deeper than the model": reshape(
        "prompts.vision", lambda x: x.repeat(1, 9, 1, 1)
    ),
    "statistics of fewer tokens": reshape("statistics.", lambda x: x[:, :-1]),
    "statistics of another width": reshape("statistics.", lambda x: x[..., :-1]),
    "a variance of attacks below zero": lambda t: t["statistics.adv_var"].fill_(-1),
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_tensors_that_make_no_sense_are_refused(
    directory: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    """Though the hash of the prompts is right: whoever writes a bundle can write that, too."""
    file = directory / "bundle" / "bundle.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    sentence = load(directory)
    assert sentence
    if "belong to prompts" in sentence:
        found = sentence.rpartition(" ")[2]
        edit(directory / "bundle" / "bundle.json", lambda v: v.update(prompts_sha256=found))
        assert load(directory)


@pytest.mark.parametrize(
    "error", [KeyError("x"), ImportError("a\nb"), RecursionError(), OSError(5)]
)
def test_any_failure_of_loading_is_a_sentence(
    directory: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(runner, "load", fail)
    sentence = load(directory)
    assert sentence is not None
    assert type(error).__name__ in sentence
