"""Reading an answer from the views: which of them count, their average, and its attack score."""

import torch
from torch import Tensor

NEIGHBORS, TEMPERATURE = 20, 0.01  # of the reliability, as published with R-TPT


def reliability(features: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Weights [B, V] that sum to 1, larger for views with close neighbors (R-TPT, CVPR 2025).

    The softmax of each view's mean cosine similarity to its 20 nearest other views, divided by
    0.01. The published code means to exclude a view from its own neighbors by excluding every
    cosine of 1 or more; in fp32 this excludes some views and not others, depending on how their
    own cosine rounds, and changes weights by a few percent.

    Args:
        features: unit length [B, V, D], before any adaptation.
        excluded: pairs [V, V] of views that do not count as neighbors; by default a view and
            itself.
    """
    views = features.shape[1]
    if views == 1:
        return torch.ones(features.shape[:2], device=features.device)
    if excluded is None:
        excluded = torch.eye(views, dtype=torch.bool, device=features.device)
    cosines = (features @ features.transpose(1, 2)).masked_fill(excluded, -2)
    nearest = cosines.topk(min(NEIGHBORS, views - 1), dim=-1).values
    return (nearest.mean(dim=-1) / TEMPERATURE).softmax(dim=-1)


def view_weights(readout: str, kept: Tensor, features: Tensor) -> Tensor:
    """The weight [B, V] of each view in the prediction; rows sum to 1.

    Args:
        readout: `single` (view 0), `kept`, `all`, or `weighted` (by `reliability`).
        kept: indices [B, k] of the confident views.
        features: the views' features [B, V, D] before any adaptation.

    Raises:
        ValueError: unknown readout.
    """
    if readout == "weighted":
        return reliability(features)
    weights = torch.zeros(features.shape[:2], device=features.device)
    if readout == "single":
        weights[:, 0] = 1
    elif readout == "kept":
        weights.scatter_(1, kept, 1 / kept.shape[1])
    elif readout == "all":
        weights += 1 / features.shape[1]
    else:
        raise ValueError(f"unknown readout {readout!r}")
    return weights


def mean_prediction(
    logits: Tensor, weights: Tensor | None = None, averages_logits: bool = False
) -> Tensor:
    """Probabilities [n, C] from the logits [n, V, C] of views and their weights [n, V].

    Args:
        weights: rows sum to 1; None weighs all views alike.
        averages_logits: average the logits, as R-TPT does, and not the predictions.
    """
    if averages_logits:
        return mean_logits(logits, weights).softmax(dim=-1)
    if weights is None:
        return logits.softmax(dim=-1).mean(dim=1)
    return (weights.unsqueeze(-1) * logits.softmax(dim=-1)).sum(dim=1)


def mean_log_prediction(
    logits: Tensor, weights: Tensor | None = None, averages_logits: bool = False
) -> Tensor:
    """The logarithm of `mean_prediction`, which keeps a gradient where softmax rounds to 0 or 1."""
    if averages_logits:
        return mean_logits(logits, weights).log_softmax(dim=-1)
    if weights is None:
        weights = torch.full(logits.shape[:2], 1 / logits.shape[1], device=logits.device)
    log_p: Tensor = logits.log_softmax(dim=-1) + weights.clamp(min=1e-30).log().unsqueeze(-1)
    return log_p.logsumexp(dim=1)


def mean_logits(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Logits [n, C] averaged over views; arguments as in `mean_prediction`."""
    if weights is None:
        return logits.mean(dim=1)
    return (weights.unsqueeze(-1) * logits).sum(dim=1)


def suspicion(undefended: Tensor, views: Tensor) -> Tensor:
    """Attack score in [0, 1] from quantities that are already computed: the total variation
    distance [...] between the undefended prediction and the mean over views.

    An attack is fitted to the image as it is. Crops and flips mostly undo it, so that the image
    and its views disagree. This is a hint and no guarantee: an attacker who anticipates the views
    can make both agree.

    Args:
        undefended: probabilities [..., C] of the image itself without any defense.
        views: probabilities [..., V, C] of its views.
    """
    return 0.5 * (undefended - views.mean(dim=-2)).abs().sum(dim=-1)


def gather_views(values: Tensor, index: Tensor) -> Tensor:
    """The values [B, k, ...] of some views, from values [B, V, ...] and indices [B, k]."""
    return values[torch.arange(len(values), device=values.device).unsqueeze(1), index]
