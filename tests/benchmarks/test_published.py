"""The method against TAPT written a second time, on a deep model that no figure speaks of."""

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from benchmarks import published
from benchmarks.parity import tapt as parity
from benchmarks.parity.figures import CLIP_MEAN, CLIP_STD, Figures
from models.clip import PromptedCLIP

DEPTH, WIDTH, TEXT_WIDTH, END = 9, 96, 64, 5


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    shape = {"num_hidden_layers": 12, "num_attention_heads": 2, "projection_dim": 48}
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "image_size": 32}
    text = {"hidden_size": TEXT_WIDTH, "intermediate_size": 2 * TEXT_WIDTH, "vocab_size": 200}
    config = CLIPConfig(
        projection_dim=48,
        vision_config={**shape, **vision, "patch_size": 16},
        text_config={**shape, **text, "max_position_embeddings": 20, "eos_token_id": END},
    )
    torch.manual_seed(3)
    model = CLIPModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(2)  # as initialized all pictures look alike
    return model


@pytest.mark.parametrize(("design", "steps"), [("v", 1), ("vli", 1), ("vli", 3), ("vlj", 1)])
def test_two_implementations_agree(model: CLIPModel, design: str, steps: int) -> None:
    source = torch.Generator().manual_seed(steps + len(design))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source) * 0.3

    ids = torch.full((6, 20), END)
    for row, words in enumerate((1, 3, 2, 5, 4, 1)):
        ids[row, :5] = torch.tensor([4, 10, 11, 12, 13])
        ids[row, 5 : 5 + words] = torch.randint(20, 200, (words,), generator=source)
    same, own = torch.rand(2, 3, 32, 32, generator=source).unbind()
    views = (255 * (0.7 * same + 0.3 * torch.rand(40, *own.shape, generator=source))).byte()
    shapes = {
        "vision": (2, WIDTH),
        "text": (2, TEXT_WIDTH),
        "projection.weight": (WIDTH, TEXT_WIDTH),
        "projection.bias": (WIDTH,),
    }
    names = {"v": ["vision"], "vli": ["vision", "text"], "vlj": list(shapes)[1:]}[design]
    prompts = {name: [nn.Parameter(draw(*shapes[name])) for _ in range(DEPTH)] for name in names}
    given = {f"prompt.{k}": torch.stack([p.detach() for p in v]) for k, v in prompts.items()}
    moments = {
        f"{kind}_{m}": draw(12, 7, WIDTH) for kind in ("adv", "clean") for m in ("mean", "var")
    }
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

    trace = published.adapt(model, (views / 255 - mean) / std, ids, prompts, moments, steps)

    expected = {
        "selected": trace.selected,
        "logits_initial": trace.logits_initial,
        "entropy": torch.stack(trace.entropy),
        "align_adv": torch.stack(trace.align_adv),
        "align_clean": torch.stack(trace.align_clean),
        "logits_adapted": trace.logits_adapted_views[:1],
        "logits_adapted_views": trace.logits_adapted_views,
    }
    for name, layers in prompts.items():
        expected[f"prompt_after.{name}"] = torch.stack([p.detach() for p in layers])
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in layers]
        expected[f"grad_last_step.{name}"] = torch.stack(found)
    metadata = {
        "design": design,
        "steps": str(steps),
        "align": "True",
        "entropy": "True",
        "align_layer_to": str(DEPTH),
        "align_weight": "100",
        "gamma": "0.5",
        "lr": "5e-4",
        "weight_decay": "0.01",
        "selection_ratio": "0.1",
    }
    given |= {"views": views, "input_ids": ids, **{f"stats.{k}": v for k, v in moments.items()}}
    figures = Figures("written here", metadata, given, expected)
    differences = list(parity.compare(figures, PromptedCLIP(model, CLIP_MEAN, CLIP_STD)))
    assert len(differences) == 7 + 2 * len(prompts)
    assert not [found for found in differences if found.beyond]
    assert torch.stack(trace.entropy).min() > 0.01
    assert (trace.logits_adapted_views - trace.logits_initial).abs().max() > 1e-4
