"""A checkpoint's tokenizer: its own, or another that is named for it."""

from pathlib import Path

from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from models.errors import LoadError, first_line
from models.hub import find_directory, split_revision

FILES = ("*.json", "*.txt", "*.model")
MARKS = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
LARGEST_ID = 2  # as an `eos_token_id`: the text is pooled at its largest id

OPENAI, OPENAI_VOCABULARY = "openai/clip-vit-base-patch32", 49_408

SAMPLE = "a photo of a dog"


def load_tokenizer(
    name: str, directory: Path, vocabulary: int, eos_token_id: int, other: str = ""
) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's directory, or the other one.

    Args:
        name: of the checkpoint.
        vocabulary: the number of its text embeddings.
        eos_token_id: of its configuration; 2 pools the text at its largest id.
        other: a directory, `owner/name` or `owner/name@revision` to take it from instead.

    Raises:
        LoadError: there is none, it cannot be read, or it does not fit the vocabulary.
    """
    if other:
        directory = find_directory(*split_revision(other), FILES)
    where = other or name
    if not has_tokenizer(directory):
        hint = f", such as {OPENAI}" if vocabulary == OPENAI_VOCABULARY else ""
        raise LoadError(
            f"{where} has no tokenizer that fits {vocabulary} text embeddings; set TAPT_TOKENIZER "
            f"to a directory or hub id that has one{hint}, or add one to a copy of the checkpoint "
            "with `tapt-serve convert SRC DIR --tokenizer`"
        )
    try:
        tokenizer = _read(directory)
        ids = tokenizer(SAMPLE)["input_ids"]
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # a tokenizer's own code may raise anything
        raise LoadError(f"{where} has no usable tokenizer: {first_line(error)}") from error
    # If the files are missing, transformers makes up a tokenizer without any words.
    if len(set(ids)) < 4:
        raise LoadError(f"{where} has a tokenizer without a vocabulary")
    if largest >= vocabulary:
        raise LoadError(
            f"the tokenizer of {where} has ids up to {largest}, and {name} has {vocabulary} text "
            "embeddings"
        )
    if eos_token_id != LARGEST_ID and eos_token_id not in ids:
        raise LoadError(
            f"the tokenizer of {where} ends texts with id {ids[-1]}, and {name} expects "
            f"{eos_token_id}"
        )
    return tokenizer


def has_tokenizer(directory: Path) -> bool:
    return any((directory / mark).is_file() for mark in MARKS)


def _read(directory: Path) -> PreTrainedTokenizerBase:
    # Without this file, AutoTokenizer looks for the model's own configuration.
    own = (directory / "tokenizer_config.json").is_file() or (directory / "config.json").is_file()
    kind = AutoTokenizer if own else CLIPTokenizer
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(directory, local_files_only=True)
    return tokenizer
