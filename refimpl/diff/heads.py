"""Taps of some heads only, as one rank of a tensor parallel engine has them: which heads they are is told by value.

All taps are asked together. Heads are told by the angle to what our own stages give on the candidate's other taps, which neither
drift nor a wrong factor turns; what they hold is then judged as if they had been declared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.stage import Call

from .dims import Sizes, shape_of
from .fused import ANGLE, replayed
from .gauges import ROPE_TAPS, swap_pairs
from .lanes import Recorded
from .reading import cut
from .ways import Way, ways

Some = Mapping[str, tuple[Array, int, Sequence[Way]]]
"""Tap -> what was recorded of it, which of our axes is that of heads, and how it may lie."""


def of_some_heads(
    taps: Mapping[str, Array], flawed: Collection[str], program: list[Call], c: Config, sizes: Sizes
) -> Sequence[Some]:
    """The taps whose shape is not ours and that may hold so many heads, for every number of these; of most taps first."""
    found: dict[int, dict[str, tuple[Array, int, Sequence[Way]]]] = {}
    for call in [call for call in program if call.tap in flawed and call.own is None]:
        axes, shape, x = call.of.shape.split(), shape_of(call, c, sizes), np.asarray(taps[call.tap])
        if axes.count("H") == 1 and x.dtype.kind not in "iub" and x.size:
            at = axes.index("H")
            for n, some in _ways(x, shape, axes, at).items():
                found.setdefault(n, {})[call.tap] = x, at, some
    return sorted(found.values(), key=lambda some: -len(some))


def _ways(x: Array, shape: tuple[int, ...], axes: list[str], at: int) -> dict[int, Sequence[Way]]:
    """How many heads -> how the array may lie then, if that is all that is odd; else of as many as divide all too."""
    exact, rest = x.size * shape[at] // int(np.prod(shape)), int(np.prod(shape)) // shape[at]
    few = [exact] if 0 < exact < shape[at] and x.size == exact * rest else []
    divisors = [n for n in range(1, shape[at]) if shape[at] % n == 0]
    for numbers, whole in ((few, True), (dict.fromkeys([*few, *divisors]), False)):
        found = {n: ways(x.shape, (*shape[:at], n, *shape[at + 1 :]), axes) for n in numbers}
        some = {n: [w for w in those if not (whole and (w.changed or w.turned))] for n, those in found.items()}
        if any(some.values()):
            return {n: those for n, those in some.items() if those}
    return {}


def which_heads(some: Some, program: list[Call], r: Recorded) -> list[int] | None:
    """The heads that all these taps hold, each another one; None if they are no heads of ours."""
    angles = [_in_best_way(*some[tap], ours, tap) for tap, ours in replayed(program, r, some)]
    told = _nearest(np.mean(angles, axis=0))  # (heads recorded, heads)
    if told is None:  # a tap that holds a mistake is near none
        votes = Counter([tuple(one) for a in angles if (one := _nearest(a))]).most_common(2)
        told = list(votes[0][0]) if votes and votes[0][1] > sum(n for _, n in votes[1:]) else None
    return told


def _in_best_way(x: Array, at: int, some: Sequence[Way], ours: Array, tap: str) -> Array:
    """The angles in the way in which heads are nearest to some of ours."""
    found = [_angles(way.of(x), at, cut(ours, way.pick), tap) for way in some]
    return min(found, key=lambda angles: float(angles.min(axis=1).mean()))


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
