"""Chapter 4's exercises, held against the specification's own stages."""

import numpy as np

from refimpl import PRESETS
from refimpl.layers import mla


def test_cache_bytes(mine):
    """Catches layers or the second byte forgotten, values without keys, the latent taken per head."""
    c = PRESETS["deepseek-v3"]
    assert mine.cache_bytes(c, 1, "mla") == 70_272
    assert mine.cache_bytes(c, 3, "mha") == 3 * 61 * 2 * 2 * 128 * 128
    assert mine.cache_bytes(c, 1, "mha") == 16 * mine.cache_bytes(c, 1, "gqa8") == 128 * mine.cache_bytes(c, 1, "mqa")
    assert mine.cache_bytes(PRESETS["tiny"], 5, "mla") == 5 * 3 * 2 * (20 + 8)


def test_absorb(mine):
    """Catches a matrix that is not turned, and heads that are mixed."""
    rng = np.random.default_rng(0)
    q, w = rng.normal(size=(3, 4, 6)), rng.normal(size=(4 * (6 + 2), 5))
    wanted = mla.q_absorbed(q[None], w, nope=6)[0]
    np.testing.assert_allclose(
        mine.absorb(q, w.reshape(4, 8, 5)[:, :6]), wanted, rtol=1e-12
    )  # the same sums of 6 terms


def test_cheaper(mine):
    """Catches unfolding counted per query, absorbing counted per key."""
    c = PRESETS["deepseek-v3"]
    assert mine.cheaper(c, 1, 4096) == "absorbed"
    assert mine.cheaper(c, 4096, 4096) == "expanded"
    turns = next(n for n in range(1, 4097) if mine.cheaper(c, n, 4096) == "expanded")
    for n in (turns - 1, turns):  # the costs, written out for this configuration
        unfolded = 4096 * 128 * 512 * 256 + n * 4096 * 128 * 320
        moved = n * 128 * 512 * 256 + n * 4096 * 128 * 1088
        assert (unfolded <= moved) == (n == turns)
