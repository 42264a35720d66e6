"""Known mistakes that reproduce the same taps: which of them the candidate made, or that this case cannot tell.

All are within what the taps are allowed, which is more than roundings do to all of a tap at once. On the line from what one
mistake gives, a, to what another gives, b, the candidate x lies at t = <x - a, b - a> / |b - a|^2: at 0 if it made the one, at 1 if
it made the other. Roundings know nothing of b - a: they move t by about |x - a - t (b - a)| / (sqrt(N) |b - a|). Rows count
alike: each is divided by its size.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np

from refimpl.autograd.tensor import Array

ERRORS = 3.0
"""Standard errors by which the candidate must be on one's side."""
SIDE = 1 / 3
"""One's side is the third of the line that is next to it: what lies about half-way is neither."""
EQUAL = 1e-12
"""Of a row's size: mistakes that differ by less than this, in float64, compute the same numbers."""
Taps = list[Array]
"""What one mistake gives for every tap, or what the candidate has."""


def nearest(x: Taps, rivals: list[Taps]) -> tuple[list[int], bool]:
    """Which rivals no other is surely nearer than, and whether these give the same numbers."""
    lines = {(i, j): _line(x, rivals[i], rivals[j]) for i, j in permutations(range(len(rivals)), 2)}
    beaten = {j for (_, j), (_, nearer) in lines.items() if nearer}
    left = [i for i in range(len(rivals)) if i not in beaten] or list(range(len(rivals)))
    return left, all(lines[pair][0] for pair in permutations(left, 2))


def _line(x: Taps, a: Taps, b: Taps) -> tuple[bool, bool]:
    """Whether a and b are the same numbers, and whether x is surely nearer to a."""
    parts = [_rows(*arrays) for arrays in zip(x, a, b, strict=True)]
    d, e = (np.concatenate([part[i] for part in parts]) if parts else np.zeros(0) for i in range(2))
    apart = np.abs(e) > EQUAL
    if not apart.any():
        return True, False
    d, e = d[apart], e[apart]
    t = float(d @ e) / float(e @ e)
    rest = d - t * e
    return False, t + ERRORS * float(np.linalg.norm(rest) / np.linalg.norm(e)) / len(d) ** 0.5 < SIDE


def _rows(x: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """x - a and b - a, each row over the larger norm of a's and b's, flat; rows without a size or a number are left out."""
    x, a, b = (np.atleast_1d(np.asarray(y, np.float64)) for y in (x, a, b))
    size = np.maximum(*(np.linalg.norm(y, axis=-1, keepdims=True) for y in (a, b)))
    rows = np.isfinite(x).all(-1) & np.isfinite(size[..., 0]) & (size[..., 0] > 0)
    x, a, b = (y[rows] / size[rows] for y in (x, a, b))
    return (x - a).ravel(), (b - a).ravel()
