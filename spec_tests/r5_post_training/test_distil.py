"""R 5.4.1: distillation from what a teacher generates; the divergences are described in articles, not in V3."""

import math

import numpy as np
import pytest

from refimpl.autograd import SpecError, directional
from refimpl.infer import Settings
from refimpl.spec_tests.cases import toys
from refimpl.train import State, init, step_on
from refimpl.train.post import distil
from refimpl.train.post.examples import one_a_row
from refimpl.train.post.likelihood import logits_of


def draw(seed=0, rows=3, length=5, vocab=6):
    rng = np.random.default_rng(seed)
    student, teacher = 2 * rng.normal(size=(2, rows, length, vocab))
    labels = rng.integers(0, vocab, (rows, length))
    labels[rng.random(labels.shape) < 0.3] = -100
    return student, teacher, labels


def probabilities(row, temperature):
    weights = [math.exp(z / temperature) for z in row]
    return [w / math.fsum(weights) for w in weights]


def by_hand(student, teacher, labels, temperature, forward):
    """Mean KL over the positions whose next label counts, one token of the vocabulary at a time."""
    found = []
    for b in range(len(labels)):
        for i in range(labels.shape[1] - 1):
            if labels[b, i + 1] != -100:
                s, t = (probabilities(z[b, i], temperature) for z in (student, teacher))
                p, q = (t, s) if forward else (s, t)
                found.append(math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    return math.fsum(found) / len(found)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("loss", "forward"), [(distil.forward_kl, True), (distil.reverse_kl, False)])
def test_the_divergences(loss, forward, temperature):
    """Catches the arguments exchanged, logits shifted or not like labels, a temperature for one side only."""
    student, teacher, labels = draw()
    expected = by_hand(student, teacher, labels, temperature, forward)
    np.testing.assert_allclose(loss(student, teacher, labels, temperature=temperature), expected, rtol=1e-12)
    assert directional(lambda z: loss(z, teacher, labels, temperature=temperature), student) < 1e-7
    assert abs(loss(teacher, teacher, labels)) < 1e-15


def test_what_is_refused():
    """Catches another vocabulary, a temperature of 0, a batch without labels."""
    student, teacher, labels = draw()
    with pytest.raises(SpecError, match="do not fit"):
        distil.forward_kl(student, teacher[..., 1:], labels)
    with pytest.raises(SpecError, match="temperature is 0"):
        distil.reverse_kl(student, teacher, labels, temperature=0)
    with pytest.raises(SpecError, match="no label counts"):
        distil.forward_kl(student, teacher, labels * 0 - 100)


@pytest.mark.parametrize("loss", [distil.forward_kl, pytest.param(distil.reverse_kl, marks=pytest.mark.slow)])
def test_a_student_learns_from_logits(loss):
    """From random weights to what the teacher does, without ever seeing which label is right. Catches a step away from it."""
    teacher, rng = toys.both(), np.random.default_rng(0)
    state, first = State(init(toys.TOY, seed=5, std=0.1)), None
    for _ in range(80):
        batch = one_a_row(toys.some(toys.COPY, 24, rng))
        target = logits_of(toys.TOY, teacher, batch)

        def objective(leaves, batch=batch, target=target, weights=state.weights):
            return loss(logits_of(toys.TOY, weights | leaves, batch), target, batch.labels)

        state, report = step_on(state, objective, toys.RECIPE)
        first = first or report.loss
    assert report.loss < 0.1 * first
    assert toys.accuracy(state.weights, toys.every(toys.COPY)) > 0.8


def test_a_student_learns_from_generated_answers():
    """The teacher's answers, those that a rule rejects left out, are examples for fine-tuning (R 5.1). Catches answers under the
    wrong prompts, a filter that lets pass what it should not.
    """
    teacher, rng = toys.both(), np.random.default_rng(0)
    prompts = [e.prompt for e in toys.some(toys.COPY, 200, rng)]

    def right(prompt, answer):
        return float(answer == prompt[1:] and prompt[1] < 4)

    found = distil.generated(toys.TOY, teacher, prompts, Settings(temperature=1.5, max_tokens=2, seed=3), keep=right)
    every = distil.generated(toys.TOY, teacher, prompts, Settings(temperature=1.5, max_tokens=2, seed=3))
    assert [e.prompt for e in every] == prompts
    assert found == [e for e in every if e.answer == e.prompt[1:] and e.prompt[1] < 4] and len(found) > 50
    batches = [[found[i] for i in rng.integers(0, len(found), 16)] for _ in range(80)]
    student = toys.fine_tune(init(toys.TOY, seed=5, std=0.1), batches)
    few = [e for e in toys.every(toys.COPY) if e.prompt[1] < 4]
    assert toys.accuracy(student, few) > 0.8
