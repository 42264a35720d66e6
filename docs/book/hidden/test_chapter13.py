"""Chapter 13's exercises."""

import numpy as np
import pytest

from refimpl.layers.rope import RopeScaling, inv_freq


@pytest.mark.parametrize(
    "dim, theta, factor, original, fast, slow",
    [
        (64, 10000.0, 40.0, 4096, 32, 1),
        (8, 100.0, 40.0, 64, 32, 1),
        (64, 10000.0, 4.0, 4096, 32, 32),
        (8, 100.0, 40.0, 64, 32, 11),
    ],
)
def test_yarn(mine, dim, theta, factor, original, fast, slow):
    """Catches fast and slow exchanged, a ramp over channels instead of pairs, low below 0, low equal to high."""
    expected = inv_freq(dim, theta, RopeScaling(factor, original, fast, slow))
    assert mine.yarn(dim, theta, factor, original, fast, slow) == pytest.approx(expected.tolist(), rel=1e-12)


def test_rotate_keeps_only_differences(mine):
    """Catches a turn the other way, halves instead of neighbours, and a score that depends on where both are."""
    rng = np.random.default_rng(0)
    freqs = inv_freq(8, 10000.0, None).tolist()
    q, k = rng.normal(size=(2, 8)).tolist()
    assert mine.rotate([1.0, 0.0], 1, [np.pi / 2]) == pytest.approx([0.0, 1.0], abs=1e-12)
    z = np.array(q[0::2]) + 1j * np.array(q[1::2])
    turned = z * np.exp(1j * 7 * np.array(freqs))
    assert mine.rotate(q, 7, freqs) == pytest.approx(
        np.stack([turned.real, turned.imag], 1).ravel().tolist(), rel=1e-12
    )
    near = np.dot(mine.rotate(q, 5, freqs), mine.rotate(k, 2, freqs))
    far = np.dot(mine.rotate(q, 1005, freqs), mine.rotate(k, 1002, freqs))
    assert near == pytest.approx(far, rel=1e-9)


@pytest.mark.parametrize("tokens, length", [(20, 4), (21, 4), (3, 4), (100, 1)])
def test_scores(mine, tokens, length):
    """Catches length squared, and a part of a sequence counted as a whole one."""
    pairs = sum(1 for _ in range(tokens // length) for query in range(length) for key in range(length) if key <= query)
    assert mine.scores(tokens, length) == (tokens // length, pairs)
