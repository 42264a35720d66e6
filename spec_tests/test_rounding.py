"""bfloat16 rounding, over every upper half of a float32 there is."""

import ml_dtypes
import numpy as np
import pytest

from refimpl.layers.numerics.rounding import to_bf16

UPPER = np.arange(2**16, dtype=np.uint32) << 16
# what is cut off: nothing, just above it, around one half, all ones
LOWER = [0x0000, 0x0001, 0x4000, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFF]


@pytest.mark.parametrize("lower", LOWER, ids=hex)
def test_every_pattern_rounds_as_ml_dtypes_does(lower):
    """Catches truncation, ties away from zero, a NaN that becomes an infinity, flushed subnormals,
    the largest float that must round to infinity."""
    x = (UPPER | np.uint32(lower)).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
        ours = to_bf16(x)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(ours.view(np.uint32)[number], expected.view(np.uint32)[number])
    assert np.isnan(ours[~number]).all()
    assert not (ours.view(np.uint32) & 0xFFFF).any()


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
    assert to_bf16(np.float64([1.0 + 2**-9])).dtype == np.float32
