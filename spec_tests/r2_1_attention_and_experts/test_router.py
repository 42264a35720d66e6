"""The gate of DeepSeekMoE (R 2.1.2, eqs 12-16), against loops over tokens and experts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import Parameter, Tensor, backward, directional
from refimpl.layers import Config, Dialect, router
from refimpl.layers.router import MoEGate
from refimpl.spec_tests.cases.small_models import SMALL

E = 12  # four groups of three
V2 = {"scoring_func": "softmax", "norm_topk_prob": False}


def gate_of(bias=None, dtype=np.float64, **changes):
    """A gate whose logits are its input: hidden_size = E, weight = identity."""
    gate = MoEGate(SMALL.replace(hidden_size=E, **changes))
    gate.weight = np.eye(E, dtype=dtype)
    if gate.config.topk_method == "noaux_tc":
        gate.e_score_correction_bias = np.zeros(E, dtype) if bias is None else np.array(bias, dtype)
    return gate


def logit(p):
    """The logits whose sigmoid is p."""
    p = np.asarray(p, float)
    return np.log(p / (1 - p))[None, None]


def by_hand(z, bias, c: Config):
    """(ids, weights) of one token, R eqs 12-16 one expert at a time; ties to the lower index."""
    if c.scoring_func == "sigmoid":
        s = [1 / (1 + math.exp(-v)) for v in z]
    else:
        s = [math.exp(v - max(z)) for v in z]
        s = [v / math.fsum(s) for v in s]
    a = [v + b for v, b in zip(s, bias, strict=True)] if c.topk_method == "noaux_tc" else list(s)
    size = len(z) // c.n_group
    allowed = range(len(z))
    if c.topk_method != "greedy":
        best = 2 if c.topk_method == "noaux_tc" else 1
        members = [a[g * size : (g + 1) * size] for g in range(c.n_group)]
        rank = [sum(sorted(m, reverse=True)[:best]) for m in members]
        groups = sorted(range(c.n_group), key=lambda g: (-rank[g], g))[: c.topk_group]
        allowed = [e for e in allowed if e // size in groups]
    ids = sorted(allowed, key=lambda e: (-a[e], e))[: c.num_experts_per_tok]
    chosen = [s[e] for e in ids]
    total = math.fsum(chosen) + 1e-20 if c.norm_topk_prob else 1.0
    return ids, [c.routed_scaling_factor * v / total for v in chosen]


FAMILIES = {
    "V3": {},
    "V3, one group": {"n_group": 1, "topk_group": 1},
    "V3, all groups": {"topk_group": 4},
    "V2": {**V2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
    "V2-Lite": {**V2, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
}
# Dyadic numbers, so that ties are exact and frequent; sigmoids of equal logits are equal bits.
grid = st.integers(-6, 6).map(lambda i: i / 4)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(
    z=st.lists(st.lists(grid, min_size=E, max_size=E), min_size=2, max_size=3),
    bias=st.lists(grid, min_size=E, max_size=E),
)
def test_ids_and_weights_are_those_of_the_loops(family, z, bias):
    """Catches any other group rule, tie rule, order, normalisation or scale."""
    gate = gate_of(bias, **FAMILIES[family])
    r = gate(np.array([z]))
    for t, row in enumerate(z):
        ids, weights = by_hand(row, bias, gate.config)
        assert list(r.ids[0, t]) == ids
        np.testing.assert_allclose(r.weights[0, t], weights, rtol=1e-13)


# ---- Bias


def test_bias_selects_and_does_not_weigh():
    """R eq 16: "the bias term is only used for routing". Catches gates from biased scores: expert 11
    is chosen for its bias alone and gets the weight of its own small score."""
    s = [0.9, 0.8, 0.7, 0.6] + [0.5] * 7 + [0.1]
    r = gate_of([0.0] * 11 + [5.0], n_group=1, topk_group=1)(logit(s))
    assert list(r.ids[0, 0]) == [11, 0, 1, 2]
    np.testing.assert_allclose(r.weights[0, 0] / 2.5, np.array([0.1, 0.9, 0.8, 0.7]) / 2.5)
    biased = np.array([5.1, 0.9, 0.8, 0.7])
    assert not np.allclose(r.weights[0, 0], 2.5 * biased / biased.sum())


@settings(max_examples=20, deadline=None)
@given(st.lists(grid, min_size=E, max_size=E), st.integers(-8, 8))
def test_a_constant_added_to_every_bias_changes_nothing(bias, c):
    """Catches a fill, threshold or group score that is not shift-invariant (zero fill is not).
    Scores are dyadic, so that no rounding of s + b can reorder them."""
    s = np.array([[[1, 5, 3, 7, 2, 8, 6, 4, 9, 11, 10, 12]]]) / 16.0

    def ids(b):
        a = router.choice(s, np.array(b))
        kept = router.groups(router.group_scores(a, n_group=4, best=2), topk_group=2)
        return router.ids(a, kept, k=4, n_group=4, fill=-np.inf)

    np.testing.assert_array_equal(ids(bias), ids([b + c for b in bias]))


def test_no_gradient_reaches_the_bias():
    """Catches a bias trained by gradient: it is moved by load alone (R 2.1.2)."""
    gate = gate_of()
    gate.weight = Parameter(np.random.default_rng(0).standard_normal((E, E)))
    gate.e_score_correction_bias = bias = Parameter(np.zeros(E))
    x = Tensor(np.random.default_rng(1).standard_normal((1, 3, E)))
    r = gate(x)
    grads = backward(r.weights, np.ones(r.weights.shape))
    assert bias not in grads and {x, gate.weight} <= set(grads)


def test_weights_have_the_gradient_of_the_normalised_scores():
    """Catches a detached denominator; the selection itself is constant nearby."""
    gate, z = gate_of(), np.random.default_rng(3).standard_normal((1, 2, E))
    fixed = gate(z).ids

    def weights(z):
        s = router.scores(z, func="sigmoid")
        return router.weights(s, fixed, normalise=True, eps=1e-20, scale=2.5)

    assert directional(weights, z) < 1e-6


# ---- Groups


def test_a_group_counts_its_two_best():
    """Catches max (V2's rule) for V3: group 1 has the best expert, groups 0 and 2 the best pairs."""
    s = [0.6, 0.6, 0.1] + [0.9, 0.05, 0.05] + [0.5, 0.55, 0.1] + [0.3] * 3
    assert set(gate_of(num_experts_per_tok=2)(logit(s)).ids[0, 0]) == {0, 1}
    v2 = gate_of(topk_method="group_limited_greedy", num_experts_per_tok=2)
    assert set(v2(logit(s)).ids[0, 0]) == {3, 0}


def test_groups_are_ranked_by_biased_scores():
    """Catches group scores from the raw affinities, as R's text would allow and no code does."""
    s, bias = [0.9] * 6 + [0.2] * 6, [0.0] * 9 + [3.0] * 3
    chosen = gate_of(bias)(logit(s)).ids[0, 0] // 3
    assert set(chosen) == {3, 0}


def test_masked_groups_stay_out_when_scores_are_negative():
    """Catches the zero fill of HF 4.51-4.56: with biases below -s, a masked expert at 0 beats every
    allowed one, and the node limit is broken. Also shows what Dialect.masked_group_fill does."""
    s, bias = np.linspace(0.9, 0.1, E), np.full(E, -2.0)
    ids = gate_of(bias)(logit(s)).ids[0, 0]
    assert len(set(ids // 3)) <= 2
    zero = gate_of(bias, dialect=Dialect(masked_group_fill="zero"))(logit(s)).ids[0, 0]
    assert set(zero // 3) == {2, 3}  # groups 0 and 1 were kept; their experts lose against 0
    positive = gate_of(np.zeros(E), dialect=Dialect(masked_group_fill="zero"))
    np.testing.assert_array_equal(positive(logit(s)).ids[0, 0], ids)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=E, max_size=E), st.lists(grid, min_size=E, max_size=E))
def test_at_most_topk_group_groups_are_used(z, bias):
    """R 2.1.2: "each token will be sent to at most M nodes". Catches any leak between groups."""
    ids = gate_of(bias)(np.array([[z]]) / 4.0).ids[0, 0]
    assert len(set(ids // 3)) <= 2 and len(set(ids)) == 4


def test_ties_go_to_the_lower_index():
    """Catches unstable sorts: all scores equal means groups 0 and 1 and experts 0, 1, 2, 3. 256
    experts, because small sorts are stable by accident."""
    assert list(gate_of()(np.zeros((1, 1, E))).ids[0, 0]) == [0, 1, 2, 3]
    many = np.zeros((1, 1, 256), np.float32)
    many[..., 100:] = 1
    assert list(router.top_k(many, 8)[0, 0]) == list(range(100, 108))
    assert list(router.groups(np.zeros((1, 1, 64)), topk_group=4)[0, 0]) == [0, 1, 2, 3]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_experts_may_be_renamed_within_a_group(seed):
    """Catches a dependence on an expert's place: permuted logits and biases give permuted ids and
    the same weights. Random scores do not tie."""
    rng = np.random.default_rng(seed)
    z, bias = rng.standard_normal((1, 3, E)), 0.3 * rng.standard_normal(E)
    order = np.concatenate([3 * g + rng.permutation(3) for g in rng.permutation(4)])
    here, there = gate_of(bias)(z), gate_of(bias[order])(z[..., order])
    np.testing.assert_array_equal(order[there.ids], here.ids)
    np.testing.assert_array_equal(there.weights, here.weights)


def test_one_group_is_no_group():
    """Catches a group step that selects even where there is nothing to limit."""
    rng = np.random.default_rng(0)
    z, bias = rng.standard_normal((2, 5, E)), 0.3 * rng.standard_normal(E)
    plain = np.argsort(-(1 / (1 + np.exp(-z)) + bias), kind="stable")[..., :4]
    for groups in (1, 4):
        r = gate_of(bias, n_group=groups, topk_group=groups)(z)
        np.testing.assert_array_equal(r.ids, plain)


# ---- Weights


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-60, 60), min_size=E, max_size=E), st.floats(0.5, 20))
def test_weights_sum_to_the_scale(z, scale):
    """Catches normalisation over all experts, over biased scores, or a scale applied before it."""
    r = gate_of(routed_scaling_factor=scale)(np.array([[z]]) / 4.0)
    np.testing.assert_allclose(r.weights.sum(-1), scale, rtol=1e-13)


def test_scores_that_underflow_give_zeros():
    """Catches 0/0: e^-110 is 0 in float32, and 1e-20 in the denominator makes the weights 0. DeepSeek's
    own code adds nothing (Dialect.topk_denominator_eps = 0) and gets NaN."""
    z = np.full((1, 1, E), -110, np.float32)
    r = gate_of(dtype=np.float32)(z)
    assert r.scores.dtype == np.float32 and not r.scores.any()
    np.testing.assert_array_equal(r.weights, np.zeros((1, 1, 4)))
    with np.errstate(invalid="ignore"):
        bare = gate_of(dtype=np.float32, dialect=Dialect(topk_denominator_eps=0.0))(z)
    assert np.isnan(bare.weights).all()


def test_large_scores_do_not_overflow():
    """Catches e^z computed as it stands: logits of +-1000 give scores 1 and 0 without a warning."""
    z = np.where(np.arange(E) < 4, 1000.0, -1000.0)[None, None]
    for family in ("V3", "V2"):
        r = gate_of(**FAMILIES[family])(z)
        assert np.isfinite(r.weights).all() and list(r.ids[0, 0]) == [0, 1, 2, 3]


def test_v2_weights_are_shares_of_all_experts():
    """Catches a renormalisation that V2 does not have: chosen softmax scores x 16, summing below 16."""
    z = np.random.default_rng(0).standard_normal((1, 1, E))
    gate = gate_of(**FAMILIES["V2"])
    r = gate(z)
    assert not hasattr(gate, "e_score_correction_bias")
    share = np.exp(z[0, 0]) / np.exp(z).sum()
    np.testing.assert_allclose(r.weights[0, 0], 16 * share[r.ids[0, 0]], rtol=1e-13)
    assert r.weights.sum() < 16
