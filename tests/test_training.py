"""The embedded model's training: it learns, it resumes, and what it exports loads elsewhere."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPTokenizerFast

from models.data import open_dataset
from models.training.augment import crop, jitter, mix
from models.training.captions import Nouns
from models.training.embedded import export
from models.training.objective import TextTargets
from models.training.recipe import Recipe, build_model
from models.training.report import BEGIN, END, draw_curve, write_between_marks
from models.training.tokenizer import train_tokenizer
from models.training.trainer import Budget, Trainer, run
from models.training.zeroshot import normalize, rank, stack

NOUNS = Nouns(
    [["red thing", "ruby"], ["green thing"], ["blue thing"]], ["ruby", "cat", "school bus"]
)
RECIPE = Recipe(
    width=32,
    layers=2,
    heads=2,
    text_width=32,
    text_layers=1,
    context=24,
    vocabulary=900,
    projection=16,
    size=16,
    resolutions=((0.0, 8), (0.5, 16)),
    batch=12,
    noun_batch=3,
    mixing=0.5,
    average=0.5,
)
PUBLISHED = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def make_images() -> tuple[torch.Tensor, torch.Tensor]:
    """48 images whose channel of class is bright, the rest noise."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(48) % 3
    images = torch.randint(0, 120, (48, 3, 16, 16), generator=generator)
    images[torch.arange(48), labels] += 130
    return images.to(torch.uint8), labels


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(NOUNS.texts, RECIPE.vocabulary, RECIPE.context)


def make_trainer(tokenizer: Any, budget: Budget) -> Trainer:
    # Each reading of this clock is a second later than the one before: a step takes a second.
    clock = itertools.count().__next__
    targets = TextTargets.center(NOUNS, PUBLISHED, torch.device("cpu"))
    model = build_model(RECIPE, tokenizer).train()
    return Trainer(model, tokenizer, targets, *make_images(), RECIPE, budget, clock)


def test_training_learns_the_classes_and_the_published_features(tokenizer: Any) -> None:
    trainer = make_trainer(tokenizer, Budget(steps=60))
    seen = [trainer.train_step() for _ in range(60)]
    first, last = (sum(sum(part.values()) for part in rows) for rows in (seen[:5], seen[-5:]))
    assert last < 0.8 * first
    images, labels = make_images()
    names = ["red thing", "green thing", "blue thing"]
    best = rank(trainer.average.eval(), tokenizer, images, names).argmax(1)
    assert (best == labels).float().mean() > 0.8


