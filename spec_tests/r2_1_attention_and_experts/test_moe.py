"""Experts: dispatch, grouped products, combination, shared experts (R 2.1.2, eq 12)."""

import math

import numpy as np
import pytest

from refimpl.autograd import Parameter, Tensor, backward, expert_ops, nn_ops
from refimpl.layers import Dialect, moe
from refimpl.layers.stage import observing
from refimpl.spec_tests.cases.small_models import CLOSE, SMALL, small


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def block(seed=0, **changes):
    """The MoE of a small model."""
    return small(seed, **changes).model.layers[1].mlp


def silu(v):
    return v / (1 + math.exp(-v))


def ffn(mlp, x):
    """down(silu(gate x) * up x), one channel after the other."""
    gate, up = mlp.gate_proj.weight @ x, mlp.up_proj.weight @ x
    return mlp.down_proj.weight @ np.array([silu(g) * u for g, u in zip(gate, up, strict=True)])


def per_token(mlp, x, routing):
    """R eq 12 with a loop over tokens and one over the chosen experts."""
    y = np.zeros_like(x)
    for b, s in np.ndindex(x.shape[:2]):
        for expert, weight in zip(routing.ids[b, s], routing.weights[b, s], strict=True):
            y[b, s] += weight * ffn(mlp.experts[expert], x[b, s])
        if mlp.config.n_shared_experts:
            y[b, s] += ffn(mlp.shared_experts, x[b, s])
    return y


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("weight_on", ["output", "activation"])
def test_moe_is_the_loop_over_tokens(shared, weight_on):
    """Catches rows that meet another token's expert or weight, a scaled shared expert, gate and up
    exchanged. Both places of the routing weight give the same."""
    mlp = block(n_shared_experts=shared, dialect=Dialect(routing_weight_on=weight_on))
    x = normal(2, 7, SMALL.hidden_size)
    y, routing = mlp(x)
    np.testing.assert_allclose(y, per_token(mlp, x, routing), **CLOSE)


@pytest.mark.parametrize("weight_on", ["output", "activation"])
@pytest.mark.parametrize("tokens", [1, 3, 60, 400])
def test_the_fused_experts_are_the_stages_bit_for_bit(weight_on, tokens):
    """Catches an expert left out or run twice, the weight in the wrong place, a sum in another order: nobody observes the first
    run, the second is made stage by stage."""
    mlp = block(dialect=Dialect(routing_weight_on=weight_on)).map(lambda _, w: w.astype(np.float32))
    x = normal(1, tokens, SMALL.hidden_size).astype(np.float32)
    seen = []

    def look(stage, run, *args, **static):
        seen.append(stage.name)
        return run(*args, **static)

    fused, _ = mlp(x)
    with observing(look):
        stages, _ = mlp(x)
    assert "moe.down" in seen
    np.testing.assert_array_equal(fused, stages)


def test_dense_mlp_is_silu_of_gate_times_up():
    """Catches w1, w2, w3 confused: w1 = gate, w3 = up, w2 = down in DeepSeek's own files."""
    mlp, x = small().model.layers[0].mlp, normal(2, 3, SMALL.hidden_size)
    y, _ = mlp(x)
    expected = [[ffn(mlp, token) for token in row] for row in x]
    np.testing.assert_allclose(y, expected, **CLOSE)


def test_experts_without_tokens_get_a_gradient_of_zero():
    """Catches NaN or noise for idle experts, and experts fed by their neighbours' rows."""
    mlp = block().map(lambda name, w: Parameter(w))
    x = Tensor(normal(1, 2, SMALL.hidden_size))
    y, routing = mlp(x)
    grads = backward(y, normal(*y.shape, seed=1))
    hit = set(routing.ids.reshape(-1))
    assert 0 < len(hit) < SMALL.n_routed_experts
    for e, expert in enumerate(mlp.experts):
        for _, w in expert.named_weights():
            assert grads[w].any() == (e in hit)


def test_experts_without_tokens_are_not_even_read():
    """Catches a stacked or copied weight array: an idle expert may stay on disk."""

    class Absent:
        shape = (5, 3)

        @property
        def T(self):
            raise AssertionError("an idle expert was read")

    w = normal(5, 3)
    ids = np.array([[1], [1]])
    y = expert_ops.grouped_linear(normal(2, 3), ids, Absent(), w, Absent())
    np.testing.assert_array_equal(y, normal(2, 3) @ w.T)


