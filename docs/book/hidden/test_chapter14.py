"""Chapter 14's exercises."""

import math

import numpy as np
import pytest

from refimpl.diff.tolerance import row_errors


def test_worst_row_is_that_of_the_tool(mine):
    """Catches a mean over rows, the norm of x in the denominator, and a floor of each row's own."""
    rng = np.random.default_rng(1)
    e = rng.normal(size=(2, 5, 7)) * 10.0 ** rng.integers(-8, 2, (2, 5, 1))
    x = e + rng.normal(size=e.shape) * 1e-5
    assert mine.worst_row(x, e) == pytest.approx(
        row_errors("resid", x, e).max(), rel=1e-12
    )  # the same formula in another order


def test_worst_row_of_zeros_and_holes(mine):
    """Catches 0/0, and NaN that compares as if it were fine."""
    zero = np.zeros((3, 4))
    assert mine.worst_row(zero, zero) == 0.0
    assert mine.worst_row(np.full((1, 2), np.nan), np.ones((1, 2))) == math.inf


def test_a_stage_that_cancels_is_allowed_more(mine):
    """Catches a constant tolerance: a - b of near equals magnifies what its inputs are moved by; a copy has the floor alone."""
    a = np.linspace(1, 2, 64, dtype=np.float32).reshape(4, 16)
    b = a * np.float32(1 - 1e-3)
    copy = mine.allowed(lambda x: x, [a], 4, 0)
    cancel = mine.allowed(lambda x, y: x - y, [a, b], 4, 0)
    assert copy == 4 * 2.0**-24 or copy < 8 * 2.0**-24
    assert 100 < cancel / copy < 10000  # the inputs are 1000 times their difference


def test_the_limit_is_four_times_the_worst_twin(mine):
    """Catches the worst twin itself as the limit, and twins that all move alike (then a scale cancels nothing)."""
    a = np.linspace(1, 2, 64, dtype=np.float32).reshape(4, 16)
    b, rng, worst = a * np.float32(1 - 1e-3), np.random.default_rng(9), 0.0
    exact = a.astype(np.float64) - b
    for _ in range(64):
        x, y = ((v * (1 + 2.0**-24 * rng.uniform(-1, 1, v.shape))).astype(np.float32) for v in (a, b))
        worst = max(worst, row_errors("resid", x - y, exact).max())
    limit = mine.allowed(lambda x, y: x - y, [a, b], 64, 0)
    assert 3 < limit / worst < 5.3  # the worst of 64 others is a few per cent away, never a third


def _engine(wrong):
    """Three stages in float32, some with a mistake; the recording and the specification's program."""
    rng = np.random.default_rng(2)
    right = {
        "norm": lambda x: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True)),
        "act": lambda x: x / (1 + np.exp(-x)),
        "sum": lambda x, y: x + y,
    }
    bad = {"norm": lambda x: x / np.abs(x).max(), "act": lambda x: np.maximum(x, 0), "sum": lambda x, y: x + 1.001 * y}
    inputs = {"norm": ["in"], "act": ["norm"], "sum": ["in", "act"]}
    taps = {"in": rng.normal(size=(6, 8)).astype(np.float32)}
    for tap, names in inputs.items():
        taps[tap] = (bad if tap in wrong else right)[tap](*[taps[n] for n in names]).astype(np.float32)
    return [(tap, right[tap], inputs[tap]) for tap in right], taps


@pytest.mark.parametrize("wrong", [[], ["norm"], ["act"], ["norm", "act"], ["sum"], ["norm", "act", "sum"]])
def test_culprits_are_the_wrong_stages_and_no_others(mine, wrong):
    """Catches a chained comparison, which blames all that follow, and one that stops at the first."""
    assert mine.culprits(*_engine(wrong)) == wrong