def test_a_resumed_run_equals_an_uninterrupted_one(tokenizer: Any, tmp_path: Path) -> None:
    whole = make_trainer(tokenizer, Budget(steps=8))
    for _ in range(8):
        whole.train_step()
    begun = make_trainer(tokenizer, Budget(steps=8))
    for _ in range(5):
        begun.train_step()
    begun.save(tmp_path / "checkpoint.pt")
    resumed = make_trainer(tokenizer, Budget(steps=8))
    resumed.load(tmp_path / "checkpoint.pt")
    for _ in range(3):
        resumed.train_step()
    for ours, theirs in ((resumed.model, whole.model), (resumed.average, whole.average)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


def test_a_budget_of_seconds_ends_on_the_clock_and_logs_its_curve(
    tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(tokenizer, Budget(seconds=6))
    rows = list(run(trainer, tmp_path, lambda model: {"val": 0.25}, every=3))
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0]["val"] == 0.25
    assert rows[1]["pixels"] == 16
    assert len((tmp_path / "curve.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "checkpoint.pt").exists()


def test_targets_have_no_common_part_and_stand_in_for_a_class_with_a_published_synonym() -> None:
    shared = PUBLISHED + 10 * torch.ones(16)
    targets = TextTargets.center(NOUNS, shared, torch.device("cpu"))
    narrow = F.normalize(shared, dim=-1)
    assert (narrow @ narrow.T).min() > 0.9
    assert (targets.features @ targets.features.T - torch.eye(3)).max() < 0.5
    learned = F.normalize(torch.ones(3, 16), dim=-1)
    anchors = targets.anchors(learned)
    assert torch.allclose(anchors[0], targets.features[0])
    assert torch.equal(anchors[1:], learned[1:])


def test_export_loads_offline_and_ranks_alike(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trainer = make_trainer(tokenizer, Budget(steps=2))
    trainer.train_step()
    export(trainer.average, tokenizer, tmp_path)
    model = CLIPModel.from_pretrained(tmp_path, dtype=torch.float32)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    images, names = make_images()[0], ["red thing", "cat", "school bus"]
    ours = rank(trainer.average.eval(), tokenizer, images, names)
    assert torch.allclose(rank(model, loaded, images, names), ours, atol=2e-2)
    # The plain forward of transformers, padded to the whole context, says the same.
    texts = [f"a photo of a {name}." for name in names]
    padded = loaded(texts, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        plain = model(pixel_values=normalize(images.float() / 255), **padded)
    scale = model.logit_scale.exp().detach()
    assert torch.allclose(
        plain.logits_per_image / scale, rank(model, loaded, images, names), atol=1e-5
    )
    assert model.config.text_config.eos_token_id == loaded.eos_token_id != 2
    assert loaded.pad_token_id not in (loaded.eos_token_id, loaded.bos_token_id)


def test_exported_preprocessor_is_ours(tokenizer: Any, tmp_path: Path) -> None:
    export(build_model(RECIPE, tokenizer), tokenizer, tmp_path / "model")
    noise = torch.randint(0, 256, (37, 53, 3), generator=torch.Generator().manual_seed(2))
    image = Image.fromarray(noise.to(torch.uint8).numpy())
    (tmp_path / "pictures").mkdir()
    image.save(tmp_path / "pictures" / "noise.png")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    theirs = processor(images=image, return_tensors="pt")["pixel_values"]
    ours, _ = stack(open_dataset(tmp_path / "pictures"), RECIPE.size)
    assert torch.allclose(normalize(ours.float() / 255), theirs, atol=1e-4)


@pytest.mark.parametrize(
    "text", ["a photo of a school bus.", "Übergröße 日本語 🙂", "x" * 40, "don't stop - now, 1234"]
)
def test_any_text_tokenizes_and_reads_back(tokenizer: Any, tmp_path: Path, text: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizerFast.from_pretrained(tmp_path)
    ids = loaded(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert ids[0] == loaded.bos_token_id
    assert ids.index(loaded.eos_token_id) == len(ids) - 1
    back = loaded.decode(ids, skip_special_tokens=True)
    assert "".join(back.split()) == "".join(text.lower().split())


def test_known_words_are_one_token_and_long_text_is_cut(tokenizer: Any) -> None:
    assert len(tokenizer("school bus")["input_ids"]) == 4
    assert len(tokenizer("bus " * 99, truncation=True)["input_ids"]) == RECIPE.context


def test_augmentation_follows_its_seed_and_stays_in_range() -> None:
    images, _ = make_images()

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        cut = jitter(crop(images, 8, generator), 0.5, generator)
        return mix(cut, 1.0, generator)[0]

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert draw(0).shape == (48, 3, 8, 8)
    assert draw(0).min() >= 0
    assert draw(0).max() <= 1


def test_mixed_labels_say_how_much_of_each_image_is_left() -> None:
    labels = torch.tensor([0, 1])
    images = labels.float().view(2, 1, 1, 1).expand(2, 3, 20, 20).contiguous()
    for seed in range(6):
        mixed, shares = mix(images, 1.0, torch.Generator().manual_seed(seed))
        assert torch.allclose(mixed.mean((1, 2, 3)), shares.labels(labels, 2)[:, 1], atol=1e-4)


def test_the_report_replaces_only_what_is_between_its_marks(tmp_path: Path) -> None:
    card = tmp_path / "MODEL_CARD.md"
    card.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_between_marks(card, "new")
        assert card.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    card.write_text("no marks")
    with pytest.raises(ValueError, match="no figure marks"):
        write_between_marks(card, "new")


def test_the_same_curve_gives_the_same_picture(tmp_path: Path) -> None:
    curve = [
        {"epoch": epoch, "loss_image": 5.0 - epoch, "val": 0.1, "unseen": 0.2, "pixels": 16 * epoch}
        for epoch in (1.0, 2.0, 3.0)
    ]
    pictures = []
    for name in ("a.svg", "b.svg"):
        draw_curve(curve, tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]
