"""How far shown log-probabilities are from ours, over places: row, position -> numbers of the same ids on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.tensor import Array

from .shown import Entry, Place

LOWEST = -1e4
"""What engines write for -inf, and below."""
_FEW = 16
"""Shown numbers below which roundings need not cancel."""
_DECIMALS = range(1, 9)


@dataclass(frozen=True)
class Distances:
    """Of the engine, or of a twin, over places: the worst rms and the largest |difference| of a log-probability, the mean KL(ours,
    theirs) over what was shown and all else as one, how much all is scaled, and by how much that is a chance's: what the places
    add to the scale, as if each had a sign of its own.
    """

    rms: float
    largest: float
    kl: float
    scale: float
    chance: float


def pair(entry: Entry) -> tuple[Array, Array]:
    """Ids, ascending, and their log-probabilities.  -> (K), (K)."""
    ids = np.array(sorted(entry), np.intp)
    return ids, np.maximum([entry[int(i)] for i in ids], LOWEST)


def rms(x: Array) -> float:
    """The root mean square; 0 of nothing."""
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def step(shown: Sequence[Array]) -> float:
    """Half the last decimal that all numbers were printed with, 0 if that is more than can be told."""
    x = np.concatenate(shown) if shown else np.zeros(0)
    return next((0.5 * 10.0**-d for d in _DECIMALS if x.size >= _FEW and (np.round(x, d) == x).all()), 0.0)


def distances(x: Mapping[Place, Array], e: Mapping[Place, Array]) -> Distances:
    """Of x from e; 0 where there is no place. The scale is that of all places together, each less its mean."""
    if not e:
        return Distances(0.0, 0.0, 0.0, 0.0, 0.0)
    off = {p: x[p] - e[p] for p in e}
    centred = {p: e[p] - e[p].mean() for p in e}
    size = sum(float(c @ c) for c in centred.values())
    along = np.array([centred[p] @ off[p] for p in e])
    scaled = size > 0 and sum(c.size for c in centred.values()) >= _FEW
    return Distances(
        max(rms(d) for d in off.values()),
        max(float(np.abs(d).max()) for d in off.values()),
        float(np.mean([kl(e[p], x[p]) for p in e])),
        float(along.sum()) / size if scaled else 0.0,
        float(np.sqrt(along @ along)) / size if scaled else 0.0,
    )


def tempered(far: Mapping[Place, Array], e: Mapping[Place, Array], scale: float, allowed: float) -> bool:
    """Whether e (1 + scale) + c in every place, which a temperature of 1 / (1 + scale) gives, leaves what is allowed of `far`."""
    off = [far[p] - e[p] * scale for p in e]
    return scale > -1 and any(d.size > 2 for d in off) and all(rms(d - d.mean()) <= allowed for d in off)


def kl(e: Array, x: Array) -> float:
    """KL(ours, theirs) of the shown tokens and one more that stands for all others: a lower bound of the whole."""
    p, q = np.exp(e), np.exp(np.minimum(x, 0))
    rest_p, rest_q = (max(1.0 - float(r.sum()), 0.0) for r in (p, q))
    rest = rest_p * np.log(rest_p / max(rest_q, 1e-300)) if rest_p > 1e-12 else 0.0
    return max(float(p @ (e - x)) + float(rest), 0.0)
