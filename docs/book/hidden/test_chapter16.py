"""Chapter 16's exercises."""

import math
from dataclasses import replace

import numpy as np
import pytest

from refimpl import PRESETS
from refimpl.layers import mtp, router


@pytest.mark.parametrize("seed", range(4))
def test_top_k(mine, seed):
    """Catches ties to the higher index, and to whatever an unstable sort makes of them."""
    scores = np.random.default_rng(seed).integers(0, 6, 64).astype(float)
    scores[::7] = -math.inf
    assert mine.top_k(scores.tolist(), 60) == router.top_k(scores, 60).tolist()


@pytest.mark.parametrize("factor, m", [(40.0, 1.0), (40.0, 0.707), (1.0, 1.0), (0.5, 1.0), (4.0, 0.0)])
@pytest.mark.parametrize("longest", [2048, 4096, 163840])
@pytest.mark.parametrize("applies", ["configured", "beyond_original"])
def test_softmax_scale(mine, factor, m, longest, applies):
    """Catches m once instead of squared, a threshold off by one, m of factors that do not stretch."""
    c = PRESETS["deepseek-v3"]
    c = c.replace(
        max_position_embeddings=longest,
        rope_scaling=replace(c.rope_scaling, factor=factor, mscale_all_dim=m),
        dialect=replace(c.dialect, yarn_applies=applies),
    )
    assert mine.softmax_scale(192, factor, m, longest, 4096, applies) == pytest.approx(c.softmax_scale, rel=1e-14)


def test_hidden_first(mine):
    """Catches rows instead of columns, and halves that are left where they were."""
    rng = np.random.default_rng(0)
    w, emb, hidden = rng.normal(size=(6, 12)), rng.normal(size=(1, 3, 6)), rng.normal(size=(1, 3, 6))
    usual = mtp.proj.fn(mtp.cat.fn(emb, hidden, hidden_first=False), w)
    other = mtp.proj.fn(mtp.cat.fn(emb, hidden, hidden_first=True), mine.hidden_first(w))
    np.testing.assert_allclose(other, usual, rtol=1e-12)  # the same sums in another order
