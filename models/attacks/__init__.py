"""Adversarial attacks within an L-infinity ball, by name."""

from models.attacks.apgd import apgd
from models.attacks.attack import Attack
from models.attacks.autoattack import autoattack
from models.attacks.pgd import pgd
from models.attacks.rays import rays
from models.attacks.square import square
from models.attacks.strong import STRONG

ATTACKS: dict[str, Attack] = {
    "pgd": pgd,
    "apgd": apgd,
    "square": square,
    "rays": rays,
    "autoattack": autoattack,
    **{name: part.attack for name, part in STRONG.items()},
}
