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
from research.embedded.augment import crop, jitter, mix, skip_blocks
from research.embedded.captions import Nouns
from research.embedded.losses import Targets, center
from research.embedded.recipe import Recipe, build_model
from research.embedded.report import BEGIN, END, draw_curve, write_between_marks
from research.embedded.tokenizer import train_tokenizer
from research.embedded.train import export, warm_start
from research.embedded.trainer import Budget, Trainer, run
from research.embedded.wordnet import WordNet
from research.embedded.zeroshot import normalize, rank, stack

NOUNS = Nouns(
    [["red thing", "ruby"], ["green thing"], ["blue thing"]],
    ["ruby", "cat", "school bus"],
    ["1", "2", "3"],
)
EMPTY = WordNet({}, {}, {})
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
    lesson=0.25,
    lesson_batch=12,
    resolutions=((0.0, 8), (0.5, 16)),
    batch=12,
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
    targets = Targets.derive(NOUNS, PUBLISHED, EMPTY, torch.device("cpu"))
    model = build_model(RECIPE, tokenizer).train()
    return Trainer(model, tokenizer, targets, *make_images(), RECIPE, budget, clock)


def test_training_learns_the_classes_and_the_published_features(tokenizer: Any) -> None:
    trainer = make_trainer(tokenizer, Budget(steps=120))
    seen = [trainer.train_step() for _ in range(120)]
    phases = ((seen[:30], {"cosine", "relation"}), (seen[30:], {"image", "noun"}))
    for rows, kinds in phases:
        assert all(row.keys() == kinds for row in rows)
        first, last = (sum(sum(row.values()) for row in part) for part in (rows[:5], rows[-5:]))
        assert last < 0.9 * first
    images, labels = make_images()
    names = ["red thing", "green thing", "blue thing"]
    best = rank(trainer.average.eval(), tokenizer, images, names).argmax(1)
    assert (best == labels).float().mean() > 0.8


def test_a_resumed_run_equals_an_uninterrupted_one(tokenizer: Any, tmp_path: Path) -> None:
    whole = make_trainer(tokenizer, Budget(steps=8))
    for _ in range(8):
        whole.train_step()
    begun = make_trainer(tokenizer, Budget(steps=8))
    for _ in range(5):  # two of words, three of images
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
    assert [row["epoch"] for row in rows] == [0.25, 1.0]  # two steps of words come first
    assert rows[0]["val"] == 0.25
    assert rows[1]["pixels"] == 16
    assert len((tmp_path / "curve.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "checkpoint.pt").exists()


def test_targets_have_no_common_part_and_a_published_synonym_speaks_for_its_class() -> None:
    shared = PUBLISHED + 10 * torch.ones(16)
    targets = Targets.derive(NOUNS, shared, EMPTY, torch.device("cpu"))
    narrow = F.normalize(shared, dim=-1)
    assert (narrow @ narrow.T).min() > 0.9
    assert (targets.published @ targets.published.T - torch.eye(3)).max() < 0.5
    assert torch.allclose(targets.classes[0], targets.published[0])
    assert torch.equal(targets.published, center(shared))


def test_images_do_not_move_the_words(tokenizer: Any) -> None:
    trainer = make_trainer(tokenizer, Budget(steps=8))
    for _ in range(2):
        trainer.train_step()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for _ in range(3):
        trainer.train_step()
    after = trainer.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("text_") for name in moved)
    assert {"visual_projection.weight", "logit_scale"} <= moved


def test_a_warm_start_takes_the_text_tower_only_with_its_vocabulary(
    tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(tokenizer, Budget(steps=8))
    trainer.train_step()
    export(trainer.model, tokenizer, tmp_path)
    other = train_tokenizer([*NOUNS.texts, "church organ"], RECIPE.vocabulary, RECIPE.context)
    for words, same in ((tokenizer, True), (other, False)):
        model = build_model(RECIPE, words)
        warm_start(model, words, tmp_path)
        theirs = trainer.model.half().float().state_dict()
        for name, value in model.state_dict().items():
            if name == "text_projection.weight":
                assert torch.equal(value, theirs[name]) == same
            elif not name.startswith("text_"):
                assert torch.equal(value, theirs[name])


def test_a_skipped_block_leaves_its_sample_and_the_mean_stays(tokenizer: Any) -> None:
    tower = build_model(RECIPE, tokenizer).vision_model.eval()
    block, tokens = tower.encoder.layers[-1], torch.randn(4000, 2, RECIPE.width)
    with torch.no_grad():
        whole = block(tokens, attention_mask=None)
        hooks = skip_blocks(tower, 0.5, torch.Generator().manual_seed(0))
        dropped = block(tokens, attention_mask=None)
        for hook in hooks:
            hook.remove()
        assert torch.equal(block(tokens, attention_mask=None), whole)
    skipped = (dropped == tokens).all(-1).all(-1)
    assert 0.45 < skipped.float().mean() < 0.55
    assert torch.allclose(dropped[~skipped], (2 * whole - tokens)[~skipped], atol=1e-5)


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
