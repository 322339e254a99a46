"""How an answer is read from views, against values worked out by hand."""

import math

import pytest
import torch

from models.readout import (
    gather_views,
    mean_log_prediction,
    mean_logits,
    mean_prediction,
    reliability,
    suspicion,
    view_weights,
)


def test_suspicion_is_the_total_variation_from_the_mean_over_views() -> None:
    undefended = torch.tensor([0.6, 0.3, 0.1])
    views = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.1, 0.5]])  # their mean is 0.3, 0.3, 0.4
    assert float(suspicion(undefended, views)) == pytest.approx(0.3)
    assert float(suspicion(undefended, undefended.expand(5, 3))) == pytest.approx(0, abs=1e-6)
    apart = suspicion(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0]] * 4))
    assert float(apart) == pytest.approx(1)
    batch = suspicion(undefended.expand(4, 3), views.expand(4, 2, 3))
    assert batch.tolist() == pytest.approx([0.3] * 4)


def test_views_are_weighed_by_the_readout() -> None:
    kept, features = torch.tensor([[2, 0]]), torch.eye(4)[None]
    assert view_weights("single", kept, features).tolist() == [[1, 0, 0, 0]]
    assert view_weights("kept", kept, features).tolist() == [[0.5, 0, 0.5, 0]]
    assert view_weights("all", kept, features).tolist() == [[0.25] * 4]
    close = torch.nn.functional.normalize(torch.tensor([[[1, 0], [1, 0.1], [0, 1.0]]]), dim=-1)
    weights = view_weights("weighted", kept, close)[0]
    assert float(weights.sum()) == pytest.approx(1)
    assert weights[2] < weights[0]
    with pytest.raises(ValueError, match="unknown readout 'best'"):
        view_weights("best", kept, features)


@pytest.mark.parametrize("averages_logits", [False, True])
def test_predictions_or_logits_are_averaged(averages_logits: bool) -> None:
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]])  # 3/4 and 1/2 for the first label
    weights = torch.tensor([[0.25, 0.75]])
    expected = 3**0.25 / (1 + 3**0.25) if averages_logits else 0.25 * 0.75 + 0.75 * 0.5
    found = mean_prediction(logits, weights, averages_logits)
    assert float(found[0, 0]) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(mean_log_prediction(logits, weights, averages_logits).exp(), found)
    uniform = mean_prediction(logits, torch.full((1, 2), 0.5), averages_logits)
    torch.testing.assert_close(mean_prediction(logits, None, averages_logits), uniform)
    alike = mean_log_prediction(logits, None, averages_logits)
    torch.testing.assert_close(alike.exp(), uniform)


def test_logits_are_averaged_over_views() -> None:
    logits = torch.tensor([[[1.0, 2.0, 3.0], [3.0, 6.0, 5.0]]])
    assert mean_logits(logits).tolist() == [[2, 4, 4]]


def test_of_two_views_each_has_the_other_as_its_neighbor() -> None:
    features = torch.nn.functional.normalize(torch.tensor([[[1, 0], [1, 0.5]]]), dim=-1)
    assert reliability(features)[0].tolist() == pytest.approx([0.5, 0.5])
    assert reliability(features[:, :1]).tolist() == [[1]]


def test_views_are_gathered_by_request() -> None:
    values = torch.arange(6).view(2, 3)
    assert gather_views(values, torch.tensor([[2, 0], [1, 1]])).tolist() == [[2, 0], [4, 4]]
