"""The mask by distance that article 4 prints as balancing near and far attention (section 1.1, code): 0 where pos_diff > 5, else 1.

It balances nothing, because it keeps one of the two: read as "1: attend", the near tokens; read as "1: hide", as torch's
attention layer reads a mask, the far ones, so that a token does not even see itself and the first six see nothing. Added to
scores, the third reading, it hides nothing at all. It knows no order: the distance, query minus key, is negative in the future,
which therefore counts as near. Here it works on top of V3's mask, which is causal; on a mask of zeros it is the printed one.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from refimpl.autograd.tensor import Array

from .marked import variant


def distances(mask: Array) -> Array:
    """Query minus key, in places of the sequence; the last query stands at the last key.  mask (B, 1, S, T) -> (S, T)."""
    s, t = mask.shape[-2:]
    places: Array = np.arange(t, like=mask)
    return places[t - s :, None] - places


@variant(
    "distance_mask",
    what="additive attention mask of near or of far tokens",
    claims="a4-03 a4-04",
    shape="B 1 S T",
    compare="exact",
)
def distance_mask(mask: Any, *, ones: Literal["attend", "hide"], beyond: int = 5) -> Array:
    """-inf where the printed mask, 0 if distance > `beyond` else 1, hides a key: its 0s if `ones` "attend", its 1s if they "hide".
    mask (B, 1, S, T) -> (B, 1, S, T).
    """
    printed = np.where(distances(mask) > beyond, 0, 1)
    return np.where(printed == (0 if ones == "attend" else 1), mask.dtype.type(-np.inf), mask)
