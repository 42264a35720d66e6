"""Chapter 5's exercises, held against the specification's own stages."""

import numpy as np
import pytest

from refimpl.layers import router


@pytest.mark.parametrize("seed", range(5))
def test_route(mine, seed):
    """Catches one best expert a group instead of two, experts of dropped groups, equals the wrong way round."""
    rng = np.random.default_rng(seed)
    s, b = rng.integers(0, 12, 24) / 16, rng.integers(-4, 5, 24) / 16  # sixteenths: many ties, no rounding
    a = router.choice(s[None, None], b)
    kept = router.groups(router.group_scores(a, n_group=6, best=2), topk_group=3)
    wanted = router.ids(a, kept, k=5, n_group=6, fill=-np.inf)[0, 0]
    assert list(mine.route(s, b, 5, 6, 3)) == wanted.tolist()


def test_route_with_negative_scores(mine):
    """Catches dropped groups that count as 0: here every kept score is below 0."""
    s, b = np.full(8, 0.125), np.array([-1.0, -1, -2, -2, -3, -3, -4, -4])
    assert list(mine.route(s, b, 3, 4, 2)) == [0, 1, 2]


def test_imbalance(mine):
    """Catches a mean over the experts that were chosen, a missing - 1, and experts at the end that were forgotten."""
    assert mine.imbalance(np.array([[0, 1], [1, 2]]), 4) == pytest.approx(1.0)
    assert mine.imbalance(np.arange(6).reshape(3, 2), 6) == pytest.approx(0.0)


def test_steps_until(mine):
    """Catches a sign the wrong way, an update before the first look, a count that is off by one, a loop without end."""
    assert mine.steps_until(lambda b: [5, 5, 5, 5], 4, 0.1, 0.0) == 0
    assert mine.steps_until(lambda b: np.array([9, 1]) if b[1] - b[0] < 0.99 else np.array([5, 5]), 2, 0.1, 0.1) == 5
    assert mine.steps_until(lambda b: [2, 0], 2, 0.1, 0.5, most=20) is None
