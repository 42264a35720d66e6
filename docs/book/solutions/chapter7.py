"""Chapter 7: one way to do it."""

import math
from fractions import Fraction

import numpy as np


def value(code):
    """Three fields and two cases."""
    sign, field, fraction = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if field == 15 and fraction == 7:
        return math.nan
    return sign * (fraction / 8 * 2.0**-6 if field == 0 else (1 + fraction / 8) * 2.0 ** (field - 7))


def quantise_tile(x):
    """Round to the nearest of the values, by the step at each size: there are 8 steps a doubling, none finer than 2^-9."""
    s = np.float32(max(np.abs(x).max(), np.float32(1e-4)) / np.float32(448))
    ratio = (x / s).astype(np.float64)
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(ratio), 2.0**-20))), -6)
    step = 2.0 ** (exponent - 3)
    return s, np.clip(np.round(ratio / step) * step, -448, 448).astype(np.float32)


def _cut(x, quantum):
    return math.trunc(x / quantum) * quantum


def _exponent(x):
    e = math.frexp(float(x))[1] - 1
    while Fraction(2) ** (e + 1) <= abs(x):
        e += 1
    while Fraction(2) ** e > abs(x):
        e -= 1
    return e


def hopper_step(products, exponents, c):
    """Align, truncate, add, write."""
    places = [e for p, e in zip(products, exponents, strict=True) if p] + ([_exponent(c)] if c else [])
    if not places:
        return Fraction(0)
    quantum = Fraction(2) ** (max(places) - 13)
    total = sum((_cut(Fraction(p), quantum) for p in [*products, c]), Fraction(0))
    return _cut(total, Fraction(2) ** (_exponent(total) - 13)) if total else total
