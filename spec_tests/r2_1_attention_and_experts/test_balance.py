"""Load balance (R 2.1.2): the bias that follows the load, the sequence-wise loss (eqs 17-20)."""

import numpy as np
import pytest

from refimpl.autograd import Tensor, backward, directional
from refimpl.layers import router
from refimpl.spec_tests.cases.small_models import small, some_tokens


def scores(batch=2, length=6, experts=8, seed=0):
    return np.random.default_rng(seed).random((batch, length, experts)) + 0.01


def by_hand(s, k, alpha, routed=None):
    """alpha sum_i f_i P_i, eqs 17-20, a sequence, token and expert at a time; mean over sequences."""
    total = 0.0
    for b, sequence in enumerate(s):
        length, experts = sequence.shape
        f, p = [0.0] * experts, [0.0] * experts
        for t, row in enumerate(sequence):
            best = sorted(range(experts), key=lambda e: (-row[e], e))[:k]
            for e in best if routed is None else routed[b, t]:
                f[e] += experts / (k * length)
            for e in range(experts):
                p[e] += row[e] / sum(row) / length
        total += alpha * sum(a * c for a, c in zip(f, p, strict=True))
    return total / len(s)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_sequence_loss_is_that_of_the_loops(k):
    """Catches statistics over the batch instead of each sequence, and unnormalised scores."""
    s = scores()
    routed = np.random.default_rng(1).standard_normal(s.shape).argsort(-1)[..., :k]
    for r in (None, routed):
        assert abs(router.seq_aux(s, r, k=k, alpha=1e-4) - by_hand(s, k, 1e-4, r)) < 1e-18


def test_perfect_balance_costs_alpha():
    """Catches a factor N_r/K_r missing or doubled: sum_i f_i P_i = 1 for equal loads and scores."""
    assert abs(router.seq_aux(np.full((2, 4, 8), 0.3), None, k=8, alpha=0.7) - 0.7) < 1e-15
    turns = np.array([[np.roll(np.arange(8.0), t) + 1 for t in range(8)]])
    assert abs(router.seq_aux(turns, None, k=2, alpha=0.7) - 0.7) < 1e-15


def test_collapse_costs_more():
    """Catches a loss with the wrong sign: all tokens on the same experts, more than alpha."""
    s = np.full((1, 6, 8), 0.1)
    s[..., :2] = 0.9
    assert router.seq_aux(s, None, k=2, alpha=1.0) > 2.0


def test_gradient_treats_the_counts_as_constant():
    """dL/ds_j,t = alpha (f_j - sum_i f_i s'_i,t) / (T sum_j s_j,t). Catches a gradient through f or
    through the sum only."""
    s, k, alpha = scores(batch=1), 3, 0.5
    leaf = Tensor(s)
    g = backward(router.seq_aux(leaf, None, k=k, alpha=alpha))[leaf][0]
    length, experts = s.shape[1:]
    f = np.zeros(experts)
    for row in s[0]:
        f[np.argsort(-row)[:k]] += experts / (k * length)
    for t, j in np.ndindex(length, experts):
        total = s[0, t].sum()
        expected = alpha * (f[j] - f @ (s[0, t] / total)) / (length * total)
        assert abs(g[t, j] - expected) < 1e-15
    assert directional(lambda s: router.seq_aux(s, None, k=k, alpha=alpha), s) < 1e-6


def test_counts_are_tokens_per_expert_over_the_batch():
    """Catches counts per sequence, and idle last experts cut off."""
    ids = np.array([[[0, 3], [3, 1]], [[3, 0], [1, 0]]])
    np.testing.assert_array_equal(router.counts(ids, n_experts=6), [3, 2, 0, 3, 0, 0])


@pytest.mark.parametrize("zero_sum", [False, True])
def test_bias_goes_up_below_the_mean_and_down_above(zero_sum):
    """R 2.1.2: "decrease by gamma if overloaded, increase if underloaded". Catches the sign, the
    median, a step in proportion; exactly at the mean nothing moves. torchtitan subtracts the mean."""
    bias, load, gamma = np.array([0.5, -0.25, 0.0, 1.0]), np.array([4, 1, 2, 1]), 0.125
    new = router.bias_update(bias, load, gamma=gamma, zero_sum=zero_sum)
    step = [gamma * ((c < 2) - (c > 2)) for c in (4, 1, 2, 1)]
    if zero_sum:
        step = [v - sum(step) / 4 for v in step]
        assert abs(new.sum() - bias.sum()) < 1e-15
    np.testing.assert_allclose(new, [b + v for b, v in zip(bias, step, strict=True)], rtol=1e-15)
    assert new is not bias and bias[0] == 0.5


def test_bias_keeps_its_dtype():
    """Catches a float64 bias after the first step, which the checkpoint cannot hold."""
    bias = np.zeros(4, np.float32)
    new = router.bias_update(bias, np.array([1, 2, 3, 4]), gamma=1e-3, zero_sum=True)
    assert new.dtype == np.float32


def test_equal_load_moves_nothing():
    """Catches sign(0) = 1."""
    bias = np.array([0.1, 0.2, 0.3])
    for zero_sum in (False, True):
        new = router.bias_update(bias, np.array([7, 7, 7]), gamma=1.0, zero_sum=zero_sum)
        np.testing.assert_array_equal(new, bias)


def test_following_the_load_evens_it_out():
    """Catches an update in the wrong direction, end to end: after 300 steps of a gate that starts
    with one favourite, the busiest expert has far less than it had."""
    model, rng = small(), np.random.default_rng(0)
    gate = model.model.layers[1].mlp.gate
    x = rng.standard_normal((4, 64, gate.weight.shape[1]))
    experts = len(gate.weight)
    gate.e_score_correction_bias = np.where(np.arange(experts) == 0, 1.0, 0.0)
    loads = []
    for _ in range(300):
        load = router.counts(gate(x).ids, n_experts=experts)
        loads.append(load.max() / load.mean())
        gate.e_score_correction_bias = router.bias_update(
            gate.e_score_correction_bias, load, gamma=0.01, zero_sum=False
        )
    assert loads[0] > 2.5 and np.mean(loads[-20:]) < 1.3


def test_the_balance_loss_is_added_for_every_moe_layer_and_no_other():
    """Catches a dense layer or an MTP module that joins in, and one alpha for all layers together."""
    model = small(num_hidden_layers=3, first_k_dense_replace=1)
    tokens = some_tokens()
    _, parts = model.loss(model.inputs(tokens, labels=tokens), aux_weight=0.25)
    assert [n for n in parts if "aux" in n] == ["L1/loss.seq_aux", "L2/loss.seq_aux"]
    routing = model(model.inputs(tokens)).routing
    for at in ("L1", "L2"):
        expected = by_hand(routing[at].scores, 4, 0.25)
        assert abs(parts[f"{at}/loss.seq_aux"] - expected) < 1e-13
