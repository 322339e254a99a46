"""Errors of models, checkpoints and images, and what to tell users about errors of libraries."""


def install_extra(extra: str) -> str:
    """The command that installs an optional set of packages, to be run in a checkout."""
    return f"run `.venv/bin/python -m pip install -c constraints.txt -e '.[{extra}]'`"


def first_line(error: Exception) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class LoadError(ValueError):
    """A device, checkpoint or bundle that cannot be used; one sentence for the operator."""


class ImageError(Exception):
    """An image file cannot be used; the message is one sentence for whoever sent it."""


class DamagedImage(ImageError):
    """The file is empty, malformed or truncated."""


class UnsupportedImage(ImageError):
    """The file is not of an accepted format, or its samples have no defined range."""


class TooManyPixels(ImageError):
    """The file's header names more pixels than are accepted."""


class ExtremeAspect(ImageError):
    """The image is far longer than wide, or far wider than long."""


class CostlyImage(ImageError):
    """Decoding would take more time or memory than one image may have."""


class OutOfMemory(CostlyImage):
    """Decoding ran out of memory (then the cause is a MemoryError), or is expected to."""
