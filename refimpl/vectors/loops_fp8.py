"""FP8 by enumeration: every E4M3 number in turn, scales as fractions (R 3.3.1, 3.3.2)."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.fp8 import Fp8
from refimpl.layers.fp8_parts import CODES, SCALE

TILE = 128
_POSITIVE = [
    (m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
    for e in range(16)
    for m in range(8)
    if (e, m) != (15, 7)
]
"""By code: 4 bits of exponent, 3 of mantissa; the last is NaN."""
LARGEST = 448.0


def nearest(x: float, s: float = 1.0) -> float:
    """The E4M3 number nearest to x / s, of two as near the one with the even code; beyond 448 it is 448. The quotient is never
    formed: x is held against the middle of two numbers times s, which float64 has exactly for x and s of float32.
    """
    size, last = abs(x), len(_POSITIVE) - 1
    code = max(bisect(_POSITIVE, size / s) - 2, 0)
    while code < last:
        middle = (_POSITIVE[code] + _POSITIVE[code + 1]) / 2 * s
        if size < middle or (size == middle and code % 2 == 0):
            break
        code += 1
    return math.copysign(_POSITIVE[code], x)


def scales(x: Array, *, how: Fp8, lead: int) -> Array:
    """max(amax, 1e-4) / 448 of every 128 numbers, or the power of two above."""
    rows = np.asarray(x, np.float64).reshape(*x.shape[:lead], -1)
    found = []
    for row in rows.reshape(-1, rows.shape[-1]).tolist():
        tiles = [row[at : at + TILE] for at in range(0, len(row), TILE)]
        found.append([_scale(max(map(abs, tile)), how) for tile in tiles])
    return np.array(found).reshape(*rows.shape[:-1], -1)


def _scale(amax: float, how: Fp8) -> float:
    s = Fraction(max(amax, how.inputs.clamp or 0.0) or LARGEST) / Fraction(LARGEST)
    if not how.inputs.power_of_two:
        return float(s)
    power = Fraction(1)
    while power < s:
        power *= 2
    while power / 2 >= s:
        power /= 2
    return float(power)


def codes(x: Array, s: Array, *, how: Fp8, lead: int) -> Array:
    """The number nearest to x / s, each by itself."""
    rows = np.asarray(x, np.float64).reshape(*x.shape[:lead], -1)
    flat, by = rows.reshape(-1, rows.shape[-1]).tolist(), s.reshape(-1, s.shape[-1]).tolist()
    found = [[nearest(v, b[i // TILE]) for i, v in enumerate(row)] for row, b in zip(flat, by, strict=True)]
    return np.array(found).reshape(x.shape)


PARTS: Mapping[str, Callable[..., Array]] = {SCALE: scales, CODES: codes}
"""Stage -> the same by enumeration."""


def weight(w: Array) -> Array:
    """A weight through E4M3 and back: of every 128 x 128 the scale amax / 448 and the quotients in float32."""
    y = np.empty(w.shape)
    for i in range(0, w.shape[0], TILE):
        for j in range(0, w.shape[1], TILE):
            block = np.asarray(w[i : i + TILE, j : j + TILE], np.float32)
            s = np.float32(float(np.abs(block).max()) or LARGEST) / np.float32(LARGEST)
            through = [nearest(float(v / s)) * float(s) for v in block.reshape(-1)]
            y[i : i + TILE, j : j + TILE] = np.array(through).reshape(block.shape)
    return y


def as_numbers(given: list[Any], settings: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Codes, scales and the further arguments of a product as those of the product itself: what the codes stand for, matrices
    through E4M3.
    """
    q, s, rest = given
    lead = settings["lead"]
    rows = np.asarray(q, np.float64).reshape(*q.shape[:lead], -1)
    spread = np.repeat(s.astype(np.float64), TILE, axis=-1)[..., : rows.shape[-1]]
    others = [weight(a) if getattr(a, "ndim", 0) == 2 and a.dtype.kind == "f" else a for a in rest]
    if rest and getattr(rest[0], "dtype", np.dtype(float)).kind == "i":  # of experts: ids, then all matrices
        others = [others[0], others[1:]]
    return [(rows * spread).reshape(q.shape), *others], {k: v for k, v in settings.items() if k not in ("how", "lead")}
