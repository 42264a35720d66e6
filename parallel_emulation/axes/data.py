"""Data parallelism: every rank has its own sequences, gradients add up; ZeRO-1 divides what the optimiser keeps (R 3.2).

The loss is a mean over all tokens of all ranks and micro-batches, so each micro-batch's mean counts with its share of
them. Sums are in a fixed order: micro-batches in turn on a rank, then ranks in turn. One rank that adds up the same
micro-batches in the same groups has the same bits.

ZeRO-1: parameters are replicated over a reduction group of d ranks, fp32 masters and moments divided, 1/d each, in flat
shards padded to equal length. A step is one reduce-scatter of fp32 gradients and one all-gather of new working weights,
together the bytes of an all-reduce. V3 needs two groups: all data-parallel ranks for dense parameters, and for experts
those ranks that hold the same ones. Both are scaled by the same number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl.autograd import Array, Gradients, Parameter, Tensor, backward, ops, require
from refimpl.parallel_emulation.collectives import all_gather, all_reduce, reduce_scatter, slices
from refimpl.parallel_emulation.comm import Comm

Weights = Mapping[str, Array]
Loss = Callable[[Mapping[str, Tensor], Any], Tensor]
"""(weights, micro-batch) -> mean over what counts in it ()."""
Update = Callable[[dict[str, Array], dict[str, Array], Any], tuple[Mapping[str, Array], Any]]
"""(weights, gradients, optimiser state) -> new weights, new state, as refimpl.optimizer.adamw; element by element."""


def accumulate(
    loss: Loss, weights: Weights, batches: Iterable[Any], count: Callable[[Any], int], total: int
) -> tuple[float, dict[str, Array]]:
    """sum over micro-batches of count(b) / total * (loss(weights, b), its gradients): loss, gradients by name.

    A weight that no micro-batch reaches gets zeros. Only one micro-batch's graph is alive at a time.
    """
    leaves = {name: Parameter(w) for name, w in weights.items()}
    mean, grads = 0.0, Gradients()
    for batch in batches:
        part: Tensor = ops.mul(loss(leaves, batch), count(batch) / total)
        mean += float(part.data)
        backward(part, into=grads)
    return mean, {name: grads[leaf] if leaf in grads else np.zeros_like(leaf.data) for name, leaf in leaves.items()}


def gradients(
    dp: Comm, loss: Loss, weights: Weights, batches: Sequence[Any], count: Callable[[Any], int]
) -> tuple[float, dict[str, Array]]:
    """My part of the mean loss over all ranks' micro-batches and of its gradients, still to be added up over ranks.

    Ranks may have different numbers of micro-batches of different sizes, even none. SpecError if nothing counts.
    """
    total = int(all_reduce(dp, np.array([sum([count(b) for b in batches])]), "tokens")[0])
    require(total > 0, "no token of any rank counts in the loss")
    return accumulate(loss, weights, batches, count, total)


def all_reduced(dp: Comm, grads: Weights, label: str = "dp") -> dict[str, Array]:
    """The gradients of all ranks, added up in rank order; one message per weight: plain data parallelism."""
    return {name: all_reduce(dp, g, f"{label}.{name}") for name, g in grads.items()}


# ---- ZeRO-1


@dataclass(frozen=True)
class Shard:
    """My 1/d of a reduction group's optimiser: masters (K,) and state of elements K r to K (r + 1) of the flat weights.

    `distinct`: the ranks whose shards of this kind are all different, over which squares add up to the global norm. It
    is the group itself, unless other groups hold other weights under the same names (experts, tensor-parallel slices).
    """

    group: Comm
    distinct: Comm
    shapes: dict[str, tuple[int, ...]]  # in the order of the flat array
    working: np.dtype[Any]  # what the layers get
    wire: np.dtype[Any]  # what travels
    master: Array
    state: Any

    def flat(self, named: Weights) -> Array:
        """All weights one after the other, with zeros up to a multiple of d.  -> (d K,) in the masters' dtype."""
        require(set(named) == set(self.shapes), f"names differ: {sorted(set(named) ^ set(self.shapes))[:3]}")
        for name, shape in self.shapes.items():
            require(named[name].shape == shape, f"{name} has shape {named[name].shape}, expected {shape}")
        parts = [named[name].reshape(-1).astype(self.master.dtype) for name in self.shapes]
        padding = len(self.master) * self.group.size - sum([len(p) for p in parts])
        return np.concatenate([*parts, np.zeros(padding, self.master.dtype)])

    def spans(self) -> dict[str, tuple[int, int]]:
        """My shard by weight: which elements of each, begin to end; weights of which I have none are left out."""
        each = len(self.master)
        first, stop, found = each * self.group.rank, each * (self.group.rank + 1), {}
        for name, whole in zip(self.shapes, slices([math.prod(s) for s in self.shapes.values()]), strict=True):
            a, b = max(whole.start, first), min(whole.stop, stop)
            if a < b:
                found[name] = a - whole.start, b - whole.start
        return found

    def pieces(self, shard: Array) -> dict[str, Array]:
        """My shard by weight: the part of each that lies in it, flat; weights without a part are left out."""
        found, at = {}, 0
        for name, (a, b) in self.spans().items():
            found[name] = shard[at : at + b - a]
            at += b - a
        return found