def test_rows_are_sorted_by_expert_then_token():
    """Catches an unstable sort: traces list rows in this order."""
    x, ids = np.arange(6.0)[None, :, None], np.array([[[2, 0], [0, 1], [2, 1], [1, 0], [0, 2], [1, 2]]])
    rows = moe.rows(x, ids, n_experts=3)
    np.testing.assert_array_equal(rows[:, 0], [0, 1, 3, 4, 1, 2, 3, 5, 0, 2, 4, 5])


def test_the_sum_over_experts_has_an_order():
    """Catches a sum in the order of the slots: permuting them (with their weights) changes no bit,
    because experts are added by ascending id."""
    rng = np.random.default_rng(0)
    ids = rng.standard_normal((1, 40, 12)).argsort(-1)[..., :4]
    weights, x = rng.random((1, 40, 4)), rng.standard_normal((1, 40, 8)).astype(np.float32)
    slots = rng.standard_normal(ids.shape).argsort(-1)
    results = []
    for i, w in ((ids, weights), (np.take_along_axis(a, slots, -1) for a in (ids, weights))):
        rows = moe.rows(x, i, n_experts=12)
        scaled = rows * np.arange(len(rows), dtype=np.float32)[:, None] ** 0.5
        results.append(moe.routed(scaled, i, w.astype(np.float32)))
    np.testing.assert_array_equal(*results)


def test_tokens_do_not_see_each_other():
    """Catches capacity limits, dropping, and any statistic over the batch: alone or in company, a
    token's output is the same up to the order of sums in a larger matrix product."""
    mlp, x = block(), normal(2, 6, SMALL.hidden_size)
    together, _ = mlp(x)
    for b, s in np.ndindex(2, 6):
        alone, _ = mlp(x[b : b + 1, s : s + 1])
        np.testing.assert_allclose(alone[0, 0], together[b, s], **CLOSE)


def test_weights_scale_the_routed_part_alone():
    """Catches routed_scaling_factor applied to the shared expert: doubling it adds one routed part."""
    x = normal(1, 4, SMALL.hidden_size)
    once, twice = (block(routed_scaling_factor=f)(x)[0] for f in (2.0, 4.0))
    shared = block().shared_experts.shared(x)
    np.testing.assert_allclose(twice - shared, 2 * (once - shared), **CLOSE)


def test_two_shared_experts_are_one_of_twice_the_width():
    """Catches shared experts averaged or weighted: the sum of two halves is the wide one."""
    wide, x = block(n_shared_experts=2).shared_experts, normal(1, 4, SMALL.hidden_size)
    half = SMALL.moe_intermediate_size
    parts = 0
    for span in (slice(0, half), slice(half, None)):
        cut = wide.map(lambda name, w, s=span: w[:, s] if "down" in name else w[s])
        parts = parts + cut.shared(x)
    np.testing.assert_allclose(wide.shared(x), parts, **CLOSE)


def test_gradients_are_those_of_the_loop():
    """Catches a weight gradient summed over the wrong rows, and a routing weight without gradient.
    The loop is made of Tensors, one linear per token and expert."""
    mlp, x = block(), normal(1, 5, SMALL.hidden_size)
    tracked = mlp.map(lambda name, w: w if name.endswith("_bias") else Parameter(w))
    dy = normal(1, 5, SMALL.hidden_size, seed=1)

    def loop(x, routing):
        y = tracked.shared_experts.shared(x)
        for s in range(5):
            token = [0.0] * 5
            for k in range(SMALL.num_experts_per_tok):
                e = tracked.experts[routing.ids[0, s, k]]
                row = x[:, s]
                a = nn_ops.swiglu(*(nn_ops.linear(row, p.weight) for p in (e.gate_proj, e.up_proj)))
                token[k] = nn_ops.linear(a, e.down_proj.weight) * routing.weights[:, s, k : k + 1]
            here = (np.arange(5) == s).astype(float)[None, :, None]
            y = y + sum(token[1:], token[0]).reshape(1, 1, -1) * here
        return y

    results = []
    for way in (lambda x: tracked(x)[0], lambda x: loop(x, tracked.gate(x))):
        grads = backward(way(Tensor(x)), dy)
        trained = [w for _, w in tracked.named_weights() if isinstance(w, Parameter)]
        results.append([grads.get(w, np.zeros(w.shape)) for w in trained])
    for g, expected in zip(*results, strict=True):
        np.testing.assert_allclose(g, expected, **CLOSE)
