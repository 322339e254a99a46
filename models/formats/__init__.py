"""The formats of checkpoints. A new one is a new module here, listed in `FORMATS`."""

from models.formats import hugging_face, open_clip
from models.formats.checkpoint_format import CheckpointFormat

FORMATS: tuple[CheckpointFormat, ...] = (hugging_face, open_clip)
"""If a directory is of several formats and has the weights of each, the first is loaded."""
