"""Test-time counterattack (CVPR 2025): pictures and their first noise to moved features."""

from collections.abc import Iterator

import torch

from benchmarks.parity.figures import VALUE_TOLERANCE, Difference, Figures
from models.clip import PromptedCLIP
from models.defenses.counterattack import drift_ratio
from models.defenses.ttc import Counterattack, counterattack, step_weights
from models.tapt import leaves_after


def compare(figures: Figures, clip: PromptedCLIP) -> Iterator[Difference]:
    pixels, noise, metadata = figures.given["pixels"], figures.given["noise"], figures.metadata
    steps = int(metadata["steps"])
    recipe = Counterattack(
        eps=float(metadata["eps"]),
        stride=float(metadata["alpha"]),
        tau=float(metadata["tau"]),
        beta=float(metadata["beta"]),
    )
    with torch.no_grad():
        seen = clip.encode_images(torch.stack([pixels, pixels + noise], dim=1)).projected
    yield figures.difference(drift_ratio(seen), "drift_ratio")
    deltas, weights = torch.zeros_like(pixels), torch.zeros(len(pixels), steps + 1)
    for moved in counterattack(
        clip,
        pixels,
        noise,
        seen,
        recipe,
        leaves_after(steps),
    ):
        deltas[moved.rows] = moved.deltas
        weights[moved.rows, : moved.steps + 1] = step_weights(moved.steps, recipe.beta)
    yield figures.difference(weights, "step_weights")
    yield figures.difference(deltas, "delta", VALUE_TOLERANCE)
    with torch.no_grad():
        features = clip.encode_images((pixels + deltas).unsqueeze(1)).projected
    yield figures.difference(features[:, 0], "features")
