"""What must stay true of the method in a batch: isolation, exactness, the learned prompts."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import tapt
from models.bundle import load_bundle
from models.checkpoint import Checkpoint
from models.classifier import DefendedClassifier, ImageQuery, Prediction
from models.label_encoder import LabelEncoder, join_encoded
from models.labels import LabelBatch
from models.prompts import DefensePrompts
from models.tapt import Adapts, Objective, leaves_after
from models.views import make_views
from tests import tiny
from tests.tiny import make_queries

VIEWS = 12
OBJECTIVE = Objective(learning_rate=5e-3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny.load(tiny.save_checkpoint(tmp_path_factory.mktemp("clip")))


def make_classifier(
    checkpoint: Checkpoint, design: str | None = "vli", adapts: Adapts = "all"
) -> DefendedClassifier:
    bundle = None if design is None else tiny.make_bundle(checkpoint, design)
    reference = None if bundle is None else bundle.statistics
    objective = replace(OBJECTIVE, reference=reference, layers=2 if bundle else 0, adapts=adapts)
    return DefendedClassifier(checkpoint, bundle, objective, selection_ratio=0.3)


def classify(
    classifier: DefendedClassifier,
    queries: list[ImageQuery],
    steps: Sequence[int],
    method: str = "tapt",
) -> list[Prediction]:
    queries = [replace(query, steps=n) for query, n in zip(queries, steps, strict=True)]
    (batch,) = classifier.prepare(queries, method)
    found = classifier.classify(batch, VIEWS)
    return sorted(found, key=lambda prediction: prediction.row)


def probabilities(predictions: list[Prediction]) -> list[Tensor]:
    return [prediction.probabilities for prediction in predictions]


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
    classifier, queries = make_classifier(checkpoint, design, adapts), make_queries(8)
    steps = [1, 3, 0, 2, 1, 2, 3, 1]
    together = classify(classifier, queries, steps)
    alone = [classify(classifier, [p], [s])[0] for p, s in zip(queries, steps, strict=True)]
    assert [p.steps for p in together] == steps
    for one, other in zip(probabilities(together), probabilities(alone), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    before = probabilities(classify(classifier, queries, [0] * 8))
    moved = [(a - b).abs().max() for a, b in zip(probabilities(together), before, strict=True)]
    assert max(moved) > 1e-3  # the steps did something that company could have disturbed


def test_one_leaving_early_changes_nothing_for_the_others(checkpoint: Checkpoint) -> None:
    classifier, queries = make_classifier(checkpoint), make_queries(4)
    full = classify(classifier, queries, [3, 3, 3, 3])
    cut = classify(classifier, queries, [3, 1, 3, 3])
    assert cut[1].steps == 1
    for row in (0, 2, 3):
        torch.testing.assert_close(
            cut[row].probabilities, full[row].probabilities, atol=1e-5, rtol=0
        )


def test_zero_steps_without_a_bundle_are_plain_multi_view_clip(checkpoint: Checkpoint) -> None:
    classifier = make_classifier(checkpoint, None)
    queries = [replace(query, readout="all") for query in make_queries(4)]
    loop = probabilities(classify(classifier, queries, [0] * 4))
    ensemble = probabilities(classify(classifier, queries, [0] * 4, "ensemble"))
    for one, other in zip(loop, ensemble, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_the_same_seed_gives_the_same_answer_and_another_another(checkpoint: Checkpoint) -> None:
    classifier, query = make_classifier(checkpoint), make_queries(3)[2]
    first, again = classify(classifier, [query], [1])[0], classify(classifier, [query], [1])[0]
    other = classify(classifier, [replace(query, seed=7)], [1])[0]
    assert torch.equal(first.probabilities, again.probabilities)
    assert not torch.equal(first.probabilities, other.probabilities)


def test_learned_prompts_survive_a_thousand_requests(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tiny.make_bundle(checkpoint).save(tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle", checkpoint.clip, checkpoint.sha256)
    classifier = DefendedClassifier(
        checkpoint, bundle, replace(OBJECTIVE, reference=bundle.statistics, layers=2)
    )
    queries = [replace(query, image=query.image[:24, :24]) for query in make_queries(20)]
    for _ in range(50):
        (batch,) = classifier.prepare(queries, "tapt")
        list(classifier.classify(batch, 2))
    file = load_bundle(tmp_path / "bundle", checkpoint.clip, checkpoint.sha256)
    for name, value in file.prompts.tensors.items():
        assert torch.equal(bundle.prompts.tensors[name], value)


def test_learned_and_random_prompts_answer_differently(checkpoint: Checkpoint) -> None:
    """The published V and VLI code silently starts each image from random deep prompts."""
    queries = make_queries(4)
    classifiers = [
        DefendedClassifier(checkpoint, tiny.make_bundle(checkpoint, seed=seed)) for seed in (1, 2)
    ]
    learned, random = (
        probabilities(classify(classifier, queries, [1] * 4)) for classifier in classifiers
    )
    assert max((a - b).abs().max() for a, b in zip(learned, random, strict=True)) > 0.05


def test_the_starting_point_is_the_learned_prompts(checkpoint: Checkpoint) -> None:
    """Zero steps read the queries at exactly the bundle's prompts."""
    classifier, query = make_classifier(checkpoint), replace(make_queries(3)[2], readout="single")
    assert classifier.bundle is not None
    clip, prompts = checkpoint.clip, classifier.bundle.prompts
    view = make_views(query.image, 1, query.seed, checkpoint.preprocessing, tiny.CPU)
    labels = LabelEncoder(checkpoint, classifier.bundle, "{}").encode(query.labels, None, "learned")
    text = clip.encode_labels(labels.batch, prompts.text)
    image = clip.encode_images(view.unsqueeze(0), prompts.vision).features
    expected = clip.class_logits(image, text, labels.batch)[0, 0].softmax(dim=-1)
    (prediction,) = classify(classifier, [query], [0])
    torch.testing.assert_close(prediction.probabilities, expected, atol=1e-6, rtol=0)


