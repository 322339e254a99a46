"""A defended CLIP: checkpoint, bundle and objective together, from images and labels to answers.

Service, command line and evaluation all classify through here.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.bundle import DefenseBundle
from models.checkpoint import Checkpoint
from models.defenses import plain
from models.defenses.catalog import DEFENSES, DefenseSpec
from models.defenses.defense import (
    Adaptation,
    DefenseInput,
    DefenseOutput,
    LabelFeatures,
    load_defense,
)
from models.label_encoder import EncodedLabels, LabelEncoder, Template, join_encoded
from models.prompts import DefensePrompts
from models.readout import gather_views, mean_prediction, suspicion
from models.tapt import Leaving, Objective, leaves_after, view_entropy
from models.views import make_batch_views

DEFAULT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True, slots=True)
class ImageQuery:
    """What is asked of one image.

    Attributes:
        image: uint8 RGB [height, width, 3] of any size; or whole values [3, height, width] in
            [0, 255] as a tensor, which a gradient may pass to.
        labels: at least one.
        template: holds one `{}`, or several that each do; None for the default (see
            `LabelEncoder.encode`).
        readout: views that the answer is read from, where the defense leaves the choice.
        seed: draws the views, and the noise of a defense that adds some.
        steps: most optimization steps to take.
        view: view 0, if it was made already: see `DecodedImage`.
    """

    image: NDArray[np.uint8] | Tensor
    labels: tuple[str, ...]
    template: Template | None = None
    readout: str = "all"
    seed: int = 0
    steps: int = 1
    view: NDArray[np.uint8] | None = None


@dataclass(frozen=True, slots=True)
class EncodedQuery:
    """A query with its labels encoded.

    Attributes:
        plain: the labels as undefended CLIP reads them.
        prompted: the labels with the prompts that the defense starts from; the same object as
            `plain` where these change nothing before a step.
    """

    query: ImageQuery
    plain: EncodedLabels
    prompted: EncodedLabels


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """Queries that can run together, with their labels encoded.

    Attributes:
        indices: the queries' places in what `group` was given.
        steps: steps that each query takes; 0 where there is nothing to adapt.
        plain: the labels as undefended CLIP reads them.
        prompted: the labels with the prompts that the defense starts from; the same object as
            `plain` where these change nothing before a step.
        prompts: those prompts, [B, ...].
    """

    spec: DefenseSpec
    indices: list[int]
    queries: list[ImageQuery]
    steps: list[int]
    plain: LabelFeatures
    prompted: LabelFeatures
    prompts: DefensePrompts


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one query, and what the defense saw on the way.

    Attributes:
        row: the query, as an index into its batch.
        probabilities: [C], in the order of the labels.
        undefended: [C], what undefended CLIP says of the image.
        views: probabilities [V, C] of all views before any adaptation.
        kept: number of views that the loss looked at, or the answer where there is no loss.
        readout: views that the answer was read from, see `readout.view_weights`.
        steps: optimization steps taken.
        entropy_before, entropy_after: of the kept views' mean prediction, nats.
        suspicion: attack score in [0, 1], see `readout.suspicion`.
        suspected: whether it is above the bundle's threshold; None where there is none.
        labels_truncated: number of labels that did not fit the context.
        seconds: time from the start of the batch to the end of adapting.
    """

    row: int
    probabilities: Tensor
    undefended: Tensor
    views: Tensor
    kept: int
    readout: str
    steps: int
    entropy_before: float
    entropy_after: float
    suspicion: float
    suspected: bool | None
    labels_truncated: int
    seconds: float


