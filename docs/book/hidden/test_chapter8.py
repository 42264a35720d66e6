"""Chapter 8's exercises, held against the specification's optimiser and its run as data."""

import numpy as np
import pytest

from refimpl.train.optimizer import AdamState, AdamW, adamw
from refimpl.train.recipe import load


def test_clip(mine):
    """Catches a norm for each tensor, the sum of norms, and short gradients that are made longer."""
    grads = {"a": np.float32([3.0, 0.0]), "b": np.float32([[0.0, 4.0]])}
    clipped, norm = mine.clip(grads, 1.0)
    assert norm == pytest.approx(5.0)
    np.testing.assert_allclose(clipped["b"], [[0.0, 4 / (5 + 1e-6)]], rtol=1e-6)
    short, norm = mine.clip({"a": np.float32([0.3])}, 1.0)
    assert short["a"][0] == np.float32(0.3) and norm == pytest.approx(0.3, rel=1e-6)


def test_adamw(mine):
    """Catches a decay that goes through the gradient, means that are not corrected, eps inside of the root."""
    rng = np.random.default_rng(0)
    opt, state, w = AdamW(lr=1e-2), AdamState(), {"w": rng.normal(size=(3, 4))}
    ours, m, v = w["w"], np.zeros((3, 4)), np.zeros((3, 4))
    for t in range(1, 5):
        g = rng.normal(size=(3, 4)) * 10.0 ** rng.uniform(-9, 0, (3, 4))  # as small as eps, too
        w, state = adamw(w, {"w": g}, state, opt)
        ours, m, v = mine.adamw(ours, g, m, v, t, lr=1e-2)
        np.testing.assert_allclose(ours, w["w"], rtol=1e-9, atol=1e-12)  # one step is a handful of float64 roundings
        np.testing.assert_allclose(v, state.v["w"], rtol=1e-9)


def test_learning_rate(mine):
    """Catches a cosine that falls too far or over the wrong tokens, and the last two levels swapped."""
    lr = load("deepseek-v3").phases[0].schedules["lr"]
    for token in (3e10, 5e12, 9.99e12, 10e12, 11e12, 12.15e12, 14.2e12, 14.3e12, 14.6e12, 14.7e12):
        assert mine.learning_rate(token) == pytest.approx(lr.value(token, 10_000), rel=1e-9)
