"""Every defense by its name; all share the signature `defense.Defense`."""

from models.defenses import ensemble, plain, tapt
from models.defenses.defense import Defense

DEFENSES: dict[str, Defense] = {
    "plain": plain.defend,
    "ensemble": ensemble.defend,
    "tapt": tapt.defend,
}