class DefendedClassifier:
    """Classifies batches with a defense; keeps nothing of a request but cached text features.

    Args:
        selection_ratio: share of the views kept for the loss, in (0, 1].
        template: default where labels are not read with learned prompts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        bundle: DefenseBundle | None,
        objective: Objective | None = None,
        selection_ratio: float = 0.1,
        template: Template = DEFAULT_TEMPLATE,
    ) -> None:
        self.checkpoint, self.bundle, self.template = checkpoint, bundle, template
        self.objective = objective or Objective()
        self.selection_ratio = selection_ratio
        self.encoder = LabelEncoder(checkpoint, bundle, template)

    @property
    def methods(self) -> list[str]:
        """Names of the defenses that this model can run; some need a bundle."""
        return [name for name, spec in DEFENSES.items() if self.bundle or not spec.needs_bundle]

    def design(self, method: str) -> str:
        """Design of a defense's prompts; `text` is the template's own words, `none` no prompts."""
        prompting = self.encoder.resolve(DEFENSES[method].prompts)
        if self.bundle is not None and prompting == "learned":
            return self.bundle.prompts.design
        return "none" if prompting == "none" else "text"

    def moves_text(self, method: str) -> bool:
        """Whether a step of this defense changes the labels' features."""
        spec = DEFENSES[method]
        if not spec.adapts_prompts:
            return False
        if self.bundle is None or spec.prompts == "words":
            return True
        return "text" in self.objective.moving(self.bundle.prompts)

    def can_adapt(self, template: Template | None, method: str) -> bool:
        """Whether a defense can take steps on labels in this template (None for the default). Steps
        that change the labels' features take one template, not several."""
        used = self.encoder.resolve_template(template, DEFENSES[method].prompts)
        return isinstance(used, str) or not self.moves_text(method)

    def without_resize(self) -> "DefendedClassifier":
        """The same for images of the model's own size, which it neither resizes nor crops."""
        preprocessing = self.checkpoint.preprocessing.without_resize()
        checkpoint = replace(self.checkpoint, preprocessing=preprocessing)
        return DefendedClassifier(
            checkpoint, self.bundle, self.objective, self.selection_ratio, self.template
        )

    def threshold(self, method: str, views: int) -> float | None:
        """The suspicion above which an answer counts as suspected.

        None if the bundle has none for views read with these prompts, and for a single view, which
        can hardly disagree with itself.
        """
        if self.bundle is None or views == 1:
            return None
        return self.bundle.suspicion.get(DEFENSES[method].prompts)

    def prepare(self, queries: Sequence[ImageQuery], method: str) -> list[PreparedBatch]:
        """Encode the queries' labels, once each, and group the queries that can run together.

        Raises:
            ValueError: the method needs a bundle and there is none.
        """
        return self.group([self.encode(query, method) for query in queries], method)

    def encode(self, query: ImageQuery, method: str) -> EncodedQuery:
        """Encode a query's labels as a method reads them.

        Raises:
            ValueError: the method needs a bundle and there is none, or it would adapt the text of
                several templates.
        """
        if method not in self.methods:
            raise ValueError(f"{method} needs a defense bundle")
        if query.steps and not self.can_adapt(query.template, method):
            raise ValueError(f"{method} adapts the words of one template, not of several")
        prompts = DEFENSES[method].prompts
        plain = prompted = self.encoder.encode(query.labels, query.template, prompts)
        if self.encoder.resolve(prompts) == "learned":  # words change nothing before a step
            plain = self.encoder.encode(query.labels, query.template, "none")
        return EncodedQuery(query, plain, prompted)

    def group(self, encoded: Sequence[EncodedQuery], method: str) -> list[PreparedBatch]:
        """Group queries, encoded for one method, that can run together.

        Prompts of one batch have one shape. Where they are the template's leading words, the shape
        depends on the template.
        """
        groups: dict[torch.Size | None, list[int]] = {}
        for index, one in enumerate(encoded):
            text = one.prompted.prompts.text
            groups.setdefault(None if text is None else text.shape, []).append(index)
        return [
            self._join(DEFENSES[method], indices, [encoded[index] for index in indices])
            for indices in groups.values()
        ]

    def _join(
        self, spec: DefenseSpec, indices: list[int], encoded: list[EncodedQuery]
    ) -> PreparedBatch:
        plain = prompted = LabelFeatures(*join_encoded([one.prompted for one in encoded]))
        if any(one.plain is not one.prompted for one in encoded):
            plain = LabelFeatures(*join_encoded([one.plain for one in encoded]))
        return PreparedBatch(
            spec=spec,
            indices=indices,
            queries=[one.query for one in encoded],
            steps=[
                one.query.steps if self._adapts(spec, one.prompted.prompts) else 0
                for one in encoded
            ],
            plain=plain,
            prompted=prompted,
            prompts=_stack([one.prompted.prompts for one in encoded]),
        )

    @torch.no_grad()
    def classify(
        self, batch: PreparedBatch, views: int, leaving: Leaving | None = None
    ) -> Iterator[Prediction]:
        """Yield each query's prediction as soon as it leaves the loop, in any order.

        Args:
            views: number of views, for a defense that looks at more than one.
            leaving: asked at each step boundary, see `tapt.adapt`; by default each query takes
                its steps.
        """
        start = time.perf_counter()
        inputs = self._make_input(batch, views, Adaptation(leaving or leaves_after(batch.steps)))
        clip, undefended = self.checkpoint.clip, None
        if batch.plain is not batch.prompted:
            (output,) = plain.defend(clip, inputs)
            undefended = mean_prediction(output.logits)
        for output in load_defense(batch.spec)(clip, inputs):
            yield from self._predict(batch, output, undefended, start)

    def defend(
        self, batch: PreparedBatch, views: int, adaptation: Adaptation
    ) -> Iterator[DefenseOutput]:
        """The defense's own output, differentiable with respect to the images that are tensors."""
        inputs = self._make_input(batch, views, adaptation)
        return load_defense(batch.spec)(self.checkpoint.clip, inputs)

    def _make_input(self, batch: PreparedBatch, views: int, adaptation: Adaptation) -> DefenseInput:
        preprocessing, device = self.checkpoint.preprocessing, self.checkpoint.clip.device
        count = 1 if batch.spec.views == "one" else views
        return DefenseInput(
            views=make_batch_views(
                [query.image for query in batch.queries],
                count,
                [query.seed for query in batch.queries],
                preprocessing,
                device,
                [query.view for query in batch.queries],
            ),
            plain=batch.plain,
            prompted=batch.prompted,
            prompts=batch.prompts,
            objective=self.objective,
            selection_ratio=self.selection_ratio,
            readouts=[batch.spec.readout or query.readout for query in batch.queries],
            seeds=[query.seed for query in batch.queries],
            adaptation=adaptation,
        )

    def _predict(
        self, batch: PreparedBatch, output: DefenseOutput, undefended: Tensor | None, start: float
    ) -> Iterator[Prediction]:
        """The predictions of the queries of an output."""
        labels, kept = batch.prompted.batch, output.kept
        before, after = (
            view_entropy(logits if kept is None else gather_views(logits, kept)).tolist()
            for logits in (output.initial, output.logits)
        )
        probabilities = mean_prediction(output.logits, output.weights, output.averages_logits)
        for place, row in enumerate(output.rows):
            count = labels.counts[row]
            views = output.initial[place, :, :count].softmax(dim=-1)
            alone = views[0] if undefended is None else undefended[row, :count]
            score = float(suspicion(alone, views))
            threshold = self.threshold(batch.spec.name, len(views))
            yield Prediction(
                row=row,
                probabilities=probabilities[place, :count],
                undefended=alone,
                views=views,
                kept=len(views) if kept is None else kept.shape[1],
                readout=output.readout or batch.spec.readout or batch.queries[row].readout,
                steps=output.steps,
                entropy_before=before[place],
                entropy_after=after[place],
                suspicion=score,
                suspected=None if threshold is None else score > threshold,
                labels_truncated=labels.truncated[row],
                seconds=output.adapted - start,
            )

    def _adapts(self, spec: DefenseSpec, prompts: DefensePrompts) -> bool:
        """Whether steps would change anything. A template that begins with its label has no words
        to adapt."""
        if not spec.adapts_prompts:
            return spec.adapts
        return any(prompts.tensors[name].numel() for name in self.objective.moving(prompts))


def _stack(sets: Sequence[DefensePrompts]) -> DefensePrompts:
    """The prompts of several requests, of one shape, as a batch [B, ...]."""
    names = sets[0].tensors
    return sets[0].map({name: torch.cat([one.tensors[name] for one in sets]) for name in names})