def test_a_request_that_no_longer_moves_takes_no_further_step(checkpoint: Checkpoint) -> None:
    classifier, queries = make_classifier(checkpoint), make_queries(4)
    full = classify(classifier, queries, [4] * 4)
    stopping = replace(classifier.objective, early_stop=0.1)
    early = DefendedClassifier(checkpoint, classifier.bundle, stopping, selection_ratio=0.3)
    together = classify(early, queries, [4] * 4)
    taken = [prediction.steps for prediction in together]
    assert [p.steps for p in full] == [4] * 4
    assert taken == [classify(early, [p], [4])[0].steps for p in queries]
    assert len(set(taken)) > 1, taken
    exact = probabilities(classify(classifier, queries, taken))
    for one, other in zip(probabilities(together), exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["tapt", "tpt", "rtpt"])
def test_a_request_stops_before_the_step_that_follows_a_small_change(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    classifier, queries = make_classifier(checkpoint), make_queries(4)
    stopping = replace(classifier.objective, early_stop=math.inf)  # any change is small
    early = DefendedClassifier(checkpoint, classifier.bundle, stopping, selection_ratio=0.3)
    one_step = probabilities(classify(classifier, queries, [1] * 4, method))
    passes, differentiate = [], tapt.differentiate
    monkeypatch.setattr(
        tapt, "differentiate", lambda *given: passes.append(given) or differentiate(*given)
    )
    found = classify(early, queries, [2] * 4, method)
    assert [prediction.steps for prediction in found] == [1] * 4
    assert len(passes) == 1  # none for the step that nobody takes
    for one, other in zip(probabilities(found), one_step, strict=True):
        assert torch.equal(one, other)


def test_chunks_are_exact(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, queries = make_classifier(checkpoint), make_queries(6)
    whole = probabilities(classify(classifier, queries, [2] * 6))
    monkeypatch.setattr(checkpoint.clip, "chunk_tokens", 12)  # a few labels, a view a chunk
    chunked = probabilities(classify(classifier, queries, [2] * 6))
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("template", ["a photo of a {}.", "{}", "a {} of a"])
def test_passing_the_shared_words_once_changes_no_label(
    checkpoint: Checkpoint, template: str
) -> None:
    """Label rows beside others, of which all but the start may differ, equal the rows alone."""
    classifier = make_classifier(checkpoint)
    assert classifier.bundle is not None
    clip, prompts = checkpoint.clip, classifier.bundle.prompts
    sets = [classifier.encoder.encode(tiny.LABELS[:n], template, "learned") for n in (8, 2, 5)]
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
    labels = make_classifier(checkpoint).encoder.encode(tiny.LABELS, "{}", "none").batch
    with pytest.raises(ValueError, match="prompts do not fit where"):
        checkpoint.clip.encode_labels(labels, torch.zeros(1, 1, 2, checkpoint.clip.text_width))


def test_selecting_first_gives_the_gradient_of_differentiating_all(checkpoint: Checkpoint) -> None:
    """The published code differentiates all views and then keeps some; so does this test."""
    classifier, query = make_classifier(checkpoint), make_queries(7)[6]
    assert classifier.bundle is not None
    clip, prompts = checkpoint.clip, classifier.bundle.prompts
    labels = classifier.encoder.encode(query.labels, classifier.bundle.template, "learned")
    views = make_views(query.image, VIEWS, 0, checkpoint.preprocessing, tiny.CPU).unsqueeze(0)

    leaves = prompts.map({k: v.clone().requires_grad_() for k, v in prompts.tensors.items()})
    everything = clip.encode_images(views, leaves.vision, collect=1)
    text = clip.encode_labels(labels.batch, prompts.text)
    logits = clip.class_logits(everything.features, text, labels.batch)
    kept = tapt.select_confident(logits, 0.3)[0]
    reference, inputs = classifier.objective.reference, [everything.inputs[0][:, kept]]
    assert reference is not None
    moments = tapt.token_moments(inputs)
    align = 0.5 * tapt.alignment_loss(moments, reference.adv_mean, reference.adv_var)
    align = align + 0.5 * tapt.alignment_loss(moments, reference.clean_mean, reference.clean_var)
    loss = tapt.view_entropy(logits[:, kept]) + 100 / 2 * align
    (expected,) = torch.autograd.grad(loss.sum(), [leaves.tensors["vision"]])

    _, found = tapt.gradients(
        clip, views[:, kept], labels.batch, labels.features, prompts, classifier.objective
    )
    torch.testing.assert_close(found["vision"], expected, atol=1e-5, rtol=1e-4)


def test_where_there_are_no_prompts_of_the_kind_that_adapts_all_do(checkpoint: Checkpoint) -> None:
    """A model without a bundle has the template's words alone, and a step must not do nothing."""
    query = make_queries(1)[0]
    words = make_classifier(checkpoint, None).encoder.encode(query.labels, "a photo of {}", "words")
    assert Objective(adapts="vision").moving(words.prompts) == {"text"}
    assert Objective(adapts="text").moving(tiny.make_bundle(checkpoint, "v").prompts) == {"vision"}


@pytest.mark.parametrize(("adapts", "moving"), [("vision", "vision"), ("text", "text")])
def test_prompts_that_are_held_stay_and_the_others_move_as_before(
    checkpoint: Checkpoint, adapts: Adapts, moving: str
) -> None:
    query = make_queries(1)[0]

    def step(adapts: Adapts) -> DefensePrompts:
        classifier = make_classifier(checkpoint, adapts=adapts)
        labels = classifier.encoder.encode(query.labels, classifier.template, "learned")
        views = make_views(query.image, 4, 0, checkpoint.preprocessing, tiny.CPU).unsqueeze(0)
        at = views, labels.batch, labels.features, labels.prompts, classifier.objective
        return next(tapt.adapt(checkpoint.clip, *at, leaves_after(1))).prompts

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
