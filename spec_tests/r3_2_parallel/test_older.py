"""Older mechanisms that articles describe: an asynchronous parameter server, federated averaging."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import SpecError
from refimpl.parallel_emulation.comm import Log, spmd
from refimpl.parallel_emulation.older import ARTICLES, federated_averaging, interval_of, parameter_server
from refimpl.spec_tests.cases.rank_programs import TOY, local_sgd, toy_gradient

EMBED, GATE, HEAD = TOY


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def on_one_machine(arrivals, steps, lr, intervals):
    """The parameter server without ranks: copies in dictionaries, in the order of arrival."""
    server = dict(TOY)
    copies = {w: dict(TOY) for w in set(arrivals)}
    owed = {w: {name: np.zeros_like(x) for name, x in TOY.items()} for w in copies}
    done = dict.fromkeys(copies, 0)
    for w in arrivals:
        done[w] += 1
        for name, g in toy_gradient(w, done[w], copies[w]).items():
            copies[w][name] = copies[w][name] - lr * g
            owed[w][name] = owed[w][name] + g
        for name in TOY:
            every = {EMBED: intervals[0][1], GATE: intervals[1][1]}.get(name, 1)
            if done[w] % every == 0 or done[w] == steps:
                server[name] = server[name] - lr * owed[w][name]
                copies[w][name], owed[w][name] = server[name], np.zeros_like(server[name])
    return server, copies


@given(st.integers(1, 3), st.integers(1, 9), st.data())
@settings(max_examples=25, deadline=None)
def test_the_server_is_a_serial_program_in_the_order_of_arrival(workers, steps, data):
    """Catches a worker that waits for the others, or computes from weights it has not pulled."""
    arrivals = data.draw(st.permutations([w for w in range(1, workers + 1) for _ in range(steps)]))
    intervals = (("model.embed_tokens.*", data.draw(st.integers(1, 4))), ("*.mlp.gate.*", data.draw(st.integers(1, 5))))
    want, copies = on_one_machine(arrivals, steps, 0.25, intervals)
    options = {"steps": steps, "lr": 0.25, "intervals": intervals, "arrivals": arrivals}

    def program(comm):
        return parameter_server(comm, TOY, toy_gradient, **options)

    for mode in ("buffered", "synchronous"):
        server, *found = spmd(workers + 1, program, seed=data.draw(st.integers(0, 9)), send_mode=mode)
        same(server, want)
        for w, copy in enumerate(found, 1):
            same(copy, copies[w])


def test_one_worker_that_always_synchronises_is_plain_sgd():
    """Catches an update applied twice, on the worker and on the server."""
    w = dict(TOY)
    for t in range(1, 6):
        w = {name: w[name] - 0.5 * g for name, g in toy_gradient(1, t, w).items()}
    found = spmd(2, lambda comm: parameter_server(comm, TOY, toy_gradient, steps=5, lr=0.5, intervals=()))
    same(found[0], w)
    same(found[1], w)


def test_the_intervals_of_the_articles_and_their_traffic():
    """Catches an embedding that is sent every step: 1000 steps are 10 times the embedding, 2 the gate, 1000 the rest."""
    assert [interval_of(name, ARTICLES) for name in TOY] == [100, 500, 1]
    log = Log()
    spmd(2, lambda comm: parameter_server(comm, TOY, toy_gradient, steps=1000, lr=0.01), log=log)
    pushes, pulls = log.select(rank=1, label="worker.push"), log.select(rank=0, label="server.pull")
    for records in (pushes, pulls):
        sizes = [size for r in records for _, size in r.sent]
        assert [sizes.count(4 * TOY[name].size) for name in (EMBED, GATE, HEAD)] == [10, 2, 1000]
    once = sum(x.nbytes for x in TOY.values())
    assert log.bytes() == 2 * (1000 * 16 + 10 * 20 + 2 * 12) and log.bytes() < 2 * 1000 * once / 2


def test_the_order_of_arrival_matters():
    """Catches a "server" that waits for everybody, whose result could not depend on who comes first."""

    def final(arrivals):
        options = {"steps": 4, "lr": 0.3, "intervals": (), "arrivals": arrivals}
        return spmd(3, lambda comm: parameter_server(comm, TOY, toy_gradient, **options))[0][HEAD]

    bursts, turns = final([1] * 4 + [2] * 4), final([1, 2] * 4)
    assert not np.array_equal(bursts, turns)
    np.testing.assert_array_equal(turns, final(None))


def average(rounds, samples):
    """FedAvg on one machine."""
    w = dict(TOY)
    for t in range(rounds):
        trained = [local_sgd(rank, t, w) for rank in range(len(samples))]
        step = {}
        for name, x in w.items():
            parts = [
                ((n / sum(samples)) * (k[name] - x)).astype(x.dtype) for n, k in zip(samples, trained, strict=True)
            ]
            step[name] = x + sum(parts[1:], parts[0])
        w = step
    return w


@pytest.mark.parametrize("samples", [[5], [1, 1], [3, 0, 4], [1, 2, 3, 4]])
def test_federated_averaging_weighs_by_samples(samples):
    """Catches a plain mean; all ranks end with the same bits, and speak once a round only."""
    log, n = Log(), len(samples)

    def program(comm):
        return federated_averaging(comm, TOY, local_sgd, samples=samples[comm.rank], rounds=3)

    for found in spmd(n, program, log=log, seed=1):
        same(found, average(3, samples))
    size = sum(x.nbytes for x in TOY.values())
    assert log.bytes(label="fedavg.*") == 3 * 2 * (n - 1) * size + n * (n - 1) * 8


def test_one_local_step_is_synchronous_data_parallelism():
    """Catches an average of something else than the models.

    float32, three weights of order 1 added in another way: 4 roundings of 6e-8 each.
    """

    def once(rank, t, w):
        return {name: x - np.float32(0.1) * toy_gradient(rank, t, w)[name] for name, x in w.items()}

    found = spmd(3, lambda comm: federated_averaging(comm, TOY, once, samples=7, rounds=1))[0]
    for name, x in TOY.items():
        mean = np.mean([toy_gradient(rank, 0, TOY)[name] for rank in range(3)], axis=0)
        np.testing.assert_allclose(found[name], x - 0.1 * mean, rtol=0, atol=4 * 6e-8 * 3)


def test_a_model_on_which_all_agree_stays_as_it_is():
    """Catches weights n_k / n whose rounded sum is not 1 wearing the model down: three thirds in float32 are not 1."""
    found = spmd(3, lambda comm: federated_averaging(comm, TOY, lambda r, t, w: w, samples=1, rounds=50))
    same(found[0], TOY)


@pytest.mark.parametrize(
    ("n", "options", "complaint"),
    [
        (1, {}, "needs a second rank"),
        (2, {"intervals": (("*", 0),)}, "at least 1 step"),
        (3, {"arrivals": [1, 1, 2]}, "each of the ranks 1-2 2 times; look at 2"),
        (3, {"arrivals": [1, 1, 2, 2, 5]}, "look at 5"),
        (3, {"arrivals": [0, 1, 1, 2, 2]}, "look at 0"),
    ],
)
def test_bad_parameter_servers_are_refused(n, options, complaint):
    """Catches an order of arrival in which the server would wait for ever."""
    with pytest.raises(SpecError, match=complaint):
        spmd(n, lambda comm: parameter_server(comm, TOY, toy_gradient, steps=2, lr=0.1, **options))


@pytest.mark.parametrize("samples", [0, -1])
def test_federated_averaging_of_nothing_is_refused(samples):
    """Catches a division by zero."""
    with pytest.raises(SpecError, match="samples per rank"):
        spmd(2, lambda comm: federated_averaging(comm, TOY, local_sgd, samples=samples, rounds=1))
