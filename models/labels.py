"""Labels of several requests as one ragged batch of token rows.

Text tokens after the end-of-text change nothing under the causal mask, so rows are cut there. A
request's prompt slots are inserted between the start token and its text and never replace text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from models.device import upload

MASKED = -1e4  # a logit that softmax maps to 0; finite, so that its gradient is 0 and not NaN


@dataclass(frozen=True, slots=True)
class LabelBatch:
    """R label rows of B requests.

    Attributes:
        ids: token ids [R, T] with the slots behind the start token.
        ends: [R], the position that is pooled.
        counts: the number of rows of each request, in order.
        truncated: the number of rows of each request that were cut to the context.
        leads: the number of tokens that all rows of a request begin with.
    """

    ids: Tensor
    ends: Tensor
    counts: tuple[int, ...]
    truncated: tuple[int, ...]
    leads: tuple[int, ...]

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.counts)

    @property
    def owners(self) -> Tensor:
        """[R]: the request that each row belongs to."""
        return upload(np.repeat(np.arange(len(self.counts)), self.counts), self.ids.device)

    @property
    def lead(self) -> int:
        """Tokens that the rows of any one request begin with; at least the start token."""
        return min(self.leads)

    def split(self, rows: slice) -> list[tuple[int, int]]:
        """For each request with rows in a slice: its first such row, and how many there are."""
        found, start = [], 0
        for count in self.counts:
            first, last = max(start, rows.start), min(start + count, rows.stop)
            if first < last:
                found.append((first, last - first))
            start += count
        return found

    def pad(self, values: Tensor) -> Tensor:
        """Values of rows [R, ...] as [B, most labels, ...], zeros where a request has fewer."""
        return torch.nn.utils.rnn.pad_sequence(list(values.split(self.counts)), batch_first=True)

    def take(self, values: Tensor, requests: Sequence[int]) -> Tensor:
        """The values, of rows [R, ...], that belong to the given requests, in order."""
        parts = values.split(self.counts)
        return torch.cat([values[:0], *(parts[request] for request in requests)])

    def select(self, requests: Sequence[int]) -> "LabelBatch":
        """The rows of some requests, in order."""
        return LabelBatch(
            self.take(self.ids, requests),
            self.take(self.ends, requests),
            tuple(self.counts[request] for request in requests),
            tuple(self.truncated[request] for request in requests),
            tuple(self.leads[request] for request in requests),
        )

    @property
    def mask(self) -> Tensor:
        """[B, most labels], true where a request has a label."""
        counts = np.array(self.counts)
        return upload(np.arange(counts.max()) < counts[:, None], self.ids.device)

    def to(self, device: torch.device) -> "LabelBatch":
        return replace(self, ids=self.ids.to(device), ends=self.ends.to(device))


def join(batches: Sequence[LabelBatch]) -> LabelBatch:
    """Concatenate label sets of several requests, padded to the longest."""
    length = max(batch.ids.shape[1] for batch in batches)
    return LabelBatch(
        torch.cat([torch.nn.functional.pad(b.ids, (0, length - b.ids.shape[1])) for b in batches]),
        torch.cat([batch.ends for batch in batches]),
        tuple(count for batch in batches for count in batch.counts),
        tuple(count for batch in batches for count in batch.truncated),
        tuple(lead for batch in batches for lead in batch.leads),
    )


def one_request(ids: Tensor, ends: Tensor, truncated: int = 0) -> LabelBatch:
    """The rows [R, T] of one request, pooled at `ends` [R]."""
    differ = (ids != ids[0]).any(dim=0).tolist()
    shared = differ.index(True) if True in differ else len(differ)
    lead = min(shared, int(ends.min()))  # every row keeps a token of its own
    return LabelBatch(ids, ends, (len(ids),), (truncated,), (lead,))


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    eos_token_id: int,
    texts: Sequence[str],
    context_length: int,
    slots: int = 0,
) -> LabelBatch:
    """Tokenize one request's texts, with `slots` empty positions behind the start token.

    Texts that do not fit are cut before their end-of-text and counted in `truncated`.

    Raises:
        ValueError: the slots leave no space for text in the context.
    """
    room = context_length - slots
    if room < 3:
        raise ValueError(f"{slots} prompt slots leave no room in a context of {context_length}")
    full = tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]
    cut = tokenizer(
        list(texts), padding=True, truncation=True, max_length=room, return_tensors="pt"
    )["input_ids"]
    # The pooling rules of transformers' CLIPTextModel: a config from before the fix names token 2
    # and means the largest id.
    found = cut if eos_token_id == 2 else (cut == eos_token_id).int()
    ends = found.argmax(dim=-1)
    cut = cut[:, : int(ends.max()) + 1]
    blank = torch.zeros(len(texts), slots, dtype=cut.dtype)
    ids = torch.cat([cut[:, :1], blank, cut[:, 1:]], dim=1)
    truncated = sum(len(row) > room for row in full)
    return one_request(ids, ends + slots, truncated)
