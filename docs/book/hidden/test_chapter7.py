"""Chapter 7's exercises, held against the formats, the quantiser and the tensor core of the specification."""

from fractions import Fraction

import numpy as np
import pytest

from refimpl.layers.numerics.formats import E4M3, decode
from refimpl.layers.numerics.quantisation import quantize
from refimpl.layers.numerics.tensor_cores import tensor_core_matmul


def test_value(mine):
    """Catches subnormals with a hidden one, a NaN that is 480, a sign that is lost at zero."""
    wanted = decode(np.arange(256, dtype=np.uint8), E4M3).astype(np.float64)
    found = np.array([mine.value(i) for i in range(256)])
    np.testing.assert_array_equal(found, wanted)
    assert np.signbit(found[0x80])


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_quantise_tile(mine, size):
    """Catches a scale that is inverted, ties away from zero, subnormals that are rounded too finely, division in float64."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=128) * 10.0 ** rng.uniform(-4, 0, 128) * size).astype(np.float32)
    q = quantize(x[None])
    s, y = mine.quantise_tile(x)
    assert np.float32(s) == q.scales[0, 0]
    np.testing.assert_array_equal(y, decode(q.codes, E4M3)[0])


def test_quantise_a_tile_of_zeros(mine):
    """Catches 0 / 0."""
    s, y = mine.quantise_tile(np.zeros(128, np.float32))
    assert s == np.float32(1e-4) / np.float32(448) and not y.any()


@pytest.mark.parametrize("seed", range(20))
def test_hopper_step(mine, seed):
    """Catches rounding instead of cutting, a floor of negative numbers, c left whole, exponents of products renormalised."""
    rng = np.random.default_rng(seed)
    a, b = (rng.choice(np.r_[8:120, 136:248], 32).astype(np.uint8) for _ in range(2))
    c = np.float32(rng.normal() * 10.0 ** rng.uniform(-3, 4))
    field = lambda x: (x >> 3 & 15).astype(int) - 7  # noqa: E731
    exact = [Fraction(float(p)) * Fraction(float(q)) for p, q in zip(decode(a, E4M3), decode(b, E4M3), strict=True)]
    found = mine.hopper_step(exact, (field(a) + field(b)).tolist(), Fraction(float(c)))
    wanted = tensor_core_matmul(a[None], b[None], np.float32([[c]]), arch="hopper", fmt="e4m3")[0, 0]
    assert float(found) == float(wanted)
