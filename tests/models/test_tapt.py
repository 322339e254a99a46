"""What must stay true of the method in a batch: isolation, exactness, the learned prompts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import tapt
from models.bundle import load_bundle
from models.checkpoint import Checkpoint
from models.classifier import DefendedClassifier, Finding, Picture
from models.label_encoder import LabelEncoder, join_encoded
from models.labels import LabelBatch
from models.objective import Adapts, Objective
from models.prompts import DefensePrompts
from models.views import make_views
from tests import tiny
from tests.tiny import make_pictures

VIEWS = 12
OBJECTIVE = Objective(learning_rate=5e-3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny.load(tiny.save_checkpoint(tmp_path_factory.mktemp("clip")))


def make_guard(
    checkpoint: Checkpoint, design: str | None = "vli", adapts: Adapts = "all"
) -> DefendedClassifier:
    bundle = None if design is None else tiny.make_bundle(checkpoint, design)
    reference = None if bundle is None else bundle.statistics
    objective = replace(OBJECTIVE, reference=reference, layers=2 if bundle else 0, adapts=adapts)
    return DefendedClassifier(checkpoint, bundle, objective, selection_ratio=0.3)


def after(steps: Sequence[int]) -> Callable[[int, list[int]], set[int]]:
    """Everyone leaves after its own number of steps."""
    return lambda taken, rows: {row for row in rows if taken >= steps[row]}


def classify(
    guard: DefendedClassifier, pictures: list[Picture], steps: Sequence[int], method: str = "tapt"
) -> list[Finding]:
    findings = guard.classify(pictures, method, VIEWS, after(steps))
    return sorted(findings, key=lambda finding: finding.verdict.row)


def probabilities(findings: list[Finding]) -> list[Tensor]:
    return [finding.verdict.probabilities for finding in findings]


@pytest.mark.parametrize(
    ("design", "adapts"),
    [
        ("v", "all"),
        ("vli", "all"),
        ("vlj", "all"),
        (None, "all"),
        ("vli", "vision"),
        ("vli", "text"),
        ("vlj", "vision"),
        (None, "vision"),
        ("v", "text"),
    ],
)
def test_eight_together_equal_the_eight_alone(
    checkpoint: Checkpoint, design: str | None, adapts: Adapts
) -> None:
    guard, pictures = make_guard(checkpoint, design, adapts), make_pictures(8)
    steps = [1, 3, 0, 2, 1, 2, 3, 1]
    together = classify(guard, pictures, steps)
    alone = [classify(guard, [p], [s])[0] for p, s in zip(pictures, steps, strict=True)]
    assert [f.verdict.steps for f in together] == steps
    for one, other in zip(probabilities(together), probabilities(alone), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    before = probabilities(classify(guard, pictures, [0] * 8))
    moved = [(a - b).abs().max() for a, b in zip(probabilities(together), before, strict=True)]
    assert max(moved) > 1e-3  # the steps did something that company could have disturbed


def test_one_leaving_early_changes_nothing_for_the_others(checkpoint: Checkpoint) -> None:
    guard, pictures = make_guard(checkpoint), make_pictures(4)
    full = classify(guard, pictures, [3, 3, 3, 3])
    cut = classify(guard, pictures, [3, 1, 3, 3])
    assert cut[1].verdict.steps == 1
    for row in (0, 2, 3):
        torch.testing.assert_close(
            cut[row].verdict.probabilities, full[row].verdict.probabilities, atol=1e-5, rtol=0
        )


def test_zero_steps_without_a_bundle_are_plain_multi_view_clip(checkpoint: Checkpoint) -> None:
    guard = make_guard(checkpoint, None)
    pictures = [replace(picture, readout="all") for picture in make_pictures(4)]
    loop = probabilities(classify(guard, pictures, [0] * 4))
    ensemble = probabilities(classify(guard, pictures, [0] * 4, "ensemble"))
    for one, other in zip(loop, ensemble, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_the_same_seed_gives_the_same_answer_and_another_another(checkpoint: Checkpoint) -> None:
    guard, picture = make_guard(checkpoint), make_pictures(3)[2]
    first, again = classify(guard, [picture], [1])[0], classify(guard, [picture], [1])[0]
    other = classify(guard, [replace(picture, seed=7)], [1])[0]
    assert torch.equal(first.verdict.probabilities, again.verdict.probabilities)
    assert not torch.equal(first.verdict.probabilities, other.verdict.probabilities)


def test_learned_prompts_survive_a_thousand_requests(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tiny.make_bundle(checkpoint).save(tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle", checkpoint.clip, checkpoint.sha256)
    guard = DefendedClassifier(
        checkpoint, bundle, replace(OBJECTIVE, reference=bundle.statistics, layers=2)
    )
    pictures = [replace(picture, image=picture.image[:24, :24]) for picture in make_pictures(20)]
    for _ in range(50):
        list(guard.classify(pictures, "tapt", 2, after([1] * len(pictures))))
    file = load_bundle(tmp_path / "bundle", checkpoint.clip, checkpoint.sha256)
    for name, value in file.prompts.tensors.items():
        assert torch.equal(bundle.prompts.tensors[name], value)


def test_learned_and_random_prompts_answer_differently(checkpoint: Checkpoint) -> None:
    """The published V and VLI code silently starts each image from random deep prompts."""
    pictures = make_pictures(4)
    guards = [
        DefendedClassifier(checkpoint, tiny.make_bundle(checkpoint, seed=seed)) for seed in (1, 2)
    ]
    learned, random = (probabilities(classify(guard, pictures, [1] * 4)) for guard in guards)
    assert max((a - b).abs().max() for a, b in zip(learned, random, strict=True)) > 0.05


def test_the_starting_point_is_the_learned_prompts(checkpoint: Checkpoint) -> None:
    """Zero steps read the pictures at exactly the bundle's prompts."""
    guard, picture = make_guard(checkpoint), replace(make_pictures(3)[2], readout="single")
    assert guard.bundle is not None
    clip, prompts = checkpoint.clip, guard.bundle.prompts
    view = make_views(picture.image, 1, picture.seed, checkpoint.preprocessing, tiny.CPU)
    labels = LabelEncoder(checkpoint, guard.bundle).encode(
        picture.labels, guard.bundle.template, "learned"
    )
    text = clip.encode_labels(labels.batch, prompts.text)
    image = clip.encode_images(view.unsqueeze(0), prompts.vision).features
    expected = clip.class_logits(image, text, labels.batch)[0, 0].softmax(dim=-1)
    (finding,) = classify(guard, [picture], [0])
    torch.testing.assert_close(finding.verdict.probabilities, expected, atol=1e-6, rtol=0)


