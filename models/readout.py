"""Reading a prediction from the views: which of them count, and how much."""

from typing import Literal, get_args

import torch
from torch import Tensor

Readout = Literal["single", "kept", "all", "weighted"]
READOUTS: tuple[Readout, ...] = get_args(Readout)
NEIGHBORS, TEMPERATURE = 20, 0.01  # of the reliability, as published with R-TPT


def reliability(features: Tensor, strangers: Tensor | None = None) -> Tensor:
    """Weights [B, V] that sum to 1, larger for views with close neighbors (R-TPT, CVPR 2025).

    The softmax of each view's mean cosine to its 20 nearest other views, over 0.01. The published
    code means to leave a view itself out by leaving out every cosine of 1 or more; in fp32 that
    spares some views and not others, as their own cosine rounds, with weights a few percent apart.

    Args:
        features: unit length [B, V, D], before any adaptation.
        strangers: pairs [V, V] of views that are no neighbors; by default a view and itself.
    """
    views = features.shape[1]
    if views == 1:
        return torch.ones(features.shape[:2], device=features.device)
    if strangers is None:
        strangers = torch.eye(views, dtype=torch.bool, device=features.device)
    cosines = (features @ features.transpose(1, 2)).masked_fill(strangers, -2)
    nearest = cosines.topk(min(NEIGHBORS, views - 1), dim=-1).values
    return (nearest.mean(dim=-1) / TEMPERATURE).softmax(dim=-1)


def view_weights(readout: str, kept: Tensor, features: Tensor) -> Tensor:
    """The weight [B, V] of each view in the prediction; rows sum to 1.

    Args:
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
        raise ValueError(f"unknown readout {readout!r}; known: {', '.join(READOUTS)}")
    return weights
