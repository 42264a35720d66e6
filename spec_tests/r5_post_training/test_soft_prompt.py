"""Prompt tuning (arXiv 2104.08691), described in articles, not in V3."""

from dataclasses import replace

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.spec_tests.cases import toys
from refimpl.spec_tests.cases.small_models import CLOSE, small
from refimpl.train import AdamW, State, step_on
from refimpl.train.post import sft, soft_prompt
from refimpl.train.post.examples import Example, one_a_row
from refimpl.train.post.likelihood import logits_of


@pytest.mark.parametrize("tied", [False, True])
def test_a_prompt_of_real_tokens_is_those_tokens(tied):
    """Catches a prompt behind the text, logits of the prompt's own ids, a head that the rows leak into."""
    whole = small(tie_word_embeddings=tied)
    weights = {n: w for n, w in whole.named_weights() if hasattr(w, "dtype")}
    given = [Example([3, 1], [4, 1]), Example([5], [9, 2, 6])]
    prompt = weights[soft_prompt.EMBEDDING][[7, 8]]
    batch = one_a_row(soft_prompt.fronted(whole.config, given, 2))
    real = one_a_row([Example([7, 8, *e.prompt], e.answer) for e in given])
    found = soft_prompt.logits(whole.config, weights, prompt, batch)
    np.testing.assert_allclose(found, logits_of(whole.config, weights, real), **CLOSE)


def test_what_is_refused():
    """Catches a prompt of another width, ids that are no tokens."""
    weights = toys.both()
    with pytest.raises(SpecError, match="hidden_size=32"):
        soft_prompt.extended(toys.TOY, weights, np.zeros((2, 5)))
    for ids in ([], [99]):
        with pytest.raises(SpecError, match="of 12 tokens"):
            soft_prompt.init(weights, ids)


def test_500_examples_teach_a_prompt_of_one_vector():
    """The frozen model knows the task but is not told: after two passes over 500 examples the vector tells it. Catches a weight
    that trains beside the prompt, a prompt that gets no gradient.
    """
    weights = toys.both()
    kept = {n: w.copy() for n, w in weights.items()}
    bare = [replace(e, prompt=e.prompt[1:]) for e in toys.some(toys.REVERSE, 500, np.random.default_rng(5))]
    asked = [replace(e, prompt=e.prompt[1:]) for e in toys.every(toys.REVERSE)]
    train, test = (soft_prompt.fronted(toys.TOY, examples, 1) for examples in (bare, asked))

    def accuracy(prompt):
        return toys.accuracy(weights, test, logits=lambda c, w, batch: soft_prompt.logits(c, w, prompt, batch))

    state = State({"prompt": soft_prompt.init(weights, [toys.PLAIN])})
    before = accuracy(state.weights["prompt"])
    recipe = replace(
        toys.RECIPE, opt=AdamW(lr=5e-2, weight_decay=0.0)
    )  # at 2e-2 two passes end at 0.8 to 1, by the last bits
    for start in [*range(0, 500, 25)] * 2:
        batch = one_a_row(train[start : start + 25])

        def objective(leaves, batch=batch):
            return sft.loss(soft_prompt.logits(toys.TOY, weights, leaves["prompt"], batch), batch.labels)

        state, _ = step_on(state, objective, recipe)
    assert before < 0.2 and accuracy(state.weights["prompt"]) > 0.9
    for n, w in weights.items():
        np.testing.assert_array_equal(w, kept[n])
