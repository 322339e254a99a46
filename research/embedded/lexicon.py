"""How well WordNet foretells published text features that it was not shown.

Each tenth of the published names is left out in turn, for the taxonomy, the glosses and the names
alone and for all three: so the kernel was chosen, without a look at any image.
"""

from pathlib import Path

import safetensors.torch

from models.evaluation.table import tabulate
from research.embedded.captions import read_nouns
from research.embedded.losses import center
from research.embedded.meaning import Kernel, Meaning, predict_held_out
from research.embedded.wordnet import WordNet

PARTS = {
    "taxonomy": (1.0, 0.0, 0.0),
    "glosses": (0.0, 1.0, 0.0),
    "names": (0.0, 0.0, 1.0),
    "all three": (0.5, 0.5, 0.5),
}


def held_out_table(data: Path, directory: Path) -> str:
    """Mean cosine to the true feature, and how often the true name is among the ten nearest."""
    wordnet = WordNet.read(directory)
    known = [Meaning(name, wordnet.sense(name)) for name in read_nouns(data).published]
    stored = safetensors.torch.load_file(data / "clip_text_features.safetensors")
    features = center(stored["features"])
    rows = []
    for name, weights in PARTS.items():
        likeness = predict_held_out(Kernel(wordnet, weights=weights), known, features) @ features.T
        own = likeness.diagonal()
        # A name's own rank among all, ties against it: predicted to be nothing is not near.
        near = ((likeness >= own[:, None]).sum(1) <= 10).float().mean()
        rows.append((name, f"{float(own.mean()):.3f}", f"{100 * float(near):.1f}"))
    table = tabulate(("predicted from", "cosine", "among the ten nearest, %"), rows)
    return (
        f"The text tower's targets: the features of {len(known):,} published names, a tenth left "
        "out at a time and predicted from the others with WordNet. The features of "
        f"{sum(1 for _ in wordnet.things()):,} more names are predicted in the same way.\n\n{table}"
    )
