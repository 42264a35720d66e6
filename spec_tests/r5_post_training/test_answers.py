"""R 5.1: fine-tuning on answers; several examples in a row do not see each other."""

import math

import numpy as np
import pytest

from refimpl.autograd import SpecError, backward
from refimpl.spec_tests.cases import toys
from refimpl.spec_tests.cases.small_models import CLOSE, small
from refimpl.train.post import sft
from refimpl.train.post.examples import Example, one_a_row, packed
from refimpl.train.post.likelihood import log_sigmoid, log_softmax


def examples(seed=0, n=7, vocab=29):
    rng = np.random.default_rng(seed)
    return [Example(*(rng.integers(0, vocab, rng.integers(1, 6)).tolist() for _ in "pa")) for _ in range(n)]


def logits(model, batch):
    return model(model.inputs(**batch.inputs())).logits


def by_hand(model, examples):
    """Mean of -log p over the tokens of all answers, each example run alone, one token at a time."""
    terms = []
    for e in examples:
        z = model(model.inputs([[*e.prompt, *e.answer]])).logits[0]
        for i, token in enumerate(e.answer):
            row = [float(v) for v in z[len(e.prompt) + i - 1]]
            terms.append(math.log(math.fsum(math.exp(v) for v in row)) - row[token])
    return math.fsum(terms) / len(terms)


@pytest.mark.parametrize("seed", range(3))
def test_only_answers_are_learned_packed_or_not(seed):
    """Catches a prompt that counts, an answer's first or last token that does not, an example that sees its neighbour, a document
    whose first token is foretold by the one before it, padding that counts.
    """
    given, model = examples(seed), small()
    expected = by_hand(model, given)
    for batch in (one_a_row(given), packed(given, 11), packed(given, 30, pad=5)):
        np.testing.assert_allclose(sft.loss(logits(model, batch), batch.labels), expected, **CLOSE)
        inputs = model.inputs(**batch.inputs())
        np.testing.assert_allclose(model.loss(inputs)[0], expected, **CLOSE)  # what train.step goes down


def test_every_example_lies_whole_in_one_row():
    """Catches an example cut or written over by another."""
    given = examples(4, n=20)
    batch = packed(given, 12)
    for i, e in enumerate(given):
        rows = np.argwhere(batch.documents == i + 1)
        assert len(set(rows[:, 0])) == 1 and (np.diff(rows[:, 1]) == 1).all()
        assert batch.tokens[batch.documents == i + 1].tolist() == [*e.prompt, *e.answer]
    assert batch.valid.sum() == sum(map(len, given))
    assert len(batch.tokens) < len(given)


def test_what_cannot_be_learned_is_refused():
    """Catches an answer cut from its prompt, an example without answer, a batch without labels whose loss would be 0 / 0."""
    with pytest.raises(SpecError, match=r"9 tokens; a row has 8\n  in example 1"):
        packed([Example([1], [2]), Example([1] * 4, [2] * 5)], 8)
    with pytest.raises(SpecError, match="empty prompt"):
        one_a_row([Example([], [1])])
    with pytest.raises(SpecError, match="empty answer"):
        one_a_row([Example([1], [])])
    with pytest.raises(SpecError, match="no examples"):
        packed([], 4)
    with pytest.raises(SpecError, match="no label counts"):
        sft.loss(np.zeros((1, 2, 3)), np.array([[1, -100]]))


def test_the_schedule_of_r_5_1():
    """Catches a cosine that ends early or at zero: 5e-6 at the first step, 1e-6 at the last and after, halfway in the middle."""
    rate = sft.cosine(101)
    assert [sft.PEAK * rate(t) for t in (0, 50, 100, 200)] == pytest.approx([5e-6, 3e-6, 1e-6, 1e-6], rel=1e-12)
    with pytest.raises(SpecError, match="no shape"):
        sft.cosine(1)


def test_log_sigmoid():
    """Catches overflow, and a slope at 0 that is not 1/2: there preference training begins."""
    from refimpl.autograd import Parameter

    x = Parameter(np.array([-800.0, -1.0, 0.0, 1.0, 800.0]))
    y = log_sigmoid(x)
    expected = [-800.0, math.log(1 / (1 + math.e)), -math.log(2), math.log(1 / (1 + 1 / math.e)), 0.0]
    np.testing.assert_allclose(y.data, expected, rtol=1e-15)
    slopes = backward(y, np.ones(5))[x]
    np.testing.assert_allclose(slopes, [1.0, 1 / (1 + 1 / math.e), 0.5, 1 / (1 + math.e), 0.0], atol=1e-15)


def test_log_softmax_of_large_logits():
    """Catches overflow: the numbers are 1000 + log of a distribution."""
    p = np.array([0.5, 0.25, 0.25])
    np.testing.assert_allclose(log_softmax(1000 + np.log(p)), np.log(p), rtol=1e-12)  # 1000 costs three digits


@pytest.mark.slow
def test_a_model_learns_two_tasks():
    """Catches a step that does not train on answers: by chance one answer in 64 is right."""
    weights = toys.both()
    assert toys.accuracy(weights, toys.every(toys.COPY)) > 0.95
    assert toys.accuracy(weights, toys.every(toys.REVERSE)) > 0.9
