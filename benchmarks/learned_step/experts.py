"""Prompt experts, mixed by a gate on the first views' predictions; no gradient at test time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.learned_step.frozen import Frozen
from benchmarks.learned_step.learning import Answer, Values
from models.calibration.prompt_tuning import SPREAD
from models.readout import suspicion
from models.tapt import entropies, view_entropy

EXPERTS = 4
LEARNING_RATES = {"vision": 1e-3, "gate": 3e-2}


def begin(vision: Tensor, seed: int) -> Values:
    """Experts `vision` [EXPERTS, depth, tokens, width] close to prompts [1, ...], and a `gate`
    [EXPERTS, statistics] that weighs them alike."""
    shape, source = (EXPERTS, *vision.shape[1:]), torch.Generator().manual_seed(seed)
    apart = SPREAD * torch.randn(shape, generator=source)
    return {"vision": vision + apart, "gate": torch.zeros(EXPERTS, 5)}


def answer_by_experts(frozen: Frozen, values: Values, first: int, views: int) -> Answer:
    """The first views with the experts' mean, the rest with their mixture."""
    experts = values["vision"]

    def answer(pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        cut = frozen.cut(pixels, views, seeds)
        mean = experts.mean(dim=0, keepdim=True).expand(len(cut), *experts.shape[1:])
        seen = frozen.logits(cut[:, :first], mean)
        shares = (describe_views(seen) @ values["gate"].T).softmax(dim=1)
        mixed = torch.einsum("ne,edtw->ndtw", shares, experts)
        return torch.cat([seen, frozen.logits(cut[:, first:], mixed)], dim=1)

    return answer


def describe_views(logits: Tensor) -> Tensor:
    """What the gate sees of views with logits [N, V, C]: [N, 5]. Entropy of the mean prediction
    and mean of the entropies in nats, the mean prediction's highest probability, how far view 0 is
    from the mean, and 1."""
    predictions = logits.softmax(dim=-1)
    mean = predictions.mean(dim=1)
    return torch.stack(
        [
            view_entropy(logits),
            entropies(logits).mean(dim=1),
            mean.amax(dim=1),
            suspicion(predictions[:, 0], predictions),
            torch.ones(len(logits), device=logits.device),
        ],
        dim=1,
    )
