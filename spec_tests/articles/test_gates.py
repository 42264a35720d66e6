"""Gates of articles: by mask, by temperature, with Gumbel noise, by averaging, in two stages, with a cold start."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.autograd import SpecError, Tensor, backward, ops
from refimpl.layers import STAGES, moe, router
from refimpl.layers.variants.cold_start import unlocked
from refimpl.layers.variants.gumbel import gumbel_noise

ROUNDING = {"rtol": 1e-12, "atol": 1e-15}  # sums of at most 16 float64 terms
FLOATS = st.floats(-8, 8, allow_nan=False)


@pytest.fixture
def rng():
    return np.random.default_rng(17)


def stage(name):
    return STAGES[f"variant.{name}"]


def favourites(row, k):
    """Places of the k largest, ties to the lower index, without an argsort of arrays."""
    return sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]


def soft(row):
    e = [math.exp(v - max(row)) for v in row]
    return [v / sum(e) for v in e]


@st.composite
def rows(draw):
    """A row of logits with ties, and a k that fits."""
    row = draw(st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]) | FLOATS, min_size=2, max_size=8))
    return row, draw(st.integers(1, len(row)))


# ---- By mask


@given(rows())
def test_ones_are_alike_and_probabilities_are_not(case):
    """Catches a mask at other places, one that is not divided, a softmax over all experts left as it is."""
    row, k = case
    z = np.array([[row]])
    best = favourites(row, k)
    expected = [(1 / k if e in best else 0.0) for e in range(len(row))]
    np.testing.assert_allclose(stage("top2_ones")(z, k=k)[0, 0], expected, **ROUNDING)
    chosen = soft([row[e] for e in best])  # the softmax of the chosen logits alone
    expected = [chosen[best.index(e)] if e in best else 0.0 for e in range(len(row))]
    np.testing.assert_allclose(stage("top2_renormalised")(z, k=k)[0, 0], expected, **ROUNDING)


def test_the_repaired_gate_is_v3s_without_sigmoid_bias_and_scale(rng):
    """Catches a repair that weighs otherwise than `router.weights` does with the same scores."""
    z = rng.normal(size=(2, 5, 8))
    s = router.scores(z, func="softmax")
    ids = router.ids(s, None, k=2, n_group=1, fill=-np.inf)
    g = router.weights(s, ids, normalise=True, eps=0.0, scale=1.0)
    dense = stage("top2_renormalised")(z)
    np.testing.assert_allclose(np.take_along_axis(dense, ids, -1), g, **ROUNDING)
    assert np.count_nonzero(dense) == ids.size


@pytest.mark.parametrize("name", ["top2_ones", "top2_renormalised"])
@pytest.mark.parametrize("k", [0, 9])
def test_more_experts_than_there_are(name, k):
    """Catches a mask that is silently shorter, and 0 / 0 for none."""
    with pytest.raises(SpecError, match="of 8 experts"):
        stage(name)(np.zeros((1, 1, 8)), k=k)


# ---- Temperature and noise


@given(st.lists(FLOATS, min_size=2, max_size=6), st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_a_temperature_is_a_power_of_the_probabilities(row, tau):
    """Catches logits multiplied by the temperature, or divided after the softmax: softmax(z / t) is p^(1/t), renormalised."""
    power = [p ** (1 / tau) for p in soft(row)]
    expected = [p / sum(power) for p in power]
    np.testing.assert_allclose(stage("temperature")(np.array([[row]]), tau=tau)[0, 0], expected, rtol=1e-9, atol=1e-30)


def test_temperatures_at_their_ends(rng):
    """Catches hot and cold exchanged."""
    z = rng.normal(size=(2, 3, 5))
    np.testing.assert_allclose(stage("temperature")(z, tau=1e9), 0.2, rtol=1e-7)
    cold = stage("temperature")(z, tau=1e-4)
    np.testing.assert_allclose(cold, z == z.max(-1, keepdims=True), atol=1e-30)  # the closest pair is 0.035 apart
    noise = gumbel_noise(rng, z.shape)
    drawn = stage("gumbel")(z, noise, tau=1e-4)
    np.testing.assert_allclose(drawn, z + noise == (z + noise).max(-1, keepdims=True), atol=1e-30)


@pytest.mark.parametrize("tau", [0.0, -1.0])
def test_a_temperature_is_positive(tau):
    """Catches a division by 0, and a gate that prefers the worst expert."""
    z = np.zeros((1, 1, 4))
    for call in (lambda: stage("temperature")(z, tau=tau), lambda: stage("gumbel")(z, z, tau=tau)):
        with pytest.raises(SpecError, match="tau must be positive"):
            call()


def test_draws_follow_the_softmax_and_know_no_load(rng):
    """Catches noise of another distribution (a normal, a Gumbel with the wrong sign): the largest of z + n is a draw of softmax(z).

    20,000 draws; each frequency within 5 standard deviations (false alarm 1 in 300,000 for 5 experts).
    """
    z, n = np.array([1.5, 0.0, -0.5, 0.7, -2.0]), 20_000
    many = np.broadcast_to(z, (1, n, 5))
    y = stage("gumbel")(many, gumbel_noise(rng, many.shape), tau=0.5, straight_through=True)
    p = np.array(soft(z))
    np.testing.assert_array_less(np.abs(y[0].sum(0) - n * p), 5 * np.sqrt(n * p * (1 - p)))


def test_straight_through_is_hard_forward_and_soft_backward(rng):
    """Catches a hard gate without gradient, and a soft value under a hard name."""
    z, noise, dy = rng.normal(size=(3, 2, 4, 6))
    hard, again = Tensor(z), Tensor(z)
    y = stage("gumbel")(hard, noise, tau=0.8, straight_through=True)
    x = stage("gumbel")(again, noise, tau=0.8)
    assert set(np.unique(y.data)) == {0.0, 1.0} and (y.data.sum(-1) == 1).all()
    np.testing.assert_array_equal(y.data.argmax(-1), x.data.argmax(-1))
    np.testing.assert_array_equal(backward(y, dy)[hard], backward(x, dy)[again])


def test_noise_comes_from_the_generator_alone():
    """Catches a global random state, and a dtype that is not the model's."""
    a, b = (gumbel_noise(np.random.default_rng(4), (2, 3), np.float32) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert a.dtype == np.float32


# ---- What becomes of the experts' outputs


def expert(e, x):
    """What expert e makes of a token: something simple and different for each."""
    return np.tanh(x * (e + 1)) + e


def dispatched(x, ids, n_experts):
    """Every chosen expert's output, in dispatch order, by loops."""
    found = [expert(e, x[b, s]) for e in range(n_experts) for b, s, k in np.ndindex(ids.shape) if ids[b, s, k] == e]
    return np.array(found)


def test_the_mean_of_the_chosen(rng):
    """Catches a sum, a mean over all experts, rows given to another token."""
    x, ids = rng.normal(size=(2, 3, 4)), router.top_k(rng.normal(size=(2, 3, 6)), 2)
    y = stage("mean_of_chosen")(dispatched(x, ids, 6), ids)
    for b, s in np.ndindex(2, 3):
        i, j = ids[b, s]
        np.testing.assert_allclose(y[b, s], (expert(i, x[b, s]) + expert(j, x[b, s])) / 2, **ROUNDING)


def test_two_stages_as_printed_run_every_expert(rng):
    """Catches a refinement that sees another expert's share or vector: the printed loop over experts, token by token."""
    x, gate, own = rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    c = stage("coarse")(x, gate)
    r = stage("refined")(x, c, own)
    everyone = np.broadcast_to(np.arange(5), (2, 3, 5))
    sent = moe.rows(x, everyone, n_experts=5)
    assert len(sent) == 2 * 3 * 5  # a row for every expert and token
    y = moe.routed(dispatched(x, everyone, 5), everyone, r)
    for b, s in np.ndindex(2, 3):
        shares = soft([float(sum(x[b, s] * g)) for g in gate])
        refined = [p / (1 + math.exp(-float(sum(x[b, s] * o)))) for p, o in zip(shares, own, strict=True)]
        np.testing.assert_allclose(y[b, s], sum(p * expert(e, x[b, s]) for e, p in enumerate(refined)), **ROUNDING)


def test_two_stages_that_route(rng):
    """Catches a choice by refined shares: the coarse ones choose, the refined ones weigh, both get a gradient."""
    x, gate, own = rng.normal(size=(1, 6, 4)), Tensor(rng.normal(size=(5, 4))), Tensor(rng.normal(size=(5, 4)))
    c = stage("coarse")(x, gate)
    ids = router.ids(c, None, k=2, n_group=1, fill=-np.inf)
    g = router.weights(stage("refined")(x, c, own), ids, normalise=True, eps=0.0, scale=1.0)
    for s in range(6):
        assert ids[0, s].tolist() == favourites((gate.data @ x[0, s]).tolist(), 2)
    np.testing.assert_allclose(g.data.sum(-1), 1, **ROUNDING)
    grads = backward(ops.sum(g * rng.normal(size=g.shape)))
    assert all(np.abs(grads[w]).max() > 1e-3 for w in (gate, own))


# ---- Cold start


@given(st.integers(2, 300), st.integers(1, 50), st.data())
def test_experts_are_unlocked_one_after_another(n_experts, steps, data):
    """Catches a schedule that starts at 0, ends before the last expert, or goes back."""
    start = data.draw(st.integers(1, n_experts))
    there = [unlocked(t, n_experts=n_experts, steps=steps, start=start) for t in range(steps + 3)]
    assert there[0] == start and there[steps:] == [n_experts] * 3
    growth = np.diff(there[: steps + 1])
    assert growth.min() >= 0 and growth.max() - growth.min() <= 1  # equal steps, rounded


@pytest.mark.parametrize("func", ["softmax", "sigmoid"])
def test_locked_experts_are_chosen_by_none_and_learn_nothing(func, rng):
    """Catches a locked expert with an affinity, a gradient, or a place among the chosen."""
    x = Tensor(rng.normal(size=(2, 4, 8)))
    z = stage("cold_start")(x, step=3, steps=6, start=2, k=2)  # 2 + 6 * 3 / 6 = 5
    s = router.scores(z, func=func)
    assert (s.data[..., 5:] == 0).all() and (s.data[..., :5] > 0).all()
    assert router.ids(s, None, k=2, n_group=1, fill=-np.inf).max() < 5
    dx = backward(s, rng.normal(size=s.shape))[x]
    assert (dx[..., 5:] == 0).all() and np.isfinite(dx).all() and np.abs(dx[..., :5]).min() > 0
    np.testing.assert_array_equal(stage("cold_start")(x.data, step=6, steps=6), x.data)


def test_no_more_are_chosen_than_are_there():
    """Catches V3's eight experts a token while two are unlocked: six locked ones would be chosen, with weight 0."""
    with pytest.raises(SpecError, match="8 experts a token, but only 2 unlocked at step 0"):
        stage("cold_start")(np.zeros((1, 1, 256)), step=0, steps=10, k=8)
