"""Direct preference optimisation (arXiv 2305.18290), described in articles, not in V3."""

import math
from dataclasses import replace

import numpy as np
import pytest

from refimpl.autograd import Parameter, SpecError, backward
from refimpl.layers.precision import FLOAT32
from refimpl.spec_tests.cases import toys
from refimpl.train import State, step_on
from refimpl.train.post import dpo
from refimpl.train.post.examples import Example
from refimpl.train.post.grpo_step import known_logp
from refimpl.train.post.likelihood import logits_of


def test_loss_and_gradient_one_pair_at_a_time():
    """Catches chosen and rejected exchanged, beta outside the sigmoid, a sum for the mean, a reference that is not taken away."""
    rng = np.random.default_rng(0)
    policy, reference, beta = Parameter(rng.normal(size=8)), rng.normal(size=8), 0.7
    x = [(policy.data[i] - reference[i]) - (policy.data[i + 4] - reference[i + 4]) for i in range(4)]
    y = dpo.loss(policy, reference, beta=beta)
    np.testing.assert_allclose(y.data, math.fsum(math.log(1 + math.exp(-beta * d)) for d in x) / 4, rtol=1e-12)
    slope = np.array([beta / (1 + math.exp(beta * d)) / 4 for d in x])  # eq 7's gradient: beta sigmoid(-beta d)
    np.testing.assert_allclose(backward(y)[policy], np.concatenate([-slope, slope]), rtol=1e-12)


def test_pairs_are_answers_to_the_same_prompts():
    """Catches pairs out of step."""
    with pytest.raises(SpecError, match="same prompts"):
        dpo.pairs([Example([1], [2])], [Example([2], [3])])
    with pytest.raises(SpecError, match="same prompts"):
        dpo.pairs([Example([1], [2])], [])
    with pytest.raises(SpecError, match=r"expected \(2N,\)"):
        dpo.loss(np.zeros(3), np.zeros(3))


def gains(weights, batch):
    """log p(chosen) - log p(rejected) of every pair."""
    p = known_logp(toys.TOY, weights, batch, FLOAT32).sum(axis=1)
    return p[: len(p) // 2] - p[len(p) // 2 :]


def pairs_of(xy):
    """Asked without a task: reversed is better than copied."""
    sides = (toys.REVERSE, toys.COPY)
    return dpo.pairs(*[[toys.example(task, x, y, front=toys.PLAIN) for x, y in xy if x != y] for task in sides])


def test_a_model_comes_to_prefer():
    """A model that knows both tasks, asked without a task token, is told to prefer reversing; a quarter of the pairs it never sees.
    The
    first loss is log 2. Catches a step the wrong way, a reference that moves along.
    """
    weights = toys.both()
    xy = (
        np.random.default_rng(0)
        .permutation([(x, y) for x in range(toys.SYMBOLS) for y in range(toys.SYMBOLS)])
        .tolist()
    )
    seen, unseen = pairs_of(xy[:48]), pairs_of(xy[48:])
    state, losses = State(weights), []
    reference = known_logp(toys.TOY, weights, seen, FLOAT32).sum(axis=1)

    def objective(leaves):
        logits = logits_of(toys.TOY, weights | leaves, seen)
        return dpo.loss(dpo.sequence_logp(logits, seen.labels), reference, beta=0.3)

    recipe = replace(toys.RECIPE, opt=replace(toys.RECIPE.opt, lr=1e-2))
    for _ in range(20):
        state, report = step_on(state, objective, recipe)
        losses.append(report.loss)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.2
    assert (gains(weights, unseen) > 0).mean() < 0.8 and (gains(state.weights, unseen) > 0).mean() > 0.9
