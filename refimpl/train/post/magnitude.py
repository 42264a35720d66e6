"""Magnitude pruning (Han et al. 2015, arXiv 1506.02626): the smallest weights of every matrix are 0 and stay 0. Described in
articles, not in V3.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array

LINEAR = "*_proj*.weight"
"""The linear layers: not embedding, head, norms, router."""


def mask(w: Array, share: float) -> Array:
    """0 on the floor(share x size) entries with the smallest |w|, of equal ones the first, else 1.  w (F, D) -> (F, D)."""
    require(0 <= share <= 1, f"share is {share}; expected 0..1")
    keep = np.ones(w.size, w.dtype)
    keep[np.argsort(np.abs(w), axis=None, kind="stable")[: int(share * w.size)]] = 0
    return keep.reshape(w.shape)


def masks(weights: Mapping[str, Array], share: float, *, pattern: str = LINEAR) -> dict[str, Array]:
    """A mask for every weight whose checkpoint name fits."""
    found = {n: mask(w, share) for n, w in weights.items() if fnmatchcase(n, pattern)}
    require(found, f"no weight's name fits {pattern!r}")
    return found


def masked(weights: Mapping[str, Any], masks: Mapping[str, Array]) -> dict[str, Any]:
    """w m, also of leaves: then what is 0 gets no gradient.  -> all weights by name."""
    odd = sorted(set(masks) - set(weights))
    require(not odd, f"masks for weights that are not there: {odd[:3]}")
    return dict(weights) | {n: weights[n] * m for n, m in masks.items()}
