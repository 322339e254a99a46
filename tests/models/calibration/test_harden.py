"""A hardened checkpoint: only its image tower moves, its runs resume exactly, and it serves."""

import argparse
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress
from transformers import AutoTokenizer, CLIPModel

from models.attacks.pgd import ascend
from models.calibration import harden, hardening_run
from models.calibration.decoded import decode_once
from models.calibration.hardening import Hardening, HardeningTrainer, image_parameters
from models.calibration.hardening_run import Run, Validation
from models.checkpoint import Checkpoint
from models.data import DataError, open_dataset
from service import cli
from tests import tiny

NAMES = ("cat", "dog", "lemon")
SETTINGS = Hardening(
    steps=8, batch=6, rate=1e-3, warm_up=2, epsilon=4 / 255, attack_steps=2, dtype="float32"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def checkpoint(directory: Path) -> Checkpoint:
    return tiny.load(directory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight pictures, each class with a colour of its own."""
    root = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(NAMES):
        (root / name).mkdir()
        for number in range(8):
            pixels = tiny.draw_image(10 * label + number) // 4
            pixels[..., label] += 150
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def make_trainer(
    checkpoint: Checkpoint, settings: Hardening = SETTINGS, labelled: bool = True
) -> HardeningTrainer:
    """A trainer on 24 pictures whose channel of class is bright, the rest noise."""
    draws = np.random.default_rng(0)
    labels = np.arange(24) % 3
    pixels = draws.integers(0, 120, (24, 3, 32, 32), dtype=np.uint8)
    pixels[np.arange(24), labels] += 60
    if not labelled:
        return HardeningTrainer(checkpoint.clip, pixels, None, None, settings)
    text = harden.encode_names(checkpoint, list(NAMES))
    return HardeningTrainer(checkpoint.clip, pixels, torch.from_numpy(labels), text, settings)


def weights(trainer: HardeningTrainer) -> dict[str, torch.Tensor]:
    return {
        f"{part} {name}": value
        for part, clip in (("student", trainer.student), ("average", trainer.average))
        for name, value in clip.model.state_dict().items()
    }


def run(directory: Path, folder: Path, out: Path, *more: str) -> int:
    flags = f"--model {directory} --data {folder} --out {out} --batch 6 --rate 1e-3 --warm-up 2 \
        --attack-steps 2 --epsilon 4/255 --dtype float32"
    return harden.main([*flags.split(), *more])


def log(partial: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (partial / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("labelled", [True, False])
def test_only_the_image_tower_is_trained(checkpoint: Checkpoint, labelled: bool) -> None:
    before = {name: value.clone() for name, value in checkpoint.clip.model.state_dict().items()}
    trainer = make_trainer(checkpoint, labelled=labelled)
    for _ in range(3):
        trainer.train_step()
    trained = image_parameters(trainer.student).keys()
    for clip in (trainer.student, trainer.average):
        for name, value in clip.model.state_dict().items():
            same = torch.equal(value, before[name])
            assert same == (name not in trained), name
    for name, value in checkpoint.clip.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_attack_stays_in_its_ball_and_raises_the_loss(checkpoint: Checkpoint) -> None:
    for labelled in (True, False):
        trainer = make_trainer(checkpoint, labelled=labelled)
        clean = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        clean[:, :, :4] = 0.0  # where half of the ball is outside of [0, 1]
        labels = torch.arange(6) % 3 if labelled else None
        with torch.no_grad():
            target = checkpoint.clip.encode_images(clean.unsqueeze(0)).projected[0]
        source = torch.Generator().manual_seed(2)
        attacked = trainer.attack(clean, target, labels, source)
        noise = torch.rand(clean.shape, generator=torch.Generator().manual_seed(2))
        noisy = (clean + (2 * noise - 1) * SETTINGS.epsilon).clamp(0, 1)
        assert (attacked - clean).abs().max() <= SETTINGS.epsilon + 1e-6
        assert attacked.min() >= 0
        assert attacked.max() <= 1

        def loss(
            pixels: torch.Tensor,
            trainer: HardeningTrainer = trainer,
            target: torch.Tensor = target,
            labels: torch.Tensor | None = labels,
        ) -> float:
            return sum(float(term) for term in trainer.losses(pixels, target, labels).values())

        assert loss(attacked) > 1.05 * loss(noisy)


def test_the_attack_leaves_weights_without_gradients(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(checkpoint)
    seen: list[bool] = []
    losses = trainer.losses

    def watch(*arguments: Any) -> dict[str, torch.Tensor]:
        seen.append(any(p.requires_grad for p in trainer.student.model.parameters()))
        return losses(*arguments)

    monkeypatch.setattr(trainer, "losses", watch)
    trainer.train_step()
    assert seen == [False, False, True]  # two attack steps, then the update
    assert all(p.grad is None for p in trainer.original.model.parameters())


def test_every_picture_is_seen_once_an_epoch_and_attacked_at_some_time(
    checkpoint: Checkpoint,
) -> None:
    trainer = make_trainer(checkpoint)
    attacked: set[int] = set()
    orders = []
    for epoch in range(12):
        rows: list[int] = []
        for place in range(4):
            trainer.step = 4 * epoch + place
            (batch, _) = trainer._draw_batch(torch.Generator().manual_seed(0))
            rows += batch.tolist()
            attacked |= set(batch[:4].tolist())
        assert sorted(rows) == list(range(24))
        orders.append(tuple(rows))
    assert len(set(orders)) == 12
    assert attacked == set(range(24))


def test_the_unsupervised_loss_is_the_squared_distance_to_the_original(
    checkpoint: Checkpoint,
) -> None:
    trainer = make_trainer(checkpoint, labelled=False)
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        target = checkpoint.clip.encode_images(pixels.unsqueeze(0)).projected[0]
    assert trainer.losses(pixels, target, None)["distance"] < 1e-6
    (moved,) = trainer.losses(pixels, target + 2.0, None).values()
    assert moved.item() == pytest.approx(4 * target.shape[1], rel=1e-4)


def test_the_learning_rate_depends_on_the_end_only_in_the_cool_down() -> None:
    short, long = (Hardening(steps=n, rate=1.0, warm_up=10, cooldown=0.5) for n in (40, 100))
    assert [short.rate_at(step) for step in (0, 4, 9, 19)] == pytest.approx([0.1, 0.5, 1, 1])
    assert all(short.rate_at(step) == long.rate_at(step) for step in range(20))
    assert short.rate_at(30) == pytest.approx(0.5)
    assert 0 < short.rate_at(39) < 0.01
    falling = [short.rate_at(step) for step in range(20, 40)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_resumed_run_equals_an_uninterrupted_one(checkpoint: Checkpoint, labelled: bool) -> None:
    whole = make_trainer(checkpoint, labelled=labelled)
    for _ in range(8):
        whole.train_step()
    begun = make_trainer(checkpoint, labelled=labelled)
    for _ in range(5):
        begun.train_step()
    resumed = make_trainer(checkpoint, labelled=labelled)
    resumed.restore(begun.state())
    for _ in range(3):
        resumed.train_step()
    expected = weights(whole)
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_hardening_makes_attacks_succeed_less_often(checkpoint: Checkpoint) -> None:
    settings = Hardening(
        steps=60, batch=24, rate=2e-3, warm_up=5, epsilon=8 / 255, attack_steps=2, dtype="float32"
    )
    trainer = make_trainer(checkpoint, settings)
    pixels = torch.from_numpy(trainer.pixels).float() / 255
    assert trainer.labels is not None
    assert trainer.text is not None
    validation = Validation(pixels, trainer.labels, trainer.text)
    before = validation.measure(trainer)
    first = trainer.train_step()
    for _ in range(59):
        last = trainer.train_step()
    after = validation.measure(trainer)
    assert last["cross_entropy"] < 0.7 * first["cross_entropy"]
    assert after["attacked"] >= before["attacked"] + 0.3
    assert after["clean"] >= before["clean"]


def test_a_command_stopped_by_a_signal_continues_exactly(
    directory: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(directory, folder, tmp_path / "whole", "--steps", "8") == 0
    step = HardeningTrainer.train_step

    def interrupted(trainer: HardeningTrainer) -> dict[str, float]:
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    monkeypatch.setattr(HardeningTrainer, "train_step", interrupted)
    out = tmp_path / "cut"
    assert run(directory, folder, out, "--steps", "8") == 1
    assert "the same command continues" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(HardeningTrainer, "train_step", step)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run(directory, folder, out, "--steps", "8") == 0
    one, other = (tiny.load(tmp_path / name).clip.model for name in ("whole", "cut"))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert [row["step"] for row in log(tmp_path / "cut.partial")] == [8]


def test_a_longer_run_branches_from_before_the_cool_down(
    directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(directory, folder, out, "--steps", "6", "--cooldown", "0.5") == 0
    longer = ("--steps", "10", "--cooldown", "0.5")
    assert run(directory, folder, out, *longer, "--force") == 0
    assert run(directory, folder, tmp_path / "whole", *longer) == 0
    one, other = (tiny.load(tmp_path / name).clip.model for name in ("whole", "out"))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    phases = json.loads((out / "hardening.json").read_text())["phases"]
    assert [(phase["first_step"], phase["steps"]) for phase in phases] == [(0, 6), (3, 10)]
    capsys.readouterr()
    # Both states are past the start of a cool-down that would begin at step 2.
    assert run(directory, folder, out, "--steps", "4", "--cooldown", "0.5", "--force") == 1
    assert "--steps of 10 or more" in capsys.readouterr().err


def test_another_runs_states_are_refused(
    directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(directory, folder, out, "--steps", "3") == 0
    assert run(directory, folder, out, "--steps", "3", "--seed", "1", "--force") == 1
    assert "holds a run with seed 0, not 1" in capsys.readouterr().err


def test_the_written_checkpoint_is_complete(
    checkpoint: Checkpoint, directory: Path, folder: Path, tmp_path: Path
) -> None:
    """In float16, as a published checkpoint may be: its text tower keeps every bit."""
    base = tmp_path / "base"
    CLIPModel.from_pretrained(directory).half().save_pretrained(base)
    checkpoint.tokenizer.save_pretrained(base)
    (base / "preprocessor_config.json").write_bytes(
        (directory / "preprocessor_config.json").read_bytes()
    )
    out = tmp_path / "out"
    validate = ("--validate", str(folder), "--validate-limit", "9")
    assert run(base, folder, out, "--steps", "3", *validate) == 0
    before, after = tiny.load(base), tiny.load(out)
    stored = CLIPModel.from_pretrained(out)
    assert stored.dtype == torch.float16
    for name, value in CLIPModel.from_pretrained(base).state_dict().items():
        moved = name in image_parameters(before.clip)
        assert torch.equal(value, stored.state_dict()[name]) != moved, name
    assert after.preprocessing == before.preprocessing
    text = "a photo of a school bus."
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer(text)["input_ids"] == before.tokenizer(text)["input_ids"]
    facts = json.loads((out / "hardening.json").read_text())
    assert facts["checkpoint_sha256"] == before.sha256
    assert (facts["loss"], facts["pictures"], facts["classes"]) == ("labelled", 24, 3)
    assert facts["phases"][0]["epsilon"] == pytest.approx(4 / 255)
    (row,) = log(tmp_path / "out.partial")
    assert row.keys() == {
        *("step", "rate", "seconds", "cross_entropy", "distance", "clean", "attacked")
    }
    assert not list(tmp_path.glob("out.new")) + list(tmp_path.glob("out.old"))


def test_the_command_hardens_and_its_checkpoint_answers(
    directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = f"--model {directory} --data {folder} --out {out} --batch 6 --steps 2 --attack-steps 1"
    assert cli.main(["harden", *flags.split()]) == 0
    capsys.readouterr()
    asked = ["--labels", "cat,dog,lemon", "--model", str(out), "--method", "ensemble", "--json"]
    assert cli.main(["classify", str(folder / "cat" / "0.png"), *asked]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"] == "out"
    assert {label["label"] for label in answer["labels"]} == set(NAMES)


def test_pictures_without_labels_are_enough(directory: Path, folder: Path, tmp_path: Path) -> None:
    assert run(directory, folder / "cat", tmp_path / "out", "--steps", "3") == 0
    facts = json.loads((tmp_path / "out" / "hardening.json").read_text())
    assert (facts["loss"], facts["classes"]) == ("unsupervised", 0)
    (row,) = log(tmp_path / "out.partial")
    assert row.keys() == {"step", "rate", "seconds", "distance"}


def test_labels_can_be_ignored(directory: Path, folder: Path, tmp_path: Path) -> None:
    assert run(directory, folder, tmp_path / "out", "--steps", "2", "--unsupervised") == 0
    facts = json.loads((tmp_path / "out" / "hardening.json").read_text())
    assert facts["loss"] == "unsupervised"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epsilon", ["2"]),
        ("--attack-steps", ["0"]),
        ("--step-size", ["-1"]),
        ("--attacked-share", ["1.5"]),
        ("--rate", ["-1e-5"]),
        ("--batch", ["0"]),
        ("--steps", ["0"]),
        ("--ema", ["1"]),
        ("--cooldown", ["2"]),
        ("--smoothing", ["1"]),
        ("--crop-area", ["0", "1"]),
        ("--crop-area", ["0.9", "0.2"]),
        ("--dtype", ["float16"]),
    ],
)
def test_values_out_of_range_are_refused(
    flag: str, value: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        harden.main(["--data", "nowhere", "--out", str(tmp_path / "out"), flag, *value])
    assert stopped.value.code == 2
    assert flag.removeprefix("--") in capsys.readouterr().err.splitlines()[-1]


def test_an_existing_checkpoint_is_kept(
    directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        run(directory, folder, tmp_path / "out", "--steps", "2")
    assert "--force replaces it" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_too_few_pictures_are_refused(
    directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(directory, folder, tmp_path / "out", "--batch", "25") == 1
    assert "24 images do not fill a batch of 25" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--device", "nowhere"], "device 'nowhere' is unknown"),
        (["--validate-limit", "0"], "no images to validate with"),
    ],
)
def test_options_that_cannot_be_used_are_one_sentence(
    directory: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    sentence: str,
) -> None:
    assert run(directory, folder, tmp_path / "out", "--validate", str(folder), *more) == 1
    assert sentence in capsys.readouterr().err


def test_pictures_are_decoded_once_for_each_source(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_dataset(folder)
    decoded: list[int] = []

    def read(source: str) -> Any:
        decoded.clear()
        return decode_once(data, source, checkpoint.preprocessing, tmp_path, decoded.append)

    pixels, labels = read("one")
    assert decoded == list(range(1, 25))
    assert pixels.shape == (24, 3, 32, 32)
    assert labels.tolist() == [example.label for example in data]
    again, _ = read("one")
    assert decoded == []
    assert np.array_equal(again, pixels)
    read("another")
    assert len(decoded) == 24
    usage = argparse.Namespace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="decoded images take"):
        read("third")


def test_states_are_saved_as_time_passes(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardening_run, "SAVE_EVERY", 0.0)
    saved: list[tuple[str, int]] = []
    trainer = make_trainer(checkpoint)
    begun = Run(trainer, tmp_path, {"seed": 0})
    begun.resume()
    save = Run.save

    def watch(run: Run, name: str) -> None:
        saved.append((name, run.trainer.step))
        save(run, name)

    monkeypatch.setattr(Run, "save", watch)
    with Progress(disable=True) as bar:
        assert begun.train(None, bar)
    latest = [("latest", step) for step in range(1, 9)]
    latest.insert(5, ("before-cooldown", 5))
    assert saved == latest
    assert {file.name for file in tmp_path.iterdir()} == {
        *("latest.pt", "before-cooldown.pt", "log.jsonl")
    }


def test_processes_share_a_batch_and_agree(directory: Path, folder: Path, tmp_path: Path) -> None:
    """Without an attack, whose starts each process draws by itself, two equal one."""
    flags = f"--model {directory} --data {folder} --batch 6 --rate 1e-3 --warm-up 2 --steps 3 \
        --attacked-share 0 --dtype float32 --out".split()
    tiny.run_twice("models.calibration.harden", [*flags, str(tmp_path / "two")])
    assert harden.main([*flags, str(tmp_path / "one")]) == 0
    one, other = (tiny.load(tmp_path / name).clip.model for name in ("one", "two"))
    start = tiny.load(directory).clip.model.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], atol=2e-5, rtol=1e-4)
    moved = "visual_projection.weight"
    assert not torch.allclose(one.state_dict()[moved], start[moved], atol=2e-4)


def test_validation_counts_what_an_attack_leaves(checkpoint: Checkpoint) -> None:
    trainer = make_trainer(checkpoint)
    pixels = torch.from_numpy(trainer.pixels).float() / 255
    assert trainer.labels is not None
    assert trainer.text is not None
    text = trainer.text
    with torch.no_grad():
        features = trainer.average.encode_images(pixels.unsqueeze(0)).features[0]
    goals = (features @ text.T).argmax(dim=-1)  # so that all are right clean
    found = Validation(pixels, goals, text).measure(trainer, batch=10)

    def loss(attacked: torch.Tensor) -> torch.Tensor:
        features = trainer.average.encode_images(attacked.unsqueeze(0)).features[0]
        logits = trainer.average.logit_scale * features @ text.T
        return torch.nn.functional.cross_entropy(logits, goals, reduction="sum")

    hurt = ascend(pixels, loss, SETTINGS.epsilon, 10, SETTINGS.epsilon / 4)
    with torch.no_grad():
        features = trainer.average.encode_images(hurt.unsqueeze(0)).features[0]
    left = ((features @ text.T).argmax(dim=-1) == goals).float().mean().item()
    assert found["clean"] == 1.0
    assert found["attacked"] == pytest.approx(left)
    assert left < 1.0


def test_a_tokenizer_can_be_named(
    directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Path(shutil.copytree(directory, tmp_path / "bare"))
    for file in bare.glob("*token*"):
        file.unlink()
    assert run(bare, folder, tmp_path / "out", "--steps", "4") == 1
    assert "no tokenizer" in capsys.readouterr().err
    named = ("--tokenizer", str(directory))
    assert run(bare, folder, tmp_path / "out", "--steps", "4", *named) == 0
    words = "a photo of a school bus"
    kept, own = (tiny.load(place).tokenizer(words) for place in (tmp_path / "out", directory))
    assert kept["input_ids"] == own["input_ids"]
