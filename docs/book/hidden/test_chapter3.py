"""Chapter 3's exercises, held against the specification's rotation and frequencies."""

import numpy as np
import pytest

from refimpl import PRESETS
from refimpl.autograd import nn_ops
from refimpl.layers.rope import inv_freq, rope_tables


@pytest.mark.parametrize("position", [0, 1, 5000])
def test_turn(mine, position):
    """Catches half layout, a turn the other way, one frequency for all pairs."""
    x, freq = np.random.default_rng(0).normal(size=(3, 8)), inv_freq(8, 1e4, None)
    table = rope_tables(np.array([[position]]), dim=8, theta=1e4, yarn=None, dtype=np.float64)[:, 0, 0]
    np.testing.assert_allclose(
        mine.turn(x, position, freq), nn_ops.rotate(x, table, interleaved=True), rtol=0, atol=1e-12
    )


def test_orders(mine):
    """Catches the inverse given for the permutation: with more than two pairs they differ."""
    x, table = np.arange(10.0), np.stack([np.cos(np.arange(5.0)), np.sin(np.arange(5.0))])
    there = np.asarray(mine.half_order(10))
    turned = nn_ops.rotate(x[there], table, interleaved=False)
    np.testing.assert_allclose(turned, nn_ops.rotate(x, table, interleaved=True)[there], rtol=1e-12)
    np.testing.assert_array_equal(x[there][np.asarray(mine.interleaved_order(10))], x)


def test_slowed(mine):
    """Catches a ramp the wrong way round, turns taken for wavelengths, all pairs divided."""
    c = PRESETS["deepseek-v3"]
    freq = inv_freq(64, 1e4, None)
    np.testing.assert_allclose(mine.slowed(freq, 40, 4096, 32, 1), inv_freq(64, 1e4, c.yarn), rtol=1e-12)
