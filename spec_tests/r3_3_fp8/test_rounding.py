"""bfloat16 rounding, over every upper half of a float32 there is: by ml_dtypes, and by bits for arrays of other kinds."""

import ml_dtypes
import numpy as np
import pytest

from refimpl.layers.numerics.formats import to_bf16
from refimpl.spec_tests.cases.duck import Duck

UPPER = np.arange(2**16, dtype=np.uint32) << 16
# what is cut off: nothing, just above it, around one half, all ones
LOWER = [0x0000, 0x0001, 0x4000, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFF]
KINDS = {"NumPy": to_bf16, "device": lambda x: to_bf16(Duck(x)).get()}


def by_definition(x):
    """The nearer of the two bfloat16 neighbours, the even one of two equally near; exact in float64. x finite."""
    magnitude = np.abs(x).astype(np.float64)
    toward_zero = magnitude.astype(np.float32)
    toward_zero = np.where(toward_zero > magnitude, np.nextafter(toward_zero, np.float32(0)), toward_zero)
    below = toward_zero.view(np.uint32) & np.uint32(0xFFFF0000)
    low, high = (_value(below + np.uint32(step)) for step in (0, 0x10000))
    odd = (below >> 16) & 1 == 1
    up = (magnitude - low > high - magnitude) | ((magnitude - low == high - magnitude) & odd)
    with np.errstate(over="ignore"):  # 2^128 is infinity in float32
        return np.copysign(np.where(up, high, low).astype(np.float32), x.astype(np.float32))


def _value(bits):
    """Positive float32 patterns as float64, the first one beyond the finite ones as 2^128."""
    return np.where(bits == 0x7F800000, 2.0**128, bits.view(np.float32).astype(np.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lower", LOWER, ids=hex)
def test_every_pattern_goes_to_the_nearest(lower, kind):
    """Catches truncation, ties away from zero, a NaN that becomes an infinity, flushed subnormals,
    the largest float that must round to infinity."""
    x = (UPPER | np.uint32(lower)).view(np.float32)
    ours, finite = KINDS[kind](x), np.isfinite(x)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours[finite].view(np.uint32), by_definition(x[finite]).view(np.uint32))
    np.testing.assert_array_equal(ours[np.isinf(x)], x[np.isinf(x)])
    assert np.isnan(ours[np.isnan(x)]).all()
    assert not (ours.view(np.uint32) & 0xFFFF).any()


def test_the_definition_is_that_of_ml_dtypes():
    """Catches an oracle of our own making."""
    x = (UPPER[:, None] | np.array(LOWER, np.uint32)).reshape(-1).view(np.float32)
    x = x[np.isfinite(x)]
    np.testing.assert_array_equal(by_definition(x), x.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_rounded_once(kind):
    """Catches float64 -> float32 -> bfloat16: 1 + 2^-8 + 2^-40 becomes the tie 1 + 2^-8 and falls."""
    near_ties = 1 + 2.0**-8 * np.arange(1, 64) + np.array([[-1], [0], [1]]) * 2.0**-40
    x = (near_ties[..., None] * 2.0 ** np.array([-100, 0, 100]) * np.array([[[1]], [[-1]]])[..., None]).reshape(-1)
    np.testing.assert_array_equal(KINDS[kind](x), by_definition(x))


def test_rounding_twice_is_rounding_once():
    """Catches a rounding that moves values that are representable already."""
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    once = to_bf16(x)
    np.testing.assert_array_equal(to_bf16(once), once)
    assert np.abs(once / x - 1).max() <= 2.0**-8  # half a unit in the last of 8 places


def test_the_input_is_left_alone_and_any_shape_goes():
    """Catches rounding in place, and a view that needs contiguous memory."""
    x = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    before = x.copy()
    np.testing.assert_array_equal(to_bf16(x.T), to_bf16(x).T)
    np.testing.assert_array_equal(x, before)
