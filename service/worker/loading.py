"""Load the model that the settings name, and describe it."""

import torch
import transformers

from models.classifier import DefendedClassifier
from models.defenses.catalog import DEFENSES
from models.errors import LoadError
from models.loading import load_classifier
from models.memory import footprint, free_bytes, resident_bytes
from service.errors import ModelError
from service.messages import Ready
from service.settings import Settings

QUICK_GELU = {"auto": None, "true": True, "false": False}
BATCH_SHARE = 0.5  # of the free memory, for the largest batch


def load(settings: Settings, index: int) -> DefendedClassifier:
    """The model of worker number `index`.

    Raises:
        ModelError: the device is missing, or checkpoint, bundle or method cannot be used.
    """
    try:
        classifier = load_classifier(
            settings.model,
            device=settings.device,
            device_index=index,
            dtype=settings.dtype,
            revision=settings.model_revision,
            sha256=settings.model_sha256.lower(),
            tokenizer=settings.tokenizer,
            quick_gelu=QUICK_GELU[settings.quick_gelu],
            bundle=settings.bundle,
            design=settings.design,
            template=settings.hypothesis_template,
            selection_ratio=settings.selection_ratio,
            adapts=settings.adapts,
            alignment_weight=settings.alignment_weight,
            gamma=settings.gamma,
            learning_rate=settings.learning_rate,
            early_stop=settings.early_stop,
        )
    except LoadError as error:
        raise ModelError(str(error)) from error
    if settings.method not in classifier.methods:
        raise ModelError(f"method {settings.method} needs a defense bundle")
    if settings.steps and not classifier.can_adapt(None, settings.method):
        raise ModelError(
            f"method {settings.method} adapts the words of one template, but hypothesis_template "
            f"has {len(settings.templates)}"
        )
    return classifier


def memory_bytes(device: torch.device) -> int:
    """Memory in use on a device; on a CPU, the resident memory of this process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def describe(classifier: DefendedClassifier, settings: Settings) -> Ready:
    """What the API process and `/info` need to know of a loaded model.

    The largest batch follows from the memory that is free now, unless the settings give one.
    """
    checkpoint, bundle = classifier.checkpoint, classifier.bundle
    clip = checkpoint.clip
    visual = None if bundle is None else bundle.prompts.vision
    image_tokens = 1 + clip.patches + (0 if visual is None else visual.shape[2])
    resident = memory_bytes(clip.device)
    cost = footprint(clip, resident, settings.selection_ratio, image_tokens)
    share = BATCH_SHARE / (1 if clip.device.type == "cuda" else settings.workers)
    tokens = settings.max_batch_tokens or cost.budget(int(free_bytes(clip.device) * share))
    return Ready(
        info={
            "model": {
                "name": checkpoint.name,
                "sha256": checkpoint.sha256,
                "parameters": sum(p.numel() for p in clip.model.parameters()),
                "image_size": clip.image_size,
                "context_length": clip.context_length,
                "dtype": str(clip.dtype).removeprefix("torch."),
                "dtype_reason": checkpoint.dtype_reason,
                "device": str(clip.device),
            },
            "bundle": None if bundle is None else bundle.describe(),
            "design": classifier.design("tapt"),
            "memory": {
                "resident_bytes": resident,
                "image_token_bytes": round(cost.image_token),
                "text_token_bytes": round(cost.text_token),
                "batch_tokens": tokens,
                "peak_bytes": max(cost.peak(tokens, 0), cost.peak(0, tokens)),
            },
            "designs": ["v", "vli", "vlj"],
            "defenses": classifier.methods,
            "methods": {name: DEFENSES[name].describe() for name in classifier.methods},
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        },
        max_batch_tokens=tokens,
        image_tokens=image_tokens,
        context_length=clip.context_length,
        preprocessing=checkpoint.preprocessing,
    )
