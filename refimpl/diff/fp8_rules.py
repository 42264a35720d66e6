"""How recorded scales and codes are judged: exactly, where what they are rounded from leaves no choice.

A scale and a code are monotone functions of a number that is known up to a few roundings. So a value is right if it lies between
the function's values at both ends of that interval: most often they are the same, and then it is exact.

* Scale: amax / 448, up to QUOTIENT: a division, or a product with a rounded 1/448, or a GPU's approximate division. A power of two
  is the one above; where amax / 448 is a power of two to rounding, the next one is right too. The floor 1e-4 under amax is
  optional. Of a tile of zeros every finite scale is right, as its codes are 0.
* Code: the E4M3 number nearest to x / s, up to QUOTIENT; by a power of two every way to divide is exact, so there every code is,
  and a tie goes to the even one.
* Where x was not recorded it is known as well as the twins agree on it. If that is worse than a code's own rounding (another FP8
  product lies between), single codes say nothing: then q s is held to x, a tile by its norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.fp8 import Fp8
from refimpl.layers.fp8_parts import CODES, SCALE, TILE, exact_scales, quotient, rows_of, spread, tiles_of, to_e4m3
from refimpl.layers.numerics.formats import E4M3

from .reading import Pick, cut
from .replay import Step
from .tolerance import FACTOR

QUOTIENT = 2.0**-22
"""Four units of float32: x / s makes one, x (1 / s) two, x (448 / amax) three beside a rounded s, div.full.f32 four (2 ulp)."""
BEYOND = 464.0
"""From here on x / s rounds beyond 448: saturated, or NaN in a cast that does not saturate."""
ALIKE = 1 / 64
"""Share of the codes that may be next to those of a known mistake that is to be named."""
COARSE = 2.0**-4
"""The largest rounding of a code, relative."""
RULES = {
    SCALE: "exact, up to 4 roundings of amax / 448",
    CODES: "exact, up to 4 roundings of x / s at the boundary between two codes",
}


@dataclass(frozen=True)
class Fit:
    """Which scales or codes are right, and how far the worst of the others is beyond what it may be."""

    right: Array
    error: float
    note: str


@dataclass(frozen=True)
class Tiles:
    """The input of a product in tiles: rows (..., K), amax (..., G); how far it may be another (relative), 0 if it was recorded;
    which tiles count.
    """

    rows: Array
    amax: Array
    doubt: float
    sure: Array
    how: Fp8

    def ends(self, extra: float = 0.0) -> Iterator[tuple[Array, Array]]:
        """The smallest and the largest right scale of every tile, with a floor under amax and without."""
        by = QUOTIENT + self.doubt + extra
        for floor in dict.fromkeys([self.how.inputs.clamp, None]):
            low, high = (exact_scales(self.amax, self.how.inputs, floor, side) for side in (1 - by, 1 + by))
            yield low, high

    def right(self, s: Array) -> Array:
        """Which scales are right."""
        within = np.zeros(s.shape, bool)
        for low, high in self.ends():
            within |= (low <= s) & (s <= high)
        if self.how.inputs.power_of_two:
            within &= np.frexp(s)[0] == 0.5
        zero = (self.amax == 0) & np.isfinite(s) & (s >= 0)
        return within | zero | ~np.isfinite(self.amax)

    def close(self, s: Array, q: Array) -> Array:
        """Which tiles of q s are as near to x, by their norm, as x is known."""
        away = tiles_of(q * spread(s, q.shape[-1]) - self.rows)
        limit = (self.doubt + COARSE) * np.linalg.norm(tiles_of(self.rows), axis=-1)
        return np.linalg.norm(away, axis=-1) <= limit

    def unsure(self, s: Array, width: int) -> Array:
        """How far x / s may be off (..., K) because x was computed: a share of itself, or of what is usual in its tile."""
        if not self.doubt:
            return np.zeros(self.rows.shape)
        tiled = tiles_of(self.rows)
        filled = np.minimum(TILE, width - TILE * np.arange(tiled.shape[-2]))
        usual = np.linalg.norm(tiled, axis=-1) / np.sqrt(filled)
        return self.doubt * np.maximum(np.abs(self.rows), spread(usual, width)) / np.abs(spread(s, width))


def tiles(step: Step, pick: Pick, settled: Array | None, computed: bool) -> Tiles:
    """What the call reads, and how far the twins are apart on it if it was `computed`."""
    lead, how = step.call.static["lead"], step.call.static["how"]
    given = [
        tiles_of(rows_of(cut(np.asarray(x, np.float64), pick), lead)) for x, *_ in (step.inputs() if computed else ())
    ]
    rows = rows_of(cut(np.asarray(next(step.inputs())[0], np.float64), pick), lead)
    tiled = tiles_of(rows)
    size, sure = np.linalg.norm(tiled, axis=-1), np.ones(tiled.shape[:-1], bool)
    if settled is not None:
        sure &= settled.reshape(*sure.shape[:-1], -1).all(axis=-1)[..., None]
    known = sure & np.isfinite(size) & (size > 0)
    away = [np.linalg.norm(x - tiled, axis=-1)[known] / size[known] for x in given]
    doubt = max([float(np.nan_to_num(a, nan=np.inf).max(initial=0)) for a in away], default=0.0)
    return Tiles(rows, np.abs(tiled).max(axis=-1), FACTOR * doubt, sure, how)


def fit(step: Step, x: Array, pick: Pick, stages: tuple[str, ...], settled: Array | None) -> Fit | None:
    """The scales or codes x of a call whose region holds these stages; only settled rows (all axes but the last) count. None if
    only parts of tiles were recorded.
    """
    lead = step.call.static["lead"]
    if any(axis >= lead for axis in pick):
        return None
    t = tiles(step, pick, settled, bool(set(stages) - {SCALE, CODES}))
    x = np.asarray(x, np.float64)
    if step.call.stage == SCALE:
        return _scales(t, x, cut(step.exact, pick))
    s = cut(np.asarray(next(step.inputs())[1], np.float64), pick)
    return _codes(t, s, rows_of(x, lead), SCALE in stages)


def _scales(t: Tiles, s: Array, e: Array) -> Fit:
    right = t.right(s) | ~t.sure
    if right.all():
        return Fit(right, 0.0, "")
    off = np.abs(s / e - 1)[~right]
    return Fit(right, float(np.where(np.isfinite(off), off, np.inf).max()), _said(right, "scales", s, e))


def _codes(t: Tiles, s: Array, q: Array, computed: bool) -> Fit:
    """By the scale that was given; where that is itself wrong, or was not recorded, by any right one too."""
    right, whole = fits(t, s, q), ~t.sure
    other = ~t.right(s) | computed
    if other.any():
        for own in (end for ends in t.ends(QUOTIENT) for end in ends):
            whole |= other & ~tiles_of(~fits(t, own, q, QUOTIENT)).any(axis=-1)
    right |= spread(whole, q.shape[-1])
    if right.all():
        return Fit(right, 0.0, "")
    e = to_e4m3(quotient(t.rows, spread(s, q.shape[-1])))
    return Fit(right, float(1 - right.mean()), _said(right, "codes", q, e))


def fits(t: Tiles, s: Array, q: Array, extra: float = 0.0) -> Array:
    """Which codes (as numbers) are those of x / s, s a number a tile."""
    width = q.shape[-1]
    if t.doubt > COARSE:
        return spread(t.close(s, q) | ~np.isfinite(t.amax), width)
    v = quotient(t.rows, spread(s, width))
    inexact = np.where(np.frexp(s)[0] == 0.5, 0.0, QUOTIENT + extra)
    by = np.abs(v) * spread(inexact, width) + t.unsure(s, width)
    low, high = to_e4m3(v - by), to_e4m3(v + by)
    within = (low <= q) & (q <= high)
    return within | (np.isnan(q) & (np.abs(v) + by >= BEYOND)) | spread(~np.isfinite(t.amax), width)


def _said(right: Array, what: str, x: Array, e: Array) -> str:
    at = tuple(np.argwhere(~right)[0].tolist())
    wrong = int((~right).sum())
    return f"{wrong} of {right.size} {what} differ, the first at {list(at)}: {float(x[at]):.6g}, expected {float(e[at]):.6g}"


def alike(stage: str, x: Array, ours: Array) -> bool:
    """Whether scales or codes are those that a known mistake gives, to rounding."""
    with np.errstate(all="ignore"):
        same = (x == ours) | (np.isnan(x) & np.isnan(ours)) | (np.abs(x - ours) <= QUOTIENT * np.abs(ours))
        if stage == SCALE:
            return bool(same.all())
        near = np.abs(x - ours) <= np.maximum(np.abs(ours) / 8, E4M3.tiny)
        return bool((same | near).all()) and float(1 - same.mean()) <= ALIKE
