"""Norms of ports that sum squares in another order than we do, which leans and is no fault."""

import ml_dtypes
import numpy as np
import pytest

from refimpl.diff.compare import Units, compare
from refimpl.diff.corpus import MUTANTS
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


# ---- The norm of all gradients


def gradients(n, parts, seed):
    """n numbers as gradients are: most of them small beside the largest."""
    rng = np.random.default_rng(seed)
    return np.split((rng.standard_normal(n) * np.exp(rng.standard_normal(n))).astype(np.float32), parts)


def loop_over(grads):
    total = np.float32(0)
    for g in grads:
        for x in g:
            total += x * x
    return np.sqrt(total)


def clipping(grads, norm):
    """The findings on a norm that a port gave, and on gradients clipped by it where it was not recorded."""
    p = declared_precision({})
    taps = {f"grad/{i}": g for i, g in enumerate(grads)}
    calls = [
        Call("optim.grad_norm", "upd/grad_norm", tuple(taps), {}),
        Call("optim.clip", "upd/0.clipped", ("grad/0", "upd/grad_norm"), {"max_norm": 1.0}),
    ]
    clipped = (grads[0] * np.float32(1.0 / (norm + 1e-6))).astype(np.float32)
    found = []
    for tap, x in (("upd/grad_norm", np.asarray(norm, np.float32)), ("upd/0.clipped", clipped)):
        r = Recorded({tap: x}, taps, lambda n, plan: taps[n], FLOAT32, Noise(p.unit, p.format))
        stages = ("optim.grad_norm", "optim.clip")[: 1 + tap.endswith("clipped")]
        units = Units(UNIT["float32"], UNIT["float32"], stages)
        found += [compare(step, x, units, {}) for step in replay(calls, r) if step.call.tap == tap]
    return found


SIZES = [(10**3, 4), (10**5, 8), pytest.param(10**6, 4, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("n", "parts"), SIZES)
def test_a_norm_of_gradients_summed_in_turn_conforms(n, parts):
    """Catches a correct optimiser called wrong for what one float32 sum loses: 500 u at 1e5 numbers, 12,600 u at 1e6."""
    for seed in range(3 if n < 10**4 else 1):
        grads = gradients(n, parts, seed)
        for order in (grads, grads[::-1], [g[::-1] for g in grads]):
            for f in clipping(grads, loop_over(order)):
                assert f.ok, (f.tap, f.note, f.error, f.allowed, f.lean, f.upright)


@pytest.mark.parametrize(("n", "parts"), SIZES)
def test_a_wrong_norm_of_gradients_is_still_seen(n, parts):
    """Catches an allowance that a mistake goes through: one of a hundred parts left out is half a per cent of the norm."""
    grads = gradients(n, parts, 1)
    squares = np.concatenate(grads).astype(np.float64) ** 2
    wrong = np.sqrt(squares[n // 100 :].sum())
    assert [f.ok for f in clipping(grads, wrong)] == [False, False]
    assert [f.ok for f in clipping(grads, np.sqrt(squares.sum()))] == [True, True]


@pytest.mark.parametrize("seed", range(4))
def test_the_twin_of_a_norm_is_half_a_limit_away(seed):
    """Catches another loss, of another loop, or another walk than the docstring says: its formula, with loops of scalars. Oracle in
    float64; the difference of two numbers of which 1e-16 is known.
    """
    grads = [g * np.float32(10.0**-seed) for g in gradients(20_000, 4, seed)]
    exact = np.sqrt(sum(float(x) ** 2 for g in grads for x in g))
    loss = max((float(loop_over(order)) - exact for order in (grads, grads[::-1])), key=abs)
    walk = 2.0**-24 * np.sqrt(20_000) / 4 * exact
    away = float(ORDERS["optim.grad_norm"](*grads)) - exact
    assert away == pytest.approx(np.copysign(2 * abs(loss) / 4 + walk, loss), rel=1e-6)


def test_a_loop_that_loses_too_much_is_not_allowed():
    """Catches a limit that grows with the number of weights until none is wrong: 2 % are lost here, 0.4 % are allowed."""
    small = [np.full(2**18, 1e-4, np.float32)]
    large = [np.ones(1, np.float32), *small * 16]
    exact = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in large))
    assert exact > 1.02 and abs(ORDERS["optim.grad_norm"](*large) / exact - 1) <= 2**-10 * 1.0001
    (f, _) = clipping(large, 1.0)
    assert not f.ok
    assert MUTANTS["O06d"].fn(*large) == 1.0  # which is its name


def test_every_norm_has_the_other_order():
    """Catches a norm stage that was forgotten, and an entry that computes another function."""
    norms = {n for n in STAGES if n.endswith("norm")} | {"mla.c_kv"}
    assert set(ORDERS) == norms
    x, w = rows(64, 1)
    assert ORDERS["optim.grad_norm"](x, w) == pytest.approx(np.sqrt((x**2).sum() + (w**2).sum()), rel=1e-4)
    for name in norms - {"optim.grad_norm"}:
        np.testing.assert_allclose(ORDERS[name](x, w, eps=EPS), STAGES[name].fn(x, w, eps=EPS), rtol=2e-6)


@pytest.mark.parametrize(("large", "ok"), [(1, True), (0, False)])
def test_one_number_above_all_others_may_be_rounded_as_it_is(large, ok):
    """Catches a lean that is one number's rounding: sigmoids of logits near -45 with one near 9, all 3 units of roundoff up.
    Many numbers of one size that go the same way by as much are a wrong constant.
    """
    z = np.full((24, 16), -45.0, np.float32)
    z[3, 5] = 9.0 if large else -45.0
    r = Recorded(
        {}, {"z": z}, lambda n, plan: None, FLOAT32, Noise(declared_precision({}).unit, lambda call: "float32")
    )
    exact = 1 / (1 + np.exp(-z.astype(np.float64)))
    given = exact * (1 + 3 * UNIT["float32"])
    r.taps["fwd/L1/router.scores"] = given
    (step,) = replay([Call("router.scores", "fwd/L1/router.scores", ("z",), {"func": "sigmoid"})], r)
    assert compare(step, given, Units(UNIT["float32"], UNIT["float32"], ("router.scores",)), {}).ok == ok
