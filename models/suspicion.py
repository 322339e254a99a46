"""How much an answer smells of an attack, from what the passes computed anyway."""

from torch import Tensor


def suspicion(undefended: Tensor, views: Tensor) -> Tensor:
    """Total variation distance [...], in [0, 1], between the undefended prediction and the mean
    over views.

    An attack is fitted to the picture as it is; crops and flips mostly undo it, so that the
    picture and its views disagree. A hint, never a guarantee: an attacker who knows the views can
    make both agree.

    Args:
        undefended: probabilities [..., C] of the picture itself without any defense.
        views: probabilities [..., V, C] of its views.
    """
    return 0.5 * (undefended - views.mean(dim=-2)).abs().sum(dim=-1)