def test_a_request_that_no_longer_moves_takes_no_further_step(checkpoint: Checkpoint) -> None:
    guard, pictures = make_guard(checkpoint), make_pictures(4)
    full = classify(guard, pictures, [4] * 4)
    settled = replace(guard.objective, settled=0.1)
    early = DefendedClassifier(checkpoint, guard.bundle, settled, selection_ratio=0.3)
    together = classify(early, pictures, [4] * 4)
    taken = [finding.verdict.steps for finding in together]
    assert min(taken) >= 2  # a change needs two losses
    assert [f.verdict.steps for f in full] == [4] * 4
    assert taken == [classify(early, [p], [4])[0].verdict.steps for p in pictures]
    assert len(set(taken)) > 1, taken
    exact = probabilities(classify(guard, pictures, taken))
    for one, other in zip(probabilities(together), exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_chunks_are_exact(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    guard, pictures = make_guard(checkpoint), make_pictures(6)
    whole = probabilities(classify(guard, pictures, [2] * 6))
    monkeypatch.setattr(checkpoint.clip, "chunk_tokens", 12)  # a few labels, a view a chunk
    chunked = probabilities(classify(guard, pictures, [2] * 6))
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("template", ["a photo of a {}.", "{}", "a {} of a"])
def test_passing_the_shared_words_once_changes_no_label(
    checkpoint: Checkpoint, template: str
) -> None:
    """Label rows beside others, of which all but the start may differ, equal the rows alone."""
    guard = make_guard(checkpoint)
    assert guard.bundle is not None
    clip, prompts = checkpoint.clip, guard.bundle.prompts
    sets = [guard.encoder.encode(tiny.LABELS[:n], template, "learned") for n in (8, 2, 5)]
    batch, together = join_encoded(sets)
    assert min(batch.leads) > prompts.tensors["text"].shape[2]
    read = clip.encode_labels(batch, prompts.expand(3).text)
    torch.testing.assert_close(read, together, atol=1e-5, rtol=0)
    for labels, found in zip(sets, read.split(batch.counts), strict=True):
        for row in range(len(found)):
            ids, ends = labels.batch.ids[row : row + 1], labels.batch.ends[row : row + 1]
            alone = LabelBatch(ids, ends, (1,), (0,), (1 + prompts.tensors["text"].shape[2],))
            torch.testing.assert_close(
                clip.encode_labels(alone, prompts.text)[0], found[row], atol=1e-5, rtol=0
            )


def test_prompts_longer_than_what_rows_share_are_refused(checkpoint: Checkpoint) -> None:
    labels = make_guard(checkpoint).encoder.encode(tiny.LABELS, "{}", "none").batch
    with pytest.raises(ValueError, match="prompts stand where"):
        checkpoint.clip.encode_labels(labels, torch.zeros(1, 1, 2, checkpoint.clip.text_width))


def test_selecting_first_gives_the_gradient_of_differentiating_all(checkpoint: Checkpoint) -> None:
    """The published code differentiates all views and then keeps some; so does this test."""
    guard, picture = make_guard(checkpoint), make_pictures(7)[6]
    assert guard.bundle is not None
    clip, prompts = checkpoint.clip, guard.bundle.prompts
    labels = guard.encoder.encode(picture.labels, guard.bundle.template, "learned")
    views = make_views(picture.image, VIEWS, 0, checkpoint.preprocessing, tiny.CPU).unsqueeze(0)

    leaves = prompts.map({k: v.clone().requires_grad_() for k, v in prompts.tensors.items()})
    everything = clip.encode_images(views, leaves.vision, collect=1)
    text = clip.encode_labels(labels.batch, prompts.text)
    logits = clip.class_logits(everything.features, text, labels.batch)
    kept = tapt.select_confident(logits, 0.3)[0]
    reference, inputs = guard.objective.reference, [everything.inputs[0][:, kept]]
    assert reference is not None
    moments = tapt.token_moments(inputs)
    align = 0.5 * tapt.alignment_loss(moments, reference.adv_mean, reference.adv_var)
    align = align + 0.5 * tapt.alignment_loss(moments, reference.clean_mean, reference.clean_var)
    loss = tapt.view_entropy(logits[:, kept]) + 100 / 2 * align
    (expected,) = torch.autograd.grad(loss.sum(), [leaves.tensors["vision"]])

    _, found = tapt.gradients(
        clip, views[:, kept], labels.batch, labels.features, prompts, guard.objective
    )
    torch.testing.assert_close(found["vision"], expected, atol=1e-5, rtol=1e-4)


def test_where_there_are_no_prompts_of_the_kind_that_adapts_all_do(checkpoint: Checkpoint) -> None:
    """A model without a bundle has the template's words alone, and a step must not do nothing."""
    picture = make_pictures(1)[0]
    words = make_guard(checkpoint, None).encoder.encode(picture.labels, "a photo of {}", "words")
    assert Objective(adapts="vision").moving(words.prompts) == {"text"}
    assert Objective(adapts="text").moving(tiny.make_bundle(checkpoint, "v").prompts) == {"vision"}


@pytest.mark.parametrize(("adapts", "moving"), [("vision", "vision"), ("text", "text")])
def test_prompts_that_are_held_stay_and_the_others_move_as_before(
    checkpoint: Checkpoint, adapts: Adapts, moving: str
) -> None:
    picture = make_pictures(1)[0]

    def step(adapts: Adapts) -> DefensePrompts:
        guard = make_guard(checkpoint, adapts=adapts)
        labels = guard.encoder.encode(picture.labels, guard.template, "learned")
        views = make_views(picture.image, 4, 0, checkpoint.preprocessing, tiny.CPU).unsqueeze(0)
        at = views, labels.batch, labels.features, labels.prompts, guard.objective
        return next(tapt.adapt(checkpoint.clip, *at, after([1]))).prompts

    held, free, learned = step(adapts), step("all"), tiny.make_bundle(checkpoint).prompts
    for name, value in held.tensors.items():
        expected = free if name == moving else learned
        assert torch.equal(value, expected.tensors[name]), name
    assert not torch.equal(held.tensors[moving], learned.tensors[moving])


def test_a_prompt_that_no_loss_reaches_is_left_as_it_is() -> None:
    values = {"text": torch.ones(1, 1, 2, 4)}
    moved, _ = tapt.adamw.advance(values, {}, tapt.adamw.begin(values), 1, 1e-2, 0.01)
    assert torch.equal(moved["text"], values["text"])


@pytest.mark.parametrize(("views", "ratio", "kept"), [(1, 0.1, 1), (9, 0.1, 1), (64, 0.1, 6)])
def test_at_least_one_view_is_kept(views: int, ratio: float, kept: int) -> None:
    assert tapt.select_confident(torch.randn(2, views, 3), ratio).shape == (2, kept)


def test_adamw_equals_torch() -> None:
    source = torch.Generator().manual_seed(0)
    start = torch.randn(3, 5, generator=source)
    parameter = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.01)
    values, moments = {"p": start}, tapt.adamw.begin({"p": start})
    for step in range(1, 6):
        gradient = torch.randn(3, 5, generator=source)
        parameter.grad = gradient
        optimizer.step()
        moved, moments = tapt.adamw.advance(values, {"p": gradient}, moments, step, 1e-2, 0.01)
        values = dict(moved)
    torch.testing.assert_close(values["p"], parameter.detach(), atol=1e-6, rtol=0)


def test_prompts_of_another_design_are_refused() -> None:
    with pytest.raises(ValueError, match="design vli takes"):
        DefensePrompts("vli", {"text": torch.zeros(1, 1, 1, 4)})
