"""Bundles are learned from pictures, the same after a break, and only for their checkpoint."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.progress import Progress

from models import adamw
from models.attacks.pgd import ascend
from models.bundle import DefenseBundle, load_bundle
from models.calibration import calibrate
from models.calibration.options import make_parser
from models.calibration.prompt_tuning import (
    Tuning,
    _Draws,
    _logits,
    _mean_loss,
    _spread,
    attack,
)
from models.checkpoint import Checkpoint
from models.data import open_dataset
from tests import tiny

NAMES = ("cat", "dog", "lemon")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
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


def run(directory: Path, folder: Path, out: Path, *more: str) -> int:
    flags = f"--steps 60 --batch 12 --rate 1e-2 --depth 2 --tokens 4 --epsilon 2/255 --images 12 \
        --threshold-views 4 --warm-up 5 --model {directory} --data {folder} --out {out}"
    return calibrate.main([*flags.split(), *more])


@pytest.mark.parametrize("design", ["v", "vli", "vlj"])
def test_a_bundle_is_made_and_its_loss_falls(
    directory: Path,
    checkpoint: Checkpoint,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    design: str,
) -> None:
    losses: list[float] = []
    tune = calibrate.tune

    def watch(*arguments: object) -> object:
        report = arguments[-1]

        def both(progress: calibrate.Progress) -> None:
            losses.append(progress.losses[-1])
            report(progress)  # type: ignore[operator]

        return tune(*arguments[:-1], both)  # type: ignore[arg-type]

    monkeypatch.setattr(calibrate, "tune", watch)
    out = tmp_path / "bundle"
    assert run(directory, folder, out, "--design", design) == 0
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    bundle = load_bundle(out, checkpoint.clip, checkpoint.sha256)
    assert bundle.prompts.design == design
    assert bundle.statistics is not None
    assert not torch.equal(bundle.statistics.clean_mean, bundle.statistics.adv_mean)
    assert bundle.suspicion.keys() == {"learned", "none"}
    assert all(0 < threshold < 1 for threshold in bundle.suspicion.values())
    assert bundle.provenance["tuning"]["epsilon"] == pytest.approx(2 / 255)
    assert not out.with_name("bundle.partial").exists()


def test_the_text_prompts_of_vli_start_where_they_change_nothing(checkpoint: Checkpoint) -> None:
    clip, depth = checkpoint.clip, checkpoint.clip.text_layers
    template, words = calibrate._begin_text(checkpoint, "vli")
    assert template == "{}."
    prompts = calibrate.begin(clip, Tuning(depth=depth), words).prompts
    assert prompts.text is not None
    slots = words.shape[1] - 1
    assert prompts.text.shape == (1, depth, slots, clip.text_width)
    names = list(NAMES)
    texts = calibrate._tokenize(checkpoint, names, template, slots)
    plain = calibrate._tokenize(checkpoint, names, calibrate.DEFAULT_TEMPLATE, 0)
    torch.testing.assert_close(clip.encode_labels(texts, prompts.text), clip.encode_labels(plain))


def test_a_run_cut_short_ends_as_one_in_a_piece(
    directory: Path,
    checkpoint: Checkpoint,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(out: Path) -> DefenseBundle:
        return load_bundle(out, checkpoint.clip, checkpoint.sha256)

    assert run(directory, folder, tmp_path / "whole") == 0
    advance, calls = adamw.advance, 0

    def interrupt(*arguments: object) -> object:
        """Ctrl-C in the middle of step 30, whose number is counted already."""
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return advance(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(adamw, "advance", interrupt)
    assert run(directory, folder, tmp_path / "cut") == 130
    assert capsys.readouterr().err == "Stopped. The same command resumes.\n"
    assert not (tmp_path / "cut").exists()
    resumed: list[int] = []
    tune = calibrate.tune
    monkeypatch.setattr(
        calibrate,
        "tune",
        lambda *a: (resumed.append(a[-2].step), tune(*a))[1],  # type: ignore[attr-defined]
    )
    assert run(directory, folder, tmp_path / "cut") == 0
    assert resumed == [29]
    for name, value in load(tmp_path / "whole").prompts.tensors.items():
        torch.testing.assert_close(load(tmp_path / "cut").prompts.tensors[name], value)


def test_progress_is_saved_by_time_and_at_the_last_step(
    directory: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = calibrate.save_progress

    def note(*arguments: object) -> None:
        saved.append(arguments[-1].step)  # type: ignore[attr-defined]
        save(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(calibrate, "save_progress", note)
    now = 0.0

    def tick() -> float:
        nonlocal now
        now += 4.0  # seconds between two readings
        return now

    monkeypatch.setattr(calibrate, "time", SimpleNamespace(monotonic=tick))
    assert run(directory, folder, tmp_path / "bundle") == 0
    assert saved[-1] == 60
    assert calibrate.SAVE_SECONDS < 60
    assert max(b - a for a, b in zip([0, *saved], saved, strict=False)) * 4.0 <= 60


def test_a_bundle_is_replaced_only_by_force(
    directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "kept").touch()
    assert run(directory, folder, out, "--steps", "2") == 1
    assert capsys.readouterr().err == f"{out} exists; name another --out or add --force\n"
    assert (out / "kept").exists()
    assert run(directory, folder, out, "--steps", "2", "--force") == 0
    assert not (out / "kept").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epsilon", "8"),
        ("--epsilon", "1"),
        ("--epsilon", "-1/255"),
        ("--depth", "50"),
        ("--depth", "0"),
        ("--tokens", "0"),
        ("--steps", "0"),
        ("--batch", "1"),
        ("--rate", "0"),
        ("--clean-share", "1.5"),
        ("--shots", "0"),
        ("--images", "-1"),
        ("--threshold-views", "1"),
        ("--false-positive-rate", "1"),
        ("--seed", "1.5"),
    ],
)
def test_values_out_of_range_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        calibrate.main(["--data", "d", "--out", str(tmp_path / "out"), flag, value])
    assert ended.value.code == 2
    assert f"argument {flag}:" in capsys.readouterr().err


def test_a_depth_beyond_the_model_is_refused(
    directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(directory, folder, tmp_path / "bundle", "--depth", "12") == 1
    assert "--depth 12" in capsys.readouterr().err


def test_every_flag_is_explained() -> None:
    for action in make_parser()._actions:
        assert action.help, action.dest
        assert len(action.help) > 8, action.dest


def test_unlabelled_pictures_take_statistics_for_known_prompts(
    directory: Path, checkpoint: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    tiny.make_bundle(checkpoint).save(tmp_path / "old")
    old = load_bundle(tmp_path / "old", checkpoint.clip, checkpoint.sha256)
    assert refresh(directory, folder / "cat", tmp_path / "old", tmp_path / "new") == 0
    new = load_bundle(tmp_path / "new", checkpoint.clip, checkpoint.sha256)
    assert new.prompts_sha256 == old.prompts_sha256
    assert new.statistics is not None
    assert old.statistics is not None
    assert not torch.equal(new.statistics.clean_mean, old.statistics.clean_mean)


def refresh(directory: Path, folder: Path, old: Path, new: Path, *more: str) -> int:
    """Take statistics anew for the prompts of a bundle."""
    flags = f"--prompts {old} --labels {','.join(NAMES)} --images 12 --threshold-views 4 \
        --model {directory} --data {folder} --out {new}"
    return calibrate.main([*flags.split(), *more])


@pytest.mark.parametrize("option", ["--epsilon 1/255", "--attack-steps 3", "--shots 16"])
def test_options_of_learning_do_not_go_with_prompts_that_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """Not even their defaults, which may differ from what the bundle says."""
    with pytest.raises(SystemExit, match="2"):
        refresh(tmp_path, tmp_path, tmp_path / "old", tmp_path / "new", *option.split())
    assert f"leave out {option.split()[0]}\n" in capsys.readouterr().err


def test_statistics_keep_to_the_attack_of_the_prompts(
    directory: Path, checkpoint: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    """Also where they were taken anew before."""
    assert run(directory, folder, tmp_path / "0", "--steps", "2", "--attack-steps", "3") == 0
    for number in (1, 2):
        assert refresh(directory, folder, tmp_path / str(number - 1), tmp_path / str(number)) == 0
        made = load_bundle(tmp_path / str(number), checkpoint.clip, checkpoint.sha256).provenance
        assert made["epsilon"] == pytest.approx(2 / 255)
        assert made["attack_steps"] == 3


def test_pictures_are_resized_and_cropped_once(checkpoint: Checkpoint) -> None:
    """Calibration holds view 0: the checkpoint's resize, here to twice the size, is done."""
    other = replace(checkpoint.preprocessing, short_side=64)
    side = checkpoint.preprocessing.crop
    pictures = torch.stack([torch.from_numpy(tiny.draw_image(n)[:side, :side]) for n in range(3)])
    pixels = pictures.permute(0, 3, 1, 2).contiguous()
    views = _spread(pixels / 255, 2, other, [0, 1, 2])
    torch.testing.assert_close(views[:, 0], pixels / 255)
    bundle, found = tiny.make_bundle(checkpoint), []
    for preprocessing in (checkpoint.preprocessing, other):
        model = replace(checkpoint, preprocessing=preprocessing)
        with Progress(disable=True) as bar:
            names = list(NAMES)
            found.append(calibrate.set_thresholds(model, bundle, names, pixels, 4, 0.3, bar))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("batch", "share", "attacked"), [(10, 0.9, 1), (10, 0.3, 7), (64, 0.5, 32), (12, 1.0, 0)]
)
def test_the_attacked_share_of_a_batch_is_rounded(batch: int, share: float, attacked: int) -> None:
    """10 * (1 - 0.9) is just below 1."""
    draws = _Draws.of(Tuning(batch=batch, clean_share=share), 0, torch.zeros(5, 3, 4, 4))
    assert len(draws.noise) == attacked


