"""The diff's rules of FP8 by themselves: which codes and scales are right, and which are those of a known mistake."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from refimpl.diff.fp8_rules import QUOTIENT, Tiles, alike, fits
from refimpl.layers.fp8 import EXACT, POWER_OF_TWO, Fp8
from refimpl.layers.fp8_parts import CODES, SCALE


def e4m3(v):
    return np.asarray(v, np.float32).astype(ml_dtypes.float8_e4m3fn).astype(float)


def test_codes_of_a_scale_that_is_a_power_of_two_are_one():
    """Catches a code beside the right one let pass, or a right one refused. Oracle: every E4M3 number against the nearest, in
    fractions.
    """
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(float)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    rng = np.random.default_rng(0)
    for v in [*rng.uniform(-400, 400, 40), *numbers[::9], *(numbers[:-1:9] + numbers[1::9]) / 2, 1e-9, 463.0]:
        row = np.full((1, len(numbers)), v)
        for s, by in ((0.25, 0), (0.3, Fraction(QUOTIENT))):
            t = Tiles(row * s, np.full((1, 2), abs(v) * s), 0.0, np.ones((1, 2), bool), Fp8(inputs=EXACT))
            found = fits(t, np.full((1, 2), s), numbers[None])[0]
            exact = Fraction(float(v * s)) / Fraction(s)
            ends = [e4m3(min(max(float(exact * (1 + side * by)), -448.0), 448.0)) for side in (-1, 1)]
            assert numbers[found].tolist() == [n for n in numbers if min(ends) <= n <= max(ends)], (v, s)


def test_a_known_mistake_of_codes_may_differ_in_few():
    """Catches codes that are next to a mistake's everywhere called that mistake; one wrong scale let pass."""
    ours = e4m3(np.linspace(1, 400, 640))
    beside = e4m3(ours * 1.07)  # one code further up, or none
    for n, same in ((0, True), (10, True), (11, False), (640, False)):
        x = ours.copy()
        moved = np.flatnonzero(beside != ours)[:n]
        x[moved] = beside[moved]
        assert alike(CODES, x, ours) == same
    far = ours.copy()
    far[3] *= 2
    assert not alike(CODES, far, ours)
    holes = np.where(np.arange(640) == 5, np.nan, ours)
    assert alike(CODES, holes, holes) and not alike(CODES, holes, ours) and not alike(CODES, ours, holes)
    s = np.linspace(0.1, 3, 50)
    assert alike(SCALE, s * (1 + 2.0**-23), s) and not alike(SCALE, np.where(np.arange(50) == 7, s * 1.01, s), s)
    assert not alike(SCALE, s * (1 + 2.0**-21), s)


@pytest.mark.parametrize("power", [False, True])
def test_scales_are_right_by_their_tiles_largest(power):
    """Catches a power of two that is no power of two, one too small, the floor forgotten or always demanded, a tile of zeros."""
    how, amax = Fp8(inputs=POWER_OF_TWO if power else EXACT), np.array([[400.0, 3.0, 1e-6, 0.0, np.inf]])
    t = Tiles(np.zeros((1, 640)), amax, 0.0, np.ones((1, 5), bool), how)
    exact, floored = amax / 448, np.maximum(amax, 1e-4) / 448
    if power:
        exact, floored = (2.0 ** np.ceil(np.log2(np.where(np.isfinite(a) & (a > 0), a, 1))) for a in (exact, floored))
    for s in (exact, floored):
        assert t.right(np.where(amax == 0, 1.0, s)).all()
    for by in (0.5, 1.001, 1.5, 2.0):
        assert t.right(exact * by).tolist() == [[False, False, False, True, True]], by
    assert t.right(np.array([[1, 3 / 448, 1, np.nan, np.nan]])).tolist()[0][3:] == [False, True]
    assert not t.right(np.full((1, 5), -1.0))[0, 3]
