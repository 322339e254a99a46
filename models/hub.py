"""Find files: in a local directory, or in a repository of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from models.errors import LoadError, first_line


def find_directory(name: str, revision: str, patterns: Sequence[str]) -> Path:
    """A local directory as it is, or a directory with a hub repository's files of some patterns.

    Args:
        name: a directory or a hub id (from the cache when `HF_HUB_OFFLINE` is set).
        revision: commit, tag or branch of a hub id; empty for the newest.

    Raises:
        LoadError: it is neither, cannot be fetched, or a directory is asked for a revision.
    """
    if Path(name).is_dir():
        if revision:
            raise LoadError(f"{name} is a local directory and has no revision {revision}")
        return Path(name)
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(patterns))
        )
    except HFValidationError as error:
        raise LoadError(f"{name} is neither a directory nor a hub id") from error
    except LocalEntryNotFoundError as error:
        raise LoadError(
            f"{name} is not a local directory and not on the hub or in its cache"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise LoadError(f"{name} cannot be fetched: {first_line(error)}") from error


def split_revision(name: str) -> tuple[str, str]:
    """`owner/name@revision` as id and revision; the revision is empty where none is given, and for
    a directory."""
    if Path(name).is_dir():
        return name, ""
    found, _, revision = name.partition("@")
    return found, revision
