"""Taps of some heads only, as one rank of a tensor parallel engine has them: which heads they are is told by value.

All taps are asked together. Heads are told by the angle to what our own stages give on the candidate's other taps, which neither
drift nor a wrong factor turns; what they hold is then judged as if they had been declared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.stage import Call

from .dims import Sizes, shape_of
from .fused import ANGLE, replayed
from .gauges import ROPE_TAPS, swap_pairs
from .lanes import Recorded
from .reading import read

Some = Mapping[str, tuple[Array, int]]
"""Tap -> what was recorded of it, in our axes, and which axis is that of heads."""


def of_some_heads(
    taps: Mapping[str, Array], flawed: Collection[str], program: list[Call], c: Config, sizes: Sizes
) -> Mapping[int, Some]:
    """How many heads -> the taps that have so many, of those whose shape is not ours."""
    found: dict[int, dict[str, tuple[Array, int]]] = {}
    for call in [call for call in program if call.tap in flawed and call.own is None]:
        axes, shape, x = call.of.shape.split(), shape_of(call, c, sizes), np.asarray(taps[call.tap])
        if axes.count("H") != 1 or x.dtype.kind in "iub":
            continue
        at = axes.index("H")
        n, rest = x.size * shape[at] // int(np.prod(shape)), shape[:at] + shape[at + 1 :]
        if 0 < n < shape[at] and x.size == n * int(np.prod(rest)):
            reading = read(x, (*shape[:at], n, *shape[at + 1 :]), axes)
            if reading and not reading.pick:
                found.setdefault(n, {})[call.tap] = reading.array, at
    return found


def which_heads(some: Some, program: list[Call], r: Recorded) -> list[int] | None:
    """The heads that all these taps hold, each another one; None if they are no heads of ours."""
    angles = [_angles(*some[tap], ours, tap) for tap, ours in replayed(program, r, some)]
    told = _nearest(np.mean(angles, axis=0))  # (heads recorded, heads)
    if told is None:  # a tap that holds a mistake is near none
        votes = Counter([tuple(one) for a in angles if (one := _nearest(a))]).most_common(2)
        told = list(votes[0][0]) if votes and votes[0][1] > sum(n for _, n in votes[1:]) else None
    return told


def _nearest(angles: Array) -> list[int] | None:
    """The head that every recorded one is, each another one; None if one is near none."""
    found: list[int] = angles.argmin(axis=1).tolist()
    near = bool((angles.min(axis=1) < ANGLE).all())
    return found if near and len(set(found)) == len(found) else None


def _angles(x: Array, at: int, ours: Array, tap: str) -> Array:
    """The sine of the angle from every recorded head (rows) to each of ours; 1 beyond a right angle, or where one is 0."""
    a, b = (np.moveaxis(np.asarray(y, np.float32), at, 0) for y in (x, ours))
    either = tap.rpartition("/")[2] in ROPE_TAPS  # rotated channels may lie in either order
    orders = [b, *[swap_pairs(b, to_interleaved=way) for way in (True, False)]] if either else [b]
    return np.min([_sines(a.reshape(len(a), -1), y.reshape(len(y), -1)) for y in orders], axis=0)


def _sines(a: Array, b: Array) -> Array:
    """Of rows with rows, over the numbers that none of them masks.  a (n, M), b (H, M) -> (n, H)."""
    seen = np.isfinite(a).all(axis=0) & np.isfinite(b).all(axis=0)
    a, b = (y[:, seen] / np.maximum(np.linalg.norm(y[:, seen], axis=1, keepdims=True), 1e-30) for y in (a, b))
    cosine = np.clip(a @ b.T, 0, 1)
    return np.sqrt(1 - cosine * cosine)
