"""Pruning of weights and of experts, described in articles, not in V3."""

from dataclasses import replace

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.layers.module import is_buffer
from refimpl.spec_tests.cases import toys
from refimpl.spec_tests.cases.small_models import CLOSE, small, some_tokens
from refimpl.train import AdamW, State, step_on
from refimpl.train.post import fewer_experts, magnitude, sft
from refimpl.train.post.examples import one_a_row
from refimpl.train.post.likelihood import logits_of


def test_the_smallest_go_and_ties_go_in_order():
    """Catches signs, a share rounded up, ties that go all or none."""
    w = np.array([[3.0, -1.0, 1.0], [0.5, -4.0, 1.0]])
    np.testing.assert_array_equal(magnitude.mask(w, 0.5), [[1, 0, 0], [0, 1, 1]])
    np.testing.assert_array_equal(magnitude.mask(w, 0.49), [[1, 0, 1], [0, 1, 1]])
    assert magnitude.mask(w, 0).all() and not magnitude.mask(w, 1).any()


def test_which_weights():
    """Catches a pruned norm, embedding, head or router; expert layers and attention's low ranks left out."""
    names = set(magnitude.masks(toys.both(), 0.5))
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in names
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight" in names
    assert not [n for n in names if "norm" in n or "embed" in n or "lm_head" in n or "gate.weight" in n]
    with pytest.raises(SpecError, match=r"share is 1\.5"):
        magnitude.masks(toys.both(), 1.5)
    with pytest.raises(SpecError, match="no weight's name fits"):
        magnitude.masks(toys.both(), 0.5, pattern="*.bias")
    with pytest.raises(SpecError, match="that are not there"):
        magnitude.masked({}, {"a": np.ones(1)})


def test_training_on_brings_back_what_pruning_took_and_zeros_stay():
    """Catches a mask that the gradient does not know. 85 % of the linear layers' weights leave."""
    weights, rng = toys.both(), np.random.default_rng(0)
    masks = magnitude.masks(weights, 0.85)
    state = State(magnitude.masked(weights, masks))
    asked = toys.every(toys.COPY) + toys.every(toys.REVERSE)
    before = toys.accuracy(state.weights, asked)
    recipe = replace(toys.RECIPE, opt=AdamW(lr=3e-3, weight_decay=0.1))
    for _ in range(60):
        batch = one_a_row(toys.some(toys.COPY, 12, rng) + toys.some(toys.REVERSE, 12, rng))

        def objective(leaves, batch=batch, held=state.weights):
            return sft.loss(logits_of(toys.TOY, held | magnitude.masked(leaves, masks), batch), batch.labels)

        state, _ = step_on(state, objective, recipe)
    assert before < 0.7 and toys.accuracy(state.weights, asked) > 0.85
    for n, m in masks.items():
        assert not state.weights[n][m == 0].any() and (m == 0).mean() == pytest.approx(0.85, abs=0.01)


# ---- Experts


def test_the_most_used_of_every_group():
    """Catches the most used over all groups, ties that go to the later, ids counted from the group's first."""
    c = small().config.replace(n_routed_experts=8, n_group=2, topk_group=2)
    load = {1: np.array([5, 9, 9, 1, 0, 0, 7, 0])}
    assert fewer_experts.most_used(load, c, per_group=2)[1].tolist() == [1, 2, 4, 6]
    assert fewer_experts.most_used(load, c, per_group=3)[1].tolist() == [0, 1, 2, 4, 5, 6]
    with pytest.raises(SpecError, match="per_group is 5"):
        fewer_experts.most_used(load, c, per_group=5)
    with pytest.raises(SpecError, match="load"):
        fewer_experts.most_used({1: np.ones(3)}, c, per_group=1)


def kept_everywhere(c, per_group, seed=0):
    rng, size = np.random.default_rng(seed), c.n_routed_experts // c.n_group
    layers = [i for i in range(c.num_hidden_layers + c.num_nextn_predict_layers) if c.is_moe(i)]
    return {i: np.concatenate([g * size + rng.permutation(size)[:per_group] for g in range(c.n_group)]) for i in layers}


@pytest.mark.parametrize("seed", range(3))
def test_the_smaller_model_is_the_larger_one_that_never_chooses_what_left(seed):
    """Catches experts renumbered unlike their router's rows, a bias not cut, groups mixed. Told by a bias of
    -100, which no affinity in 0..1 outweighs and which enters no weight.
    """
    whole = small(seed)
    c = whole.config
    weights = {n: w for n, w in whole.named_weights() if hasattr(w, "dtype")}
    kept = kept_everywhere(c, 2, seed)
    config, fewer = fewer_experts.pruned(c, weights, kept)
    never = dict(weights)
    for n in filter(is_buffer, weights):
        gone = np.setdiff1d(np.arange(c.n_routed_experts), kept[int(n.split(".")[2])])
        never[n] = weights[n].copy()
        never[n][gone] -= 100
    a, b = type(whole).from_weights(config, fewer), type(whole).from_weights(c, never)
    tokens = some_tokens()
    found, expected = (m(m.inputs(tokens)).logits for m in (a, b))
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert config.n_routed_experts == 8 and np.abs(found - whole(whole.inputs(tokens)).logits).max() > 1e-3


def test_prunings_that_are_refused():
    """Catches groups of different sizes, a layer that nobody decided on, too few experts for the top k."""
    whole = small()
    weights, kept = {n: w for n, w in whole.named_weights() if hasattr(w, "dtype")}, kept_everywhere(whole.config, 2)
    with pytest.raises(SpecError, match="as many"):
        fewer_experts.pruned(whole.config, weights, {1: kept[1][:-1]})
    with pytest.raises(SpecError, match=r"which experts of this layer stay\n  while pruning"):
        fewer_experts.pruned(whole.config, weights, {0: kept[1]})
    with pytest.raises(SpecError, match="no layer"):
        fewer_experts.pruned(whole.config, weights, {})
    with pytest.raises(SpecError, match="out of range"):
        fewer_experts.pruned(whole.config, weights, {1: np.array([0, 3, 6, 90])})
    with pytest.raises(SpecError, match="twice"):
        fewer_experts.pruned(whole.config, weights, {1: np.array([0, 0, 3, 4, 6, 7, 9, 10])})
