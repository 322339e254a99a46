"""The two sides of the comparison: the published shape, and the defense as it is served.

Both get the same model, images, labels, prompts and statistics, drawn from a seed. A side lives
in a process of its own, so that its peak memory is its own.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from benchmarks import published
from benchmarks.stages import Stages, forget_peak, peak_bytes, resident_bytes
from models import tapt
from models.bundle import DefenseBundle
from models.checkpoint import Checkpoint, load_checkpoint
from models.classifier import DefendedClassifier, ImageQuery
from models.clip import PromptedCLIP
from models.data import open_dataset
from models.evaluation.provenance import describe_machine
from models.images.preprocess import Preprocessing
from models.preprocessing import OPENAI_MEAN, OPENAI_STD
from models.prompts import DefensePrompts
from models.shipped import EMBEDDED
from models.statistics import TokenStatistics
from models.tapt import Objective
from models.views import make_views

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PATCHES = {"vit-b-32": 32, "vit-b-16": 16}
DEPTH, TOKENS = 9, 2  # of the prompts, as published
TEMPLATE = "of a {}."  # behind two slots: the published "a photo of a {}."
AGREEING = 16  # views, at most, where labels are compared and not times
FIRST, SECOND = (
    "red blue green small large old young wild wooden metal white black short wet little bright "
    "golden silver round flat hot cold clean long wide heavy fast slow soft hard new big",
    "dog cat bird fish horse cow sheep bear lion snake spider frog turtle car bus train boat "
    "plane bike truck chair table lamp clock cup bottle bowl knife book phone shoe hat",
)


@dataclass(frozen=True, slots=True)
class Case:
    """What one measurement is of. `chunk` 0: the published shape holds all labels at once."""

    size: str
    device: str
    dtype: str
    labels: int
    batch: int
    views: int
    steps: int
    chunk: int = 0


def draw_names(count: int) -> tuple[str, ...]:
    """Two-word labels, or numbered ones beyond 1,024 of them."""
    names = [f"{a} {b}" for b, a in product(SECOND.split(), FIRST.split())]
    return tuple((names + [f"{names[i % 1024]} {i}" for i in range(1024, count)])[:count])


def draw_image(number: int, side: int) -> NDArray[np.uint8]:
    """A random image with some detail."""
    source = np.random.default_rng(number)
    coarse = np.kron(source.integers(0, 256, (8, 8, 3)), np.ones((side // 8, side // 8, 1)))
    return (0.7 * coarse + 0.3 * source.integers(0, 256, coarse.shape)).astype(np.uint8)


def build_classifier(size: str, device: str, dtype: str) -> DefendedClassifier:
    """The defense at a size: the embedded model with its bundle, or a ViT-B with random weights,
    prompts and statistics; published settings beside."""
    place = torch.device(device)
    embedded = load_checkpoint("embedded", place)
    embedded.clip.convert(DTYPES[dtype])
    if size == "embedded":
        from models.bundle import load_bundle

        bundle = load_bundle(EMBEDDED / "bundle", embedded.clip, embedded.sha256)
        checkpoint = embedded
    else:
        clip = _draw_model(PATCHES[size], embedded).to(place, DTYPES[dtype])
        preprocessing = Preprocessing(224, 224, None, 3, OPENAI_MEAN, OPENAI_STD)
        prompted = PromptedCLIP(clip, OPENAI_MEAN, OPENAI_STD)
        checkpoint = Checkpoint(size, Path(), prompted, embedded.tokenizer, preprocessing, "random")
        bundle = _draw_bundle(prompted)
    assert bundle.statistics is not None
    objective = Objective(reference=bundle.statistics.to(place), layers=bundle.layers)
    return DefendedClassifier(checkpoint, bundle, objective)


def _draw_model(patch: int, embedded: Checkpoint) -> CLIPModel:
    end = embedded.clip.model.config.text_config.eos_token_id
    layers = {"num_hidden_layers": 12, "hidden_act": "quick_gelu"}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    config = CLIPConfig(
        projection_dim=512,
        vision_config={**layers, **vision, "image_size": 224, "patch_size": patch},
        text_config={**layers, **text, "vocab_size": 49408, "eos_token_id": end},
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    # As initialized all images look alike; spread them, so that views and labels differ.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
        model.logit_scale.fill_(math.log(100))  # of every trained CLIP
    return model


def _draw_bundle(clip: PromptedCLIP) -> DefenseBundle:
    source = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=source) * 0.1).to(clip.device)

    shape = (clip.vision_layers, 1 + clip.patches + TOKENS, clip.vision_width)
    moments = [draw(*shape) for _ in range(4)]
    tensors = {
        "vision": draw(1, DEPTH, TOKENS, clip.vision_width),
        "text": draw(1, DEPTH, TOKENS, clip.text_width),
    }
    return DefenseBundle(
        prompts=DefensePrompts("vli", tensors),
        statistics=TokenStatistics(moments[0], moments[1].abs(), moments[2], moments[3].abs()),
        template=TEMPLATE,
        layers=DEPTH,
        checkpoint_sha256="random",
        false_positive_rate=None,
        provenance={},
    )


class Ours:
    """The defense as the worker runs it, views and undefended answer included, the labels'
    features at the learned prompts known from earlier requests."""

    def __init__(self, case: Case) -> None:
        self.classifier = build_classifier(case.size, case.device, case.dtype)

    def prepare(self, case: Case) -> None:
        self._case, names = case, draw_names(case.labels)
        side = 2 * self.classifier.checkpoint.clip.image_size
        self._queries = [
            ImageQuery(draw_image(number, side), names, None, "single", number, case.steps)
            for number in range(case.batch)
        ]

    def run(self) -> list[list[float]]:
        """Scores of each image of the batch."""
        (batch,) = self.classifier.prepare(self._queries, "tapt")
        found = self.classifier.classify(batch, self._case.views)
        ordered = sorted(found, key=lambda prediction: prediction.row)
        return [prediction.probabilities.tolist() for prediction in ordered]

    def stages(self, stages: Stages) -> None:
        clip = self.classifier.checkpoint.clip
        import models.classifier

        stages.watch(models.classifier, "make_batch_views", lambda *_: "making views")
        stages.watch(tapt, "gradients", lambda *_: "image: backward of the kept views")
        stages.watch(clip, "text_gradient", lambda *_: "text: forward and backward in chunks")
        stages.watch(clip, "encode_labels", lambda *_, **__: "text: readout")
        looks = iter(["image: undefended", "image: first look, all views"])

        def look(*arguments: Any, **named: Any) -> str:
            if torch.is_grad_enabled():
                return "image: forward of the kept views"
            return next(looks, "image: readout")

        stages.watch(clip, "encode_images", look)


class Published:
    """The published shape, on the first image of the batch."""

    def __init__(self, case: Case) -> None:
        self.classifier = build_classifier(case.size, case.device, case.dtype)

    def prepare(self, case: Case) -> None:
        classifier, bundle = self.classifier, self.classifier.bundle
        assert bundle is not None
        assert classifier.objective.reference is not None
        self._case, clip = case, classifier.checkpoint.clip
        names = draw_names(case.labels)
        labels = classifier.encoder.encode(names, bundle.template, "learned").batch
        end = clip.model.config.text_config.eos_token_id
        self._ids = F.pad(labels.ids, (0, clip.context_length - labels.ids.shape[1]), value=end)
        preprocessing = classifier.checkpoint.preprocessing
        views = make_views(
            draw_image(0, 2 * clip.image_size), case.views, 0, preprocessing, clip.device
        )
        mean, std = (
            torch.tensor(values, device=clip.device).view(3, 1, 1)
            for values in (preprocessing.mean, preprocessing.std)
        )
        self._views = ((views - mean) / std).to(clip.dtype)
        self._moments = {
            k: v.to(clip.dtype) for k, v in classifier.objective.reference.tensors().items()
        }

    def run(self) -> list[list[float]]:
        bundle, case = self.classifier.bundle, self._case
        assert bundle is not None
        prompts = {
            name: [nn.Parameter(p.to(self._views).clone()) for p in value[0]]
            for name, value in bundle.prompts.tensors.items()
        }
        trace = published.adapt(
            self.classifier.checkpoint.clip.model,
            self._views,
            self._ids,
            prompts,
            self._moments,
            case.steps,
            look=slice(0, 1),
            rows=case.chunk or None,
        )
        return trace.logits_adapted_views.float().softmax(dim=-1).tolist()

    def stages(self, stages: Stages) -> None:
        def kind(what: str) -> Callable[..., str]:
            return lambda *_: f"{what}: {'forward' if torch.is_grad_enabled() else 'readout'}"

        stages.watch(published, "see", kind("image"))
        whole = kind("text")

        def read(model: Any, ids: Tensor, prompts: Any) -> str:
            cut = len(ids) < self._case.labels and not torch.is_grad_enabled()
            return EXTRA if cut else whole()

        stages.watch(published, "read", read)
        stages.watch(published, "skim", lambda *_: EXTRA)


EXTRA = "text: the pass that chunks add"
SIDES: dict[str, Callable[[Case], Ours | Published]] = {"ours": Ours, "published": Published}


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a side: its seconds and those of the processor, of which `extra` seconds are what
    cutting into chunks adds, and the seconds by stage; `rest` is what lies between the stages, the
    backward pass included. On a GPU the stages are those of a second run."""

    seconds: float
    cpu_seconds: float
    extra: float
    stages: dict[str, float]
    scores: list[list[float]]


