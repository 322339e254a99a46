"""Label sets as a defense reads them: tokenized, encoded with their prompts, and cached.

Text features before adapting are the same for every request with the same labels. They are kept in
an LRU cache that is bounded in bytes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from models.bundle import DefenseBundle
from models.checkpoint import Checkpoint
from models.labels import LabelBatch, join, tokenize
from models.prompts import DefensePrompts

CACHE_BYTES = 64 * 2**20

Template = str | tuple[str, ...]
"""One template, or several whose features are averaged."""

Prompting = Literal["none", "words", "learned"]
"""The prompts that labels are read with: none, the template's leading words, or the bundle's."""


@dataclass(frozen=True, slots=True)
class EncodedLabels:
    """One request's labels: token rows, their features [C, D], and the prompts they were read
    with."""

    batch: LabelBatch
    features: Tensor
    prompts: DefensePrompts


class LabelEncoder:
    """Turns labels and a template into features, plain or with the learned prompts.

    `hits` and `misses` count lookups in the cache.

    Args:
        template: the default where labels are not read with the bundle's prompts.
    """

    def __init__(
        self, checkpoint: Checkpoint, bundle: DefenseBundle | None, template: Template
    ) -> None:
        self._checkpoint, self._bundle, self._template = checkpoint, bundle, template
        self._cache: OrderedDict[tuple[Prompting, Template, tuple[str, ...]], EncodedLabels]
        self._cache = OrderedDict()
        self._bytes = 0
        self.hits = self.misses = 0

    def resolve(self, prompting: Prompting) -> Prompting:
        """Without a bundle, the template's words stand in for learned prompts."""
        return "words" if self._bundle is None and prompting == "learned" else prompting

    def resolve_template(self, template: Template | None, prompting: Prompting) -> Template:
        """The default for None: the bundle's text behind its learned prompts, or the encoder's own
        template."""
        if template is not None:
            return template
        learned = self._bundle if prompting == "learned" else None
        return learned.template if learned else self._template

    def encode(
        self, labels: Sequence[str], template: Template | None, prompting: Prompting
    ) -> EncodedLabels:
        """Features of labels put into a template.

        Learned prompts have slots of their own. The template's leading words, as prompts, stand
        where they stood, so that they change nothing before a step.

        Of several templates, a label's feature is the mean of its normalized features, normalized
        again, as in CLIP's own evaluation (Radford et al., 2021, arXiv 2103.00020, section 3.1.4).
        The token rows and prompts are then those of the first template; a step must not move them.

        Args:
            template: each holds one `{}`; None for the default, see `resolve_template`.
        """
        prompting = self.resolve(prompting)
        template = self.resolve_template(template, prompting)
        key = (prompting, template, tuple(labels))
        if key in self._cache:
            self.hits += 1
            self._cache.move_to_end(key)
            return self._cache[key]
        self.misses += 1
        if isinstance(template, str):
            encoded = self._encode(labels, template, prompting)
        else:
            encoded = _mean([self._encode(labels, each, prompting) for each in template])
        self._cache[key] = encoded
        self._bytes += _size(encoded)
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            self._bytes -= _size(self._cache.popitem(last=False)[1])
        return encoded

    def _encode(self, labels: Sequence[str], template: str, prompting: Prompting) -> EncodedLabels:
        lead, _, rest = template.partition("{}")
        texts = [f"{lead}{label}{rest}" for label in labels]
        clip, tokenizer = self._checkpoint.clip, self._checkpoint.tokenizer
        end = clip.model.config.text_config.eos_token_id
        learned = self._bundle.prompts if self._bundle and prompting == "learned" else None
        text = None if learned is None else learned.text
        slots = 0 if text is None else text.shape[2]
        batch = tokenize(tokenizer, end, texts, clip.context_length, slots).to(clip.device)
        if learned is None:
            learned = self._leading_words(batch, lead if prompting == "words" else "")
        return EncodedLabels(batch, clip.encode_labels(batch, text), learned)

    def _leading_words(self, batch: LabelBatch, lead: str) -> DefensePrompts:
        """The embeddings [1, 1, n, width] of the tokens that the template begins with."""
        clip, tokenizer = self._checkpoint.clip, self._checkpoint.tokenizer
        words = tokenizer(lead, add_special_tokens=False)["input_ids"]
        count = 0
        while (
            count < len(words)
            and count + 1 < int(batch.ends.min())
            and bool((batch.ids[:, count + 1] == words[count]).all())
        ):
            count += 1
        embedding = clip.model.text_model.embeddings.token_embedding
        return DefensePrompts(
            "text", {"text": embedding(batch.ids[0, 1 : count + 1]).detach().float()[None, None]}
        )


def join_encoded(encoded: Sequence[EncodedLabels]) -> tuple[LabelBatch, Tensor]:
    """Several requests' labels as one batch of rows with their features [R, D]."""
    batch = join([labels.batch for labels in encoded])
    return batch, torch.cat([labels.features for labels in encoded])


def _mean(encoded: Sequence[EncodedLabels]) -> EncodedLabels:
    """The same labels in several templates as one. A label counts as truncated once."""
    features = torch.stack([each.features for each in encoded]).mean(dim=0)
    most = max(each.batch.truncated for each in encoded)
    return replace(
        encoded[0],
        batch=replace(encoded[0].batch, truncated=most),
        features=torch.nn.functional.normalize(features, dim=-1),
    )


def _size(encoded: EncodedLabels) -> int:
    return encoded.features.nbytes + encoded.batch.ids.nbytes
