"""Two older ways of training on many machines, which articles about this model describe. V3 was trained with neither.

The technical report trains synchronously: DualPipe x expert parallelism x ZeRO-1 (R 3.2), one optimizer step over all
ranks. Articles speak of an asynchronous parameter server whose embedding is synchronised every 100 steps and whose gate
every 500, and of federated averaging. Both are here as what they are: short rank programs, with their cost (stale
weights) visible. The ring collectives named in the same articles are in `collectives`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from refimpl.autograd import Array, require
from refimpl.parallel_emulation.collectives import all_reduce
from refimpl.parallel_emulation.comm.communicator import Comm, Recv, Send, spans

Weights = dict[str, Array]
Intervals = Sequence[tuple[str, int]]  # (pattern of checkpoint names, steps from one synchronisation to the next)

ARTICLES: Intervals = (("model.embed_tokens.*", 100), ("*.mlp.gate.*", 500))


def interval_of(name: str, intervals: Intervals) -> int:
    """Steps between synchronisations of a weight: those of the first pattern that fits, else 1."""
    return next((every for pattern, every in intervals if fnmatchcase(name, pattern)), 1)


def parameter_server(
    world: Comm,
    weights: Mapping[str, Array],
    gradient: Callable[[int, int, Weights], Weights],
    *,
    steps: int,
    lr: float,
    intervals: Intervals = ARTICLES,
    arrivals: Sequence[int] | None = None,
) -> Weights:
    """Asynchronous SGD: rank 0 keeps w and does w -= lr * (what a worker has summed up); ranks 1, 2, ... work.

    In its step t = 1, 2, ..., a worker computes gradient(worker rank, t, its own copy of w) and applies it to the copy.
    The weights whose interval divides t (in the last step all of them) it then pushes, as the gradients summed since
    their last synchronisation, and pulls anew. Workers do not wait for each other: between pull and push others have
    changed w. In which order they arrive at the server is an accident of timing on real machines and an argument
    here, `arrivals`: worker ranks, each `steps` times (default: in turn), so that every run can be repeated.

    Returns w on rank 0, its last copy on a worker. SpecError without a worker, for an interval below 1 and for arrivals
    that do not fit.
    """
    require(world.size >= 2, "a parameter server needs a second rank, to work")
    require(all(every >= 1 for _, every in intervals), f"intervals {intervals} must be at least 1 step")
    workers = range(1, world.size)
    arrivals = [w for _ in range(steps) for w in workers] if arrivals is None else arrivals
    wrong = [w for w in {*workers, *arrivals} if Counter(arrivals)[w] != steps or w not in workers]
    require(not wrong, f"arrivals must hold each of the ranks {spans(workers)} {steps} times; look at {spans(wrong)}")

    def due(t: int) -> list[str]:
        return [name for name in weights if t % interval_of(name, intervals) == 0 or t == steps]

    if world.rank == 0:
        return _serve(world, dict(weights), due, lr, arrivals)
    return _work(world, dict(weights), due, lr, steps, gradient)


def _serve(world: Comm, w: Weights, due: Callable[[int], list[str]], lr: float, arrivals: Sequence[int]) -> Weights:
    done: Counter[int] = Counter()
    for worker in arrivals:
        done[worker] += 1
        names = due(done[worker])
        pushed = world.exchange([], [Recv(worker, f"push {name}", w[name]) for name in names], "server.push")
        for name, summed in zip(names, pushed, strict=True):
            w[name] = w[name] - lr * summed
        world.exchange([Send(worker, w[name], f"pull {name}") for name in names], [], "server.pull")
    return w


def _work(
    world: Comm,
    w: Weights,
    due: Callable[[int], list[str]],
    lr: float,
    steps: int,
    gradient: Callable[[int, int, Weights], Weights],
) -> Weights:
    summed = {name: np.zeros_like(x) for name, x in w.items()}
    for t in range(1, steps + 1):
        for name, g in gradient(world.rank, t, w).items():
            w[name], summed[name] = w[name] - lr * g, summed[name] + g
        names = due(t)
        world.exchange([Send(0, summed[name], f"push {name}") for name in names], [], "worker.push")
        pulled = world.exchange([], [Recv(0, f"pull {name}", w[name]) for name in names], "worker.pull")
        for name, x in zip(names, pulled, strict=True):
            w[name], summed[name] = x, np.zeros_like(x)
    return w


def federated_averaging(
    comm: Comm,
    weights: Mapping[str, Array],
    train: Callable[[int, int, Weights], Weights],
    *,
    samples: int,
    rounds: int,
) -> Weights:
    """FedAvg (McMahan et al. 2017): w += sum over ranks k of n_k / n (w_k - w), `rounds` times.

    Every rank trains on its own data from the common w, w_k = train(rank, round, w), as many local steps as it likes,
    and only then do the ranks speak: one all-reduce per weight and round, in rank order, so all hold the same bits.
    `samples` is this rank's n_k, n their sum. With one local SGD step it is synchronous data parallelism.
    SpecError if a rank has a negative number of samples or none has any.
    """
    every = comm.allgather(np.int64(samples), "fedavg.samples")
    require(every.min() >= 0 and every.sum() > 0, f"samples per rank are {every.tolist()}")
    share = float(samples / every.sum())
    w = dict(weights)
    for t in range(rounds):
        trained = train(comm.rank, t, dict(w))
        for name, x in w.items():
            w[name] = x + all_reduce(comm, (share * (trained[name] - x)).astype(x.dtype), f"fedavg.{name}")
    return w
