"""A step down any objective is the step of pre-training, if the objective is pre-training's loss."""

import numpy as np
import pytest

from refimpl.layers.module import is_buffer
from refimpl.layers.precision import BF16, FLOAT32
from refimpl.model import ForCausalLM
from refimpl.spec_tests.cases import toys
from refimpl.train import AdamW, Recipe, State, init, step, step_on


@pytest.mark.parametrize("plan", [FLOAT32, BF16], ids=lambda p: p.name)
def test_it_is_the_step_of_pre_training(plan):
    """Bit for bit, twice. Catches weights that the plan does not round, a schedule, clipping or decay left out."""
    rng, recipe = np.random.default_rng(0), Recipe(plan, AdamW(), lambda t: 1 / (1 + t), max_norm=0.1, gamma=0.0)
    state = other = State(init(toys.TOY, std=0.1))
    for _ in range(2):
        tokens = rng.integers(0, toys.TOY.vocab_size, (3, 8))

        def objective(leaves, tokens=tokens, held=other.weights):
            model = ForCausalLM.from_weights(toys.TOY, held | leaves)
            return model.loss(model.inputs(tokens, labels=tokens))[0]

        state, report = step(toys.TOY, state, tokens, recipe)
        other, same = step_on(other, objective, recipe)
        assert (same.loss, same.norm, same.step) == (report.loss, report.norm, report.step)
        for n, w in state.weights.items():
            np.testing.assert_array_equal(other.weights[n], w)


def test_balancing_biases_are_no_leaves():
    """Catches a bias that an objective over all leaves would train, or that weight decay would shrink."""
    weights = {n: w + 1 for n, w in init(toys.TOY).items()}
    state, _ = step_on(State(weights), lambda leaves: sum(leaf.sum() for leaf in leaves.values()), toys.RECIPE)
    for n, w in weights.items():
        assert (state.weights[n] == w).all() == is_buffer(n), n