@pytest.mark.parametrize(("shots", "learned", "again"), [(4, 12, 0), (6, 18, 6), (0, 0, 0)])
def test_the_threshold_is_set_on_pictures_that_taught_nothing(
    checkpoint: Checkpoint, folder: Path, shots: int, learned: int, again: int
) -> None:
    """As far as there are others; how many are not is said."""
    with Progress(disable=True) as bar:
        taught, others, twice = calibrate.gather(
            checkpoint, open_dataset(folder), shots, 12, 0, bar
        )
    assert (len(taught), len(others), twice) == (learned, 12, again)
    assert all(taught.labels.count(label) == shots for label in range(3))
    known = {view.numpy().tobytes() for view in taught.pixels}
    assert sum(view.numpy().tobytes() in known for view in others.pixels) == again


def test_unlabelled_pictures_cannot_teach(
    directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(directory, folder / "cat", tmp_path / "bundle", "--labels", "cat,dog") == 1
    assert "no labels to learn from" in capsys.readouterr().err


def test_prompts_can_be_learned_on_clean_pictures_alone(
    directory: Path, folder: Path, tmp_path: Path
) -> None:
    assert run(directory, folder, tmp_path / "bundle", "--clean-share", "1", "--steps", "2") == 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--labels", "cat"], "--labels names 1 of the 3 classes"),
        (["--device", "nowhere"], "device 'nowhere' is unknown"),
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
    assert run(directory, folder, tmp_path / "bundle", *more) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--epsilon", "--clean-share"])
def test_a_fraction_by_zero_is_refused(
    directory: Path, folder: Path, tmp_path: Path, option: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(directory, folder, tmp_path / "bundle", option, "1/0")


def test_the_inner_loop_stays_in_its_ball_and_raises_the_loss() -> None:
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x * weights).sum()

    attacked = ascend(pixels, loss, 0.03, 10, 0.01, torch.Generator().manual_seed(2))
    assert (attacked - pixels).abs().max() <= 0.03 + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    best = (pixels + 0.03 * weights.sign()).clamp(0, 1)
    torch.testing.assert_close(attacked, best, atol=1e-6, rtol=0)  # a linear loss has one answer


def test_an_attack_through_views_hurts_new_views_more(checkpoint: Checkpoint) -> None:
    """The mean prediction over views that the attack never met, at the same epsilon and steps."""
    clip, epsilon, steps = checkpoint.clip, 8 / 255, 8
    text = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    text = torch.nn.functional.normalize(text, dim=-1)
    pictures = [torch.from_numpy(tiny.draw_image(seed)[:32, :32]) for seed in range(12)]
    pixels = torch.stack(pictures).permute(0, 3, 1, 2).float() / 255

    def cut(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
        source = random.Random(seed)
        return lambda batch: _spread(
            batch, 8, checkpoint.preprocessing, [source.randrange(2**31) for _ in batch]
        )

    with torch.no_grad():
        goals = _logits(clip, cut(0)(pixels), text, None).softmax(dim=-1).mean(dim=1).argmax(dim=-1)

    def loss(attacked: torch.Tensor) -> float:
        with torch.no_grad():
            views = torch.cat([cut(seed)(attacked) for seed in (1, 2, 3)], dim=1)
            return float(_mean_loss(_logits(clip, views, text, None), goals, "mean"))

    drawn: list[torch.Tensor] = []
    through = cut(4)

    def watch(batch: torch.Tensor) -> torch.Tensor:
        drawn.append(through(batch))
        return drawn[-1]

    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(5))
    single = attack(clip, pixels, goals, text, None, epsilon, steps, noise)
    several = attack(clip, pixels, goals, text, None, epsilon, steps, noise, watch)
    assert [views.shape for views in drawn] == [(12, 8, 3, 32, 32)] * steps
    assert not torch.equal(drawn[0][:, 1:], drawn[1][:, 1:])
    assert (several - pixels).abs().max() <= epsilon + 1e-6
    assert loss(several) > loss(single) > loss(pixels)


def test_prompts_are_learned_against_an_attack_through_views(
    directory: Path, checkpoint: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    found = {}
    for views in ("1", "3"):
        out = tmp_path / views
        few = ("--steps", "3", "--attack-views", views, "--attack-steps", "2")
        assert run(directory, folder, out, *few) == 0
        found[views] = load_bundle(out, checkpoint.clip, checkpoint.sha256)
    assert found["3"].provenance["tuning"]["attack_views"] == 3
    assert found["3"].prompts_sha256 != found["1"].prompts_sha256


def test_text_prompts_that_are_not_learned_stay_the_words(
    directory: Path, checkpoint: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    found = {}
    for learns in ("all", "vision"):
        out = tmp_path / learns
        assert run(directory, folder, out, "--steps", "3", "--learns", learns) == 0
        found[learns] = load_bundle(out, checkpoint.clip, checkpoint.sha256).prompts.tensors
    _, words = calibrate._begin_text(checkpoint, "vli")
    first = calibrate.begin(checkpoint.clip, Tuning(depth=2, tokens=4), words).prompts.tensors
    assert torch.equal(found["vision"]["text"], first["text"])
    assert not torch.equal(found["vision"]["vision"], first["vision"])
    assert not torch.equal(found["all"]["text"], first["text"])


def test_a_tokenizer_can_be_named(
    directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Path(shutil.copytree(directory, tmp_path / "bare"))
    for file in bare.glob("*token*"):
        file.unlink()
    assert run(bare, folder, tmp_path / "out", "--steps", "2") == 1
    assert "no tokenizer" in capsys.readouterr().err
    named = ("--tokenizer", str(directory))
    assert run(bare, folder, tmp_path / "out", "--steps", "2", *named) == 0


@pytest.mark.parametrize("clean_share", ["0.2", "0.9"], ids=["an uneven share", "one attacked"])
def test_processes_share_a_batch_and_learn_the_same(
    directory: Path, checkpoint: Checkpoint, folder: Path, tmp_path: Path, clean_share: str
) -> None:
    """Of eleven pictures one has six and the other five, attacked through views or not."""
    flags = f"--steps 4 --batch 11 --rate 1e-2 --depth 2 --tokens 4 --epsilon 2/255 --images 6 \
        --views 2 --attack-views 2 --threshold-views 2 --warm-up 1 --clean-share {clean_share} \
        --model {directory} --data {folder} --out".split()
    tiny.run_twice("models.calibration.calibrate", [*flags, str(tmp_path / "two")])
    assert calibrate.main([*flags, str(tmp_path / "one")]) == 0
    one, other = (
        load_bundle(tmp_path / name, checkpoint.clip, checkpoint.sha256).prompts.tensors
        for name in ("one", "two")
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-5, rtol=0)
    assert one["vision"].abs().max() > 1e-2
