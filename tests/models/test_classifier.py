"""Preparing a request once, and what a prediction reports."""

from dataclasses import replace

import pytest
import torch

from models.checkpoint import Checkpoint
from models.classifier import DefendedClassifier, ImageQuery
from models.readout import suspicion
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
    classifier = DefendedClassifier(checkpoint, None, template="a {} of a").without_resize()
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