def start(
    group: Comm, weights: Weights, *, distinct: Comm | None = None, wire: Any = None, master: Any = np.float32
) -> Shard:
    """The shard of a group whose ranks all hold these weights; no message. `wire`: dtype of the all-gather (bf16 in V3)."""
    require(weights, "a reduction group without weights")
    kinds = {w.dtype for w in weights.values()}
    require(len(kinds) == 1, f"weights of one group have one dtype, not {sorted(map(str, kinds))}")
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    each = -(-sum([math.prod(s) for s in shapes.values()]) // group.size)
    working = kinds.pop()
    empty = np.zeros(each, master)
    shard = Shard(group, distinct or group, shapes, working, np.dtype(wire or working), empty, None)
    mine = shard.flat(weights)[each * group.rank : each * (group.rank + 1)]
    return replace(shard, master=mine.copy())


def step(
    shards: Sequence[Shard], grads: Sequence[Weights], update: Update, *, max_norm: float | None = None
) -> tuple[list[dict[str, Array]], list[Shard], float | None]:
    """One optimiser step of ZeRO-1, group by group -> working weights per shard, new shards, global norm before clipping.

    grads: each rank's own part, in the order of `shards`. On the wires, with P parameters padded to d K: reduce-scatter
    (d-1) K masters' elements, all-gather (d-1) K of the wire's dtype, a rank. `update` sees the pieces of my shard, so
    it must act on each element by itself; clipping is by min(1, max_norm / (norm + 1e-6)) over all groups together.
    """
    require(len(grads) == len(shards), f"{len(grads)} sets of gradients for {len(shards)} shards")
    mine = [reduce_scatter(s.group, s.flat(g), "zero1.scatter") for s, g in zip(shards, grads, strict=True)]
    norm = None
    if max_norm is not None:
        norm = global_norm(shards, mine)
        mine = [g * g.dtype.type(min(1.0, max_norm / (norm + 1e-6))) for g in mine]
    moved = [_updated(s, g, update) for s, g in zip(shards, mine, strict=True)]
    return [working_weights(s) for s in moved], moved, norm


def global_norm(shards: Sequence[Shard], mine: Sequence[Array]) -> float:
    """sqrt of the sum of squares over all shards, in float64: on a rank, then over its ranks in order, then over kinds."""
    squares = [np.square(g.astype(np.float64)).sum() for g in mine]
    sums = [all_reduce(s.distinct, q[None], "zero1.norm")[0] for s, q in zip(shards, squares, strict=True)]
    return math.sqrt(sum(sums))


def _updated(s: Shard, g: Array, update: Update) -> Shard:
    pieces = s.pieces(s.master)
    new, state = update(pieces, s.pieces(g), s.state)
    require(set(new) == set(pieces), "the update returned other weights than it was given")
    rest = s.master[sum([len(p) for p in pieces.values()]) :]  # the padding
    master = np.concatenate([*[np.asarray(new[name]).astype(s.master.dtype) for name in pieces], rest])
    return replace(s, master=master, state=state)


def working_weights(s: Shard) -> dict[str, Array]:
    """The masters of all ranks, rounded once to the wire's dtype, as the layers take them."""
    flat = all_gather(s.group, s.master.astype(s.wire), "zero1.gather")
    parts = slices([math.prod(shape) for shape in s.shapes.values()])
    return {
        name: flat[part].reshape(shape).astype(s.working)
        for (name, shape), part in zip(s.shapes.items(), parts, strict=True)
    }
