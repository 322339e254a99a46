"""The embedded model's tokenizer: a small byte-level BPE in the format of CLIP's own."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
WORD_END = "</w>"


def train_tokenizer(texts: Iterable[str], size: int, context: int) -> Any:
    """Learn merges from texts and return a `CLIPTokenizer` of at most `size` tokens.

    All 256 bytes are tokens, inside a word and at its end, so that any Unicode text has a
    tokenization without an unknown token. `context` is the model's number of text positions.
    """
    shell = CLIPTokenizer()
    backend = shell.backend_tokenizer
    # A fresh trainer knows nothing of bytes that no text holds: the alphabet is given to it, and
    # its word-end forms are added below.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(alphabet) - 3,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    backend.model = models.BPE(end_of_word_suffix=WORD_END)
    backend.train_from_iterator(texts, trainer)
    learned = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokens = [START, END, PAD, *alphabet, *(letter + WORD_END for letter in alphabet)]
    tokens += ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=PAD,
        model_max_length=context,
    )
