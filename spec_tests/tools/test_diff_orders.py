"""Norms of ports that sum squares in another order than we do, which leans and is no fault."""

import ml_dtypes
import numpy as np
import pytest

from refimpl.diff.compare import Units, compare
from refimpl.diff.lanes import Recorded
from refimpl.diff.orders import ORDERS
from refimpl.diff.precision import declared_precision
from refimpl.diff.replay import replay
from refimpl.diff.tolerance import UNIT, Noise
from refimpl.layers import STAGES
from refimpl.layers.precision import FLOAT32
from refimpl.layers.stage import Call

TAP = "fwd/L0/attn_norm"
EPS = 1e-6


def by_loop(x, w, eps):
    """The norm of a plain loop in float32, number by number."""
    total = np.zeros(len(x), np.float32)
    for channel in range(x.shape[1]):
        total += x[:, channel] * x[:, channel]
    return x / np.sqrt(total / np.float32(x.shape[1]) + np.float32(eps))[:, None] * w


def judged(x, w, given):
    """The finding on a norm that a port gave for rows x."""
    p = declared_precision({})
    weights = {"norm": w}
    r = Recorded(
        {TAP: given}, {"x": x}, lambda n, plan: weights[n].astype(plan.dtype), FLOAT32, Noise(p.unit, p.format)
    )
    (step,) = replay([Call("attn_norm", TAP, ("x", "w/norm"), {"eps": EPS})], r)
    return compare(step, given, Units(UNIT["float32"], UNIT["float32"], ("attn_norm",)), {})


def rows(width, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((24, width)).astype(ml_dtypes.bfloat16).astype(np.float32)
    return x, (1 + 0.2 * rng.standard_normal(width)).astype(np.float32)


@pytest.mark.parametrize("width", [48, 129, 512, 7168])
def test_a_norm_that_is_summed_in_turn_conforms(width):
    """Catches a lean of a sum's roundings that is taken for a wrong constant: twins that all sum as we do."""
    for seed in range(3):
        x, w = rows(width, seed)
        found = judged(x, w, by_loop(x, w, EPS))
        assert found.ok, (found.note, found.lean, found.upright)


@pytest.mark.parametrize("width", [48, 512, 7168])
def test_another_epsilon_is_still_seen(width):
    """Catches a limit so wide that the commonest mistake of norms goes through it."""
    x, w = rows(width, 0)
    assert not judged(x, w, by_loop(x, w, 1e-4)).ok
    if width < 1000:
        assert not judged(x, w, by_loop(x, w, 1e-5)).ok


def test_every_norm_has_the_other_order():
    """Catches a norm stage that was forgotten, and an entry that computes another function."""
    norms = {n for n in STAGES if n.endswith("norm") and n != "optim.grad_norm"} | {"mla.c_kv"}
    assert set(ORDERS) == norms
    x, w = rows(64, 1)
    for name in norms:
        np.testing.assert_allclose(ORDERS[name](x, w, eps=EPS), STAGES[name].fn(x, w, eps=EPS), rtol=2e-6)
