"""Residuals named by the layer that reads them, not the one that gives them: layer 0's is the embedding then.

Lists of hidden states begin with the embedding; their entry i is the input of layer i, not its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from refimpl.autograd.tensor import Array

from .reading import cut, readings

LATE = "residuals are named one layer late, L0/resid holds the embedding: read as the layer before's"


def unshifted(
    taps: Mapping[str, Array], layers: int, phase: str, embedded: Array
) -> tuple[Mapping[str, Array], dict[str, str] | None]:
    """The taps with residuals of a phase named by the layers that give them, and name in the trace -> the tap it is; None if they
    are named so. embedded (B, S, D).
    """
    first = taps.get(f"{phase}/L0/resid")
    if first is None or first.dtype.kind in "iub" or not _holds(np.asarray(first), embedded):
        return taps, None
    late = [f"{phase}/L{i}/resid" for i in range(layers + 1)]
    named = {after: before for before, after in pairwise(late) if after in taps}
    return {t: x for t, x in taps.items() if t not in late} | {named[t]: taps[t] for t in named}, named


def _holds(x: Array, embedded: Array) -> bool:
    """Whether an array is the embedding (B, S, D), in some arrangement, or of some tokens."""
    for one in readings(x, embedded.shape, ["B", "S", "D"], guess=True):
        a, b = one.array.astype(np.float64), cut(embedded, one.pick).astype(np.float64)
        if np.linalg.norm(a - b) < 2.0**-7 * np.linalg.norm(b):
            return True
    return False
