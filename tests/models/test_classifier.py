"""Preparing a request once, and what a prediction reports."""

from dataclasses import replace

import pytest
import torch

from models.checkpoint import Checkpoint
from models.classifier import DefendedClassifier, ImageQuery
from models.defenses.catalog import DEFENSES
from models.labels import tokenize
from models.readout import suspicion
from models.tapt import Adapts, Objective
from models.views import make_views
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny.load(tiny.save_checkpoint(tmp_path_factory.mktemp("clip")))


def ask(number: int, **changes: object) -> ImageQuery:
    query = ImageQuery(tiny.draw_image(number), tiny.LABELS[:4], seed=number)
    return replace(query, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "bundle", "lookups"),
    [
        ("plain", True, 1),
        ("ensemble", True, 1),
        ("ttc", True, 1),
        ("rtpt", True, 1),
        ("tapt", True, 2),  # with learned prompts, and without for the undefended answer
        ("tapt", False, 1),
    ],
)
def test_labels_are_looked_up_once_per_prompting(
    checkpoint: Checkpoint, method: str, bundle: bool, lookups: int
) -> None:
    classifier = DefendedClassifier(checkpoint, tiny.make_bundle(checkpoint) if bundle else None)
    encoder = classifier.encoder
    (batch,) = classifier.prepare([ask(0), ask(1)], method)
    assert (encoder.misses, encoder.hits) == (lookups, lookups)
    list(classifier.classify(batch, 4))
    assert (encoder.misses, encoder.hits) == (lookups, lookups)


def test_queries_of_other_prompt_shapes_run_apart(checkpoint: Checkpoint) -> None:
    classifier = DefendedClassifier(checkpoint, None)
    templates = ["{}", "a photo of a {}.", "{} there", "a {}"]
    queries = [ask(i, template=template, steps=2) for i, template in enumerate(templates)]
    batches = classifier.prepare(queries, "tpt")
    assert [batch.indices for batch in batches] == [[0, 2], [1], [3]]
    # A template that begins with its label has no words to adapt.
    assert [batch.steps for batch in batches] == [[0, 0], [2], [2]]
    (batch,) = classifier.prepare(queries, "plain")
    assert batch.steps == [0] * 4
    (batch,) = classifier.prepare(queries, "ttc")
    assert batch.steps == [2] * 4


def test_an_image_alone_is_looked_at_once(checkpoint: Checkpoint) -> None:
    classifier = DefendedClassifier(checkpoint, tiny.make_bundle(checkpoint))
    for method, views in (("apt", 1), ("apt-ensemble", 6)):
        (batch,) = classifier.prepare([ask(0)], method)
        (prediction,) = classifier.classify(batch, 6)
        assert len(prediction.views) == prediction.kept == views


def test_an_answer_is_suspected_above_the_bundles_threshold(checkpoint: Checkpoint) -> None:
    bundle = tiny.make_bundle(checkpoint)

    def suspected(score: float | None, method: str = "ensemble", views: int = 6) -> bool | None:
        known = {} if score is None else {"none": score, "learned": score}
        classifier = DefendedClassifier(checkpoint, replace(bundle, suspicion=known))
        (batch,) = classifier.prepare([ask(3)], method)
        (prediction,) = classifier.classify(batch, views)
        expected = suspicion(prediction.undefended, prediction.views)
        assert prediction.suspicion == pytest.approx(float(expected))
        assert 0 < prediction.suspicion < 1 or len(prediction.views) == 1
        return prediction.suspected

    assert suspected(0.0) is True
    assert suspected(1.0) is False
    assert suspected(None) is None
    # A threshold was set on many views; a single one would be compared with itself.
    assert suspected(0.0, views=1) is None
    assert suspected(-1.0, "plain") is None
    assert suspected(-1.0, "apt") is None
    without = DefendedClassifier(checkpoint, None)
    (batch,) = without.prepare([ask(3)], "ensemble")
    (prediction,) = without.classify(batch, 6)
    assert prediction.suspected is None


def test_a_classifier_without_resize_takes_images_as_they_are(checkpoint: Checkpoint) -> None:
    whole = DefendedClassifier(checkpoint, None, selection_ratio=0.3, template="a {} of a")
    classifier = whole.without_resize()
    assert (classifier.selection_ratio, classifier.template) == (0.3, "a {} of a")
    preprocessing = classifier.checkpoint.preprocessing
    assert preprocessing.resized(32, 32) == (32, 32)
    assert classifier.template == "a {} of a"


