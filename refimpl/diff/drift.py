"""How far a candidate's tap is from our own run's, drift and all: what comparing two recordings shows."""

from __future__ import annotations

import math

import numpy as np

from refimpl.autograd.tensor import Array

from .tolerance import BLOCK
from .wide import MASKED, Wide, paired

SOME = 8
"""Of what is made a block of queries at a time (`wide`), one block of so many is compared: nothing is judged by it."""


def drift(x: Array | Wide, ours: Array | Wide) -> float:
    """|x - ours| / |ours| of the whole tap, or of some of its blocks; infinite if they are of other shapes."""
    if x.shape != ours.shape:
        return math.inf
    room = np.empty(BLOCK, np.float32)  # fresh memory costs more than a difference does
    found = np.zeros(2)
    for _, theirs, mine in paired(x, ours, SOME):
        a, b = np.asarray(theirs).reshape(-1), np.asarray(mine).reshape(-1)
        for at in range(0, len(a), BLOCK):
            found += _squares(a[at : at + BLOCK], b[at : at + BLOCK], room)
    return math.sqrt(found[0]) / max(math.sqrt(found[1]), 1e-300)


def _squares(x: Array, y: Array, room: Array) -> tuple[float, float]:
    """|x - y|^2 and |y|^2, what is masked or no number in either as 0."""
    a, b = (w.astype(np.float32, copy=False) for w in (x, y))
    d = room[: len(a)]
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(a, b, out=d)
        away, own = float(d @ d), float(b @ b)
        if not max(away, own) < (MASKED / 2) ** 2:  # else neither holds such a thing
            a, b = _shown(a), _shown(b)
            away, own = float(np.vecdot(a - b, a - b)), float(np.vecdot(b, b))
    return away, own


def _shown(a: Array) -> Array:
    """As it is, what is masked or no number as 0."""
    return np.where(np.isfinite(a) & (a > MASKED), a, 0)