class Bench:
    """A side at work; what its process answers to."""

    def __init__(self, side: str, case: Case) -> None:
        self._side = SIDES[side](case)
        self._device = self._side.classifier.checkpoint.clip.device
        self.idle_bytes = resident_bytes()

    def machine(self) -> dict[str, Any]:
        return describe_machine(self._side.classifier)

    def prepare(self, case: Case) -> tuple[int, int]:
        """Warm up at a case; floating-point operations of a run, and the peak bytes of memory,
        on the device or of this process."""
        self._side.prepare(case)
        if isinstance(self._side, Ours):
            self._side.run()  # labels become known
        forget_peak(self._device)
        with FlopCounterMode(display=False) as counter:
            self._side.run()
        return counter.get_total_flops(), peak_bytes(self._device)

    def run(self) -> Run:
        stages, seconds = Stages(self._device), 0.0
        start, cpu = stages.now(), time.process_time()
        if self._device.type == "cuda":  # where each stage's end is waited for: a run of its own
            self._side.run()
            seconds, start = stages.now() - start, stages.now()
        self._side.stages(stages)
        scores = self._side.run()
        whole, cpu = stages.now() - start, time.process_time() - cpu
        stages.end()
        if self._device.type != "cuda":
            seconds = whole
        found = dict(stages.seconds)
        found["rest"] = whole - sum(found.values())
        return Run(seconds, cpu, found.get(EXTRA, 0.0), found, scores)

    def winners(self, case: Case, count: int, data: str | None) -> list[int]:
        """The best label of each of `count` images by the defense, drawn ones or a data set's
        with its own labels; with what a server reads out."""
        classifier, names = self._side.classifier, draw_names(case.labels)
        side = 2 * classifier.checkpoint.clip.image_size
        images = [draw_image(number, side) for number in range(count)]
        if data is not None:
            found = open_dataset(data)
            names, images = tuple(found.names), [e.pixels for e in found.examples(count, seed=0)]
        winners = []
        for number, image in enumerate(images):
            query = ImageQuery(image, names, None, "all", number, case.steps)
            (batch,) = classifier.prepare([query], "tapt")
            (prediction,) = classifier.classify(batch, min(case.views, AGREEING))
            winners.append(int(prediction.probabilities.argmax()))
        return winners

    def ceiling(self, dtype: str) -> float:
        """Floating-point operations a second of the best of some matrix products."""
        best = 0.0
        for rows, inner, columns in ((3200, 768, 3072), (3200, 3072, 768), (4096, 4096, 4096)):
            a = torch.randn(rows, inner, device=self._device, dtype=DTYPES[dtype])
            b = torch.randn(columns, inner, device=self._device, dtype=DTYPES[dtype])
            stages = Stages(self._device)
            repeats = 200 if self._device.type == "cuda" else 3
            for _ in range(4):
                start = stages.now()
                for _ in range(repeats):
                    F.linear(a, b)
                flops = 2 * repeats * math.prod((rows, inner, columns))
                best = max(best, flops / (stages.now() - start))
        return best