def test_a_tensor_is_classified_as_the_image_it_holds(checkpoint: Checkpoint) -> None:
    classifier = DefendedClassifier(checkpoint, None)
    query = ask(2)
    pixels = torch.from_numpy(query.image).permute(2, 0, 1).float()
    answers = []
    for image in (query.image, pixels):
        (batch,) = classifier.prepare([replace(query, image=image)], "ensemble")
        answers += [prediction.probabilities for prediction in classifier.classify(batch, 5)]
    assert torch.equal(*answers)


TEMPLATES = ("a photo of a {}.", "{} seen from afar", "a drawing of the {}")


@pytest.mark.parametrize("design", ["v", "vli", "vlj"])
def test_several_templates_are_the_mean_of_the_normalized_features(
    checkpoint: Checkpoint, design: str
) -> None:
    bundle = tiny.make_bundle(checkpoint, design)
    classifier = DefendedClassifier(checkpoint, bundle, Objective(adapts="vision"))
    text = {"v": None}.get(design, bundle.prompts.text)
    for method, steps in (("plain", 0), ("ensemble", 0), ("apt", 0), ("tapt", 2), ("ttc", 2)):
        query = ask(3, template=TEMPLATES, steps=steps)
        (batch,) = classifier.prepare([query], method)
        learned = text if DEFENSES[method].prompts == "learned" else None
        each = []
        for template in TEMPLATES:
            rows = tokenize(
                checkpoint.tokenizer,
                checkpoint.clip.model.config.text_config.eos_token_id,
                [template.replace("{}", label) for label in query.labels],
                checkpoint.clip.context_length,
                0 if learned is None else learned.shape[2],
            )
            each.append(checkpoint.clip.encode_labels(rows, learned))
        mean = torch.stack([one / one.norm(dim=-1, keepdim=True) for one in each]).mean(dim=0)
        mean = mean / mean.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(batch.prompted.features, mean)
        (prediction,) = classifier.classify(batch, 4)
        assert prediction.steps == steps
        if method == "plain":
            pixels = make_views(query.image, 1, 0, checkpoint.preprocessing, torch.device("cpu"))
            image = checkpoint.clip.encode_images(pixels[None]).features[0, 0]
            by_hand = (checkpoint.clip.logit_scale * mean @ image).softmax(dim=-1)
            torch.testing.assert_close(prediction.probabilities, by_hand)
            single = classifier.prepare([ask(3, template=TEMPLATES[0])], "plain")[0]
            (other,) = classifier.classify(single, 4)
            assert not torch.allclose(other.probabilities, by_hand, atol=1e-4)


def test_several_templates_are_cached(checkpoint: Checkpoint) -> None:
    classifier = DefendedClassifier(checkpoint, None)
    first = classifier.encode(ask(0, template=TEMPLATES), "plain")
    assert classifier.encode(ask(1, template=TEMPLATES), "plain").plain is first.plain
    other = classifier.encode(ask(1, template=TEMPLATES[::-1]), "plain")
    assert other.plain is not first.plain
    torch.testing.assert_close(other.plain.features, first.plain.features)
    assert (classifier.encoder.misses, classifier.encoder.hits) == (2, 1)


def test_a_label_that_any_template_cuts_counts_as_truncated(checkpoint: Checkpoint) -> None:
    classifier = DefendedClassifier(checkpoint, None)
    templates = ("a {}", "a {} " + "word " * 100)
    encoded = classifier.encode(ask(0, template=templates), "plain")
    assert encoded.plain.batch.truncated == (4,)


@pytest.mark.parametrize(
    ("method", "bundle", "adapts", "moves"),
    [
        ("tapt", "vli", "vision", False),
        ("thrift", "vli", "vision", False),
        ("tapt", "vli", "all", True),
        ("gate", "vli", "text", True),
        ("tapt", "v", "all", False),
        ("tapt", "vlj", "vision", False),
        ("tapt", None, "vision", True),  # the template's words are all there is
        ("rtpt", "vli", "vision", True),
        ("ttc", None, "all", False),
        ("apt", "vli", "all", False),
    ],
)
def test_a_defense_that_moves_the_text_takes_one_template(
    checkpoint: Checkpoint, method: str, bundle: str | None, adapts: Adapts, moves: bool
) -> None:
    made = tiny.make_bundle(checkpoint, bundle) if bundle else None
    classifier = DefendedClassifier(checkpoint, made, Objective(adapts=adapts))
    assert classifier.moves_text(method) == moves
    query = ask(0, template=TEMPLATES)
    if moves:
        with pytest.raises(ValueError, match="one template"):
            classifier.encode(query, method)
    else:
        classifier.encode(query, method)
    classifier.encode(replace(query, steps=0), method)  # without a step nothing moves
