"""Several tasks at once, as articles describe and V3 does not do: losses, weights between them, samples that stay apart."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.autograd import Gradients, Parameter, Tensor, backward
from refimpl.model import ForCausalLM
from refimpl.spec_tests.cases import tasks as cases
from refimpl.spec_tests.cases.small_models import CLOSE
from refimpl.train import memory
from refimpl.train.recipe import divided
from refimpl.train.tasks import History, Own, step, weighting
from refimpl.train.tasks import own as names
from refimpl.train.tasks.step import Objective, weights

HOW = replace(cases.EXACT, mtp_weight=0.3, aux_weight=1e-2, gamma=0.01)


def model_of(c, state):
    return ForCausalLM.from_weights(c, {n: w.astype(np.float64) for n, w in state.weights.items()})


def drawn(of, c, seed=5):
    """What tasks have of their own, not at 0."""
    rng, own = np.random.default_rng(seed), Own().within(of, c.hidden_size)
    return replace(own, weights={n: rng.normal(size=w.shape).astype(np.float32) for n, w in own.weights.items()})


def losses_by_hand(c, state, of, own, held, rows=2):
    """L_t of every task in float64 loops. Samples of a masked task are run alone, the others as their row has them."""
    model, found = model_of(c, state), []
    for number, t in enumerate(of.tasks):
        terms = []
        for samples in held[number * rows : (number + 1) * rows]:
            for group in [[s] for s in samples] if t.masked else [samples]:
                ids = [int(i) for s in group for i in (*s.prompt, *s.answer)]
                out, at = model(model.inputs([ids])), 0
                for s in group:
                    at += len(s.prompt)
                    if t.loss == "regression":
                        w, b = (own.weights[name(t.name)].tolist() for name in (names.weight, names.bias))
                        h = out.hidden[0, at - 1].tolist()
                        terms.append((math.fsum(x * y for x, y in zip(h, w, strict=True)) + b[0] - s.value) ** 2)
                    for token in s.answer.tolist():
                        z = out.logits[0, at - 1].tolist()
                        terms.append(math.log(math.fsum(math.exp(v) for v in z)) - z[token])
                        at += 1
        found.append(math.fsum(terms) / len(terms))
    return found


@pytest.mark.parametrize("by", ["fixed", "uncertainty"])
def test_a_step_goes_down_the_weighted_sum_of_the_means(by):
    """Catches a prompt or padding that counts, a mean over all tasks' labels instead of each task's own, a number read off another
    token, a sample that sees its neighbour where masked (or does not where it is not), a weight on another task, the price of
    uncertainty paid per micro-batch, MTP and balance losses dropped.
    """
    of, (c, state) = cases.phase(by), cases.state()
    batch, held = cases.batch(of)
    own = drawn(of, c)
    each = losses_by_hand(c, state, of, own, held)
    _, _, seen = step(c, state, own, batch, HOW, of, micro_batches=6)
    assert max(len(samples) for samples in held) > 1
    s = [float(own.weights[names.log_variance(t.name)][0]) if by == "uncertainty" else 0.0 for t in of.tasks]
    fixed = [1.5, 0.25, 1.0]
    w = fixed if by == "fixed" else [math.exp(-x) * (0.5 if i == 1 else 1) for i, x in enumerate(s)]
    whole = math.fsum(x * y for x, y in zip(w, each, strict=True)) + math.fsum(x / 2 for x in s)
    np.testing.assert_allclose([seen.parts[f"task.{t.name}"] for t in of.tasks], each, **CLOSE)
    np.testing.assert_allclose([seen.weights[t.name] for t in of.tasks], w, rtol=1e-6)  # s is float32
    rest = 0.3 * seen.parts["mtp1"] + seen.parts["balance"]
    assert rest > 0 and "main" not in seen.parts
    np.testing.assert_allclose(seen.loss, whole + rest, rtol=1e-6 if by == "uncertainty" else 1e-10)


def objective_gradients(c, state, own, batch, of, how=HOW, **more):
    """The gradients that a step uses: the model's, and those of the tasks' own."""
    leaves, into = {n: Parameter(w) for n, w in own.weights.items()}, Gradients()
    size = len(batch.tokens) // more.get("micro_batches", 1)
    aim = Objective(of, batch, leaves, weights(own, of), how.mtp_weight, size)
    loss, grads, *_ = memory.gradients(c, state, recipe=how, objective=aim, into=into, **more, **batch.inputs())
    return loss, grads, {n: into[w] for n, w in leaves.items() if w in into}


def test_gradients_of_what_is_the_tasks_own():
    """Catches a variance whose gradient leaves out its price or has the wrong sign or factor; a head that is not trained. Oracle:
    dL/ds = 1/2 - c e^-s L_t, and a central difference for the head.
    """
    of, (c, state) = cases.phase("uncertainty"), cases.state()
    (batch, held), own = cases.batch(of), drawn(of, c)
    _, _, mine = objective_gradients(c, state, own, batch, of)
    each = losses_by_hand(c, state, of, own, held)
    for t, loss in zip(of.tasks, each, strict=True):
        s = float(own.weights[names.log_variance(t.name)][0])
        want = 0.5 - (0.5 if t.loss == "regression" else 1.0) * math.exp(-s) * loss
        np.testing.assert_allclose(mine[names.log_variance(t.name)], [want], rtol=1e-6)
    direction = np.random.default_rng(2).normal(size=c.hidden_size)
    name, h = names.weight("tell"), 1e-4

    def at(x):
        moved = replace(own, weights={**own.weights, name: own.weights[name].astype(np.float64) + x * direction})
        return objective_gradients(c, state, moved, batch, of)[0]

    # quadratic in the head, so only rounding is left: 1e-16 x 10 / 1e-4
    np.testing.assert_allclose(np.sum(mine[name] * direction), (at(h) - at(-h)) / (2 * h), rtol=1e-7, atol=1e-9)


def test_variances_rest_where_the_paper_says():
    """Catches log sigma^2 in place of log sigma: sigma^2 = L of a squared error (a Gaussian's variance), 2 L of a cross-entropy."""
    for loss, found in (("regression", 0.3), ("cross-entropy", 2 * 0.3)):
        s = Tensor(np.log(np.array(found)))
        grads = backward(weighting.uncertain(loss, s) * 0.3 + weighting.price([s]))
        np.testing.assert_allclose(grads[s], 0.0, atol=1e-15)


@pytest.mark.parametrize(("window", "temperature"), [(1, 2.0), (3, 0.5)])
def test_loss_ratios(window, temperature):
    """Catches windows that overlap or are a step off, the ratio upside down, weights that do not add up to the number of tasks.
    Oracle: eq 7 of the paper over the list of all losses so far.
    """
    rng, history = np.random.default_rng(1), History()
    every = rng.uniform(0.1, 3.0, (14, 3)).tolist()
    for k, losses in enumerate(every):
        done = k // window
        want = [1.0] * 3
        if done >= 2:
            mean = [
                [math.fsum(row[t] for row in every[i * window : (i + 1) * window]) / window for t in range(3)]
                for i in range(done)
            ]
            e = [math.exp(mean[-1][t] / mean[-2][t] / temperature) for t in range(3)]
            want = [3 * x / math.fsum(e) for x in e]
        np.testing.assert_allclose(weighting.by_ratio(history, 3, temperature=temperature), want, rtol=1e-12)
        history = History.from_dict(history.added(losses, window).to_dict())
    nothing_left = History(((0.0, 1.0), (0.0, 1.0)))
    assert weighting.by_ratio(nothing_left, 2, temperature=1.0) == [1.0, 1.0]


def test_samples_of_a_row_do_not_learn_from_each_other():
    """Catches a mask that lets a sample see the one before it in its row: then its loss would move the other's embedding. Exactly 0
    where masked; where the task says otherwise it is not.
    """
    of, (c, state) = cases.phase(), cases.state()
    batch, _ = cases.batch(of)
    for number, t in enumerate(of.tasks):
        row = int(np.flatnonzero((batch.task == number) & (batch.documents.max(axis=1) >= (2 if t.masked else 1)))[0])
        ids = np.arange(1, cases.LENGTH + 1)  # every token once, so an embedding's row is a place
        counted = np.zeros(cases.LENGTH, bool)
        learned = (batch.labels[row] != -100) | ~np.isnan(batch.targets[row])
        last = np.flatnonzero(learned)[-1]
        first_of_last = np.flatnonzero(batch.documents[row] == batch.documents[row, last])[0] if t.masked else last
        counted[last] = True
        only = replace(
            batch,
            tokens=np.where(np.arange(len(batch.tokens))[:, None] == row, ids, 0),
            labels=np.where(counted & (np.arange(len(batch.tokens))[:, None] == row), batch.labels, -100),
            targets=np.where(counted & (np.arange(len(batch.tokens))[:, None] == row), batch.targets, np.nan),
        )
        how = replace(cases.EXACT, mtp_weight=0.0, aux_weight=0.0)
        _, grads, _ = objective_gradients(c, state, drawn(of, c), only, of, how)
        moved = np.abs(grads["model.embed_tokens.weight"][ids]).max(axis=1)
        before = moved[:first_of_last]
        assert len(before) and moved[last - 1] + moved[last] > 0
        assert (before == 0).all() if t.masked else (before > 0).all(), t.name


@pytest.mark.parametrize("policy", ["report", "again"])
def test_micro_batches_and_memory_change_no_gradient(policy):
    """Catches a mean over a micro-batch's own labels, and a head that reads a hidden state which recomputation has dropped."""
    of, (c, state) = cases.phase("uncertainty"), cases.state()
    (batch, _), own = cases.batch(of), drawn(of, c)
    loss, grads, mine = objective_gradients(c, state, own, batch, of)
    kept, found, theirs = objective_gradients(c, state, own, batch, of, policy=memory.Policy.uniform(c, policy))
    assert kept == loss
    for name, g in {**grads, **mine}.items():
        np.testing.assert_array_equal({**found, **theirs}[name], g, err_msg=name)
    parts, found, theirs = objective_gradients(c, state, own, batch, of, micro_batches=6)
    np.testing.assert_allclose(parts, loss, rtol=1e-12)  # float64 sums in another order
    for name, g in {**grads, **mine}.items():
        # float32 masters' gradients are handed over in float32
        np.testing.assert_allclose({**found, **theirs}[name], g, rtol=1e-6, atol=1e-7, err_msg=name)


def test_own_parameters_are_trained_by_adamw_without_decay():
    """Catches a norm clipped twice or over the model's gradients only, decay of variances, a bias correction by the run's
    step, a balancing bias that stays.
    """
    of, (c, state) = cases.phase("uncertainty"), cases.state()
    (batch, _), own = cases.batch(of), drawn(of, c)
    state = replace(state, adam=replace(state.adam, t=1000))
    how = replace(HOW, max_norm=0.5)
    _, grads, mine = objective_gradients(c, state, own, batch, of, how)
    norm = math.sqrt(sum(float((np.float64(g) ** 2).sum()) for g in {**grads, **mine}.values()))
    new, after, seen = step(c, state, own, batch, how, of)
    np.testing.assert_allclose(seen.norm, norm, rtol=1e-6)
    assert norm > 0.5 and mine.keys() == own.weights.keys()
    for name, g in mine.items():
        g = g * (0.5 / norm)
        want = own.weights[name] - how.opt.lr * g / (np.abs(g) + how.opt.eps)  # m^ = g, v^ = g^2 in its first step
        np.testing.assert_allclose(after.weights[name], want, rtol=1e-5, err_msg=name)
    for name, g in grads.items():  # m = 0.1 g, clipped once; float32
        np.testing.assert_allclose(new.adam.m[name], 0.1 * g * (0.5 / norm), rtol=1e-5, atol=1e-9, err_msg=name)
    moved = [n for n, w in state.weights.items() if "correction_bias" in n and (new.weights[n] != w).any()]
    assert moved and new.adam.t == 1001


def test_sums_have_one_order():
    """Catches a norm summed in the order of a checkpoint's file: a resumed run would differ in the last bit, now and then."""
    of, (c, _) = cases.phase("uncertainty"), cases.state()
    own = drawn(of, c)
    turned = replace(own, weights=dict(reversed(own.weights.items())))
    assert list(turned.weights) != list(own.weights)
    assert list(turned.within(of, c.hidden_size).weights) == list(own.within(of, c.hidden_size).weights)


@given(st.integers(1, 9), st.lists(st.floats(0.01, 100), min_size=1, max_size=3))
def test_rows_are_divided_as_the_shares_say(batch, shares):
    """Catches rows lost to rounding, and a row that is left given to the wrong task. Oracle: of all ways, none is nearer."""
    counts, n = divided(batch, shares), len(shares)

    def off(way):
        return math.fsum(abs(k - batch * share / math.fsum(shares)) for k, share in zip(way, shares, strict=True))

    every = [way for way in itertools.product(range(batch + 1), repeat=n) if sum(way) == batch]
    assert sum(counts) == batch
    assert off(counts) <= min(map(off, every)) + 1e-9
