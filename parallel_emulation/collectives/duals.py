"""Collectives inside differentiable code: primitives whose vjp is the dual collective, side by side in dual pairs.

Two conventions meet here. A *replicated* array is one array that every rank holds whole: its gradient is whole on every
rank too, and is counted once. Any other array is each rank's own; over those, each pair below is an exact transpose:
the sum over ranks of <dy, J x> equals that of <vjp(dy), x>.

| forward | takes | gives | vjp |
|---|---|---|---|
| copy_to | replicated | own, equal at first | all-reduce (Megatron's f) |
| reduce_from | own partial sums | replicated | identity (Megatron's g) |
| gather_from | own slices | replicated | my slice |
| scatter_to | replicated | own slices | all-gather |
| all_gather | own slices | own, each a whole | reduce-scatter (Megatron's g-bar) |
| reduce_scatter | own wholes | own slices of the sum | all-gather |
| all_to_all | own rows | own rows | all_to_all back |

Every rank must record the same ops in the same order (a rank that passes a plain array has no backward, and the others
wait for it: the simulator says so). Backward calls carry the label of their forward with `.bwd` behind it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd import Array, SpecError, primitive
from refimpl.autograd.tensor import Vjp
from refimpl.parallel_emulation.comm import Comm

from . import collectives

Result = tuple[Array, tuple[Vjp | None, ...]]


@primitive
def copy_to(x: Array, *, comm: Comm, label: str = "copy_to") -> Result:
    """y = x, to be used differently on each rank.  x (*) replicated -> y (*); dx = all-reduce of dy."""

    def vjp_x(dy: Array) -> Array:
        return collectives.all_reduce(comm, dy, f"{label}.bwd")

    return x, (vjp_x,)


@primitive
def reduce_from(x: Array, *, comm: Comm, label: str = "reduce_from") -> Result:
    """y = sum of x over ranks, in rank order.  x (*) partial over comm -> y (*) replicated; dx = dy."""

    def vjp_x(dy: Array) -> Array:
        return dy

    return collectives.all_reduce(comm, x, label), (vjp_x,)


@primitive
def gather_from(x: Array, *, comm: Comm, axis: int = 0, sizes: Any = None, label: str = "gather_from") -> Result:
    """y = [x_0; x_1; ...] along `axis`.  x (*, K_r, *) -> y (*, K, *) replicated; dx = my slice of dy."""

    def vjp_x(dy: Array) -> Array:
        return _mine(dy, comm, axis, sizes)

    return collectives.all_gather(comm, x, label, axis=axis, sizes=sizes), (vjp_x,)


@primitive
def scatter_to(x: Array, *, comm: Comm, axis: int = 0, sizes: Any = None, label: str = "scatter_to") -> Result:
    """y = my slice of x along `axis`, without a message.  x (*, K, *) replicated -> y (*, K_r, *); dx = all-gather."""

    def vjp_x(dy: Array) -> Array:
        return collectives.all_gather(comm, dy, f"{label}.bwd", axis=axis, sizes=sizes)

    return _mine(x, comm, axis, sizes), (vjp_x,)


@primitive
def all_gather(x: Array, *, comm: Comm, axis: int = 0, sizes: Any = None, label: str = "all_gather") -> Result:
    """y = [x_0; x_1; ...] along `axis`, used differently on each rank.  x (*, K_r, *) -> y (*, K, *)."""

    def vjp_x(dy: Array) -> Array:
        return collectives.reduce_scatter(comm, dy, f"{label}.bwd", axis=axis, sizes=sizes)

    return collectives.all_gather(comm, x, label, axis=axis, sizes=sizes), (vjp_x,)


@primitive
def reduce_scatter(x: Array, *, comm: Comm, axis: int = 0, sizes: Any = None, label: str = "reduce_scatter") -> Result:
    """y = my slice of the sum of x over ranks.  x (*, K, *) partial over comm -> y (*, K_r, *)."""

    def vjp_x(dy: Array) -> Array:
        return collectives.all_gather(comm, dy, f"{label}.bwd", axis=axis, sizes=sizes)

    return collectives.reduce_scatter(comm, x, label, axis=axis, sizes=sizes), (vjp_x,)


def exchange_counts(counts: Any, *, comm: Comm, label: str = "counts") -> Array:
    """How many rows each rank will get from each: counts (n,) that I send -> (n,) that I receive."""
    counts = np.asarray(counts, np.int64)
    if counts.shape != (comm.size,):
        raise SpecError(f"counts have shape {counts.shape}, expected ({comm.size},)")
    return collectives.all_to_all(comm, counts, label)


@primitive
def all_to_all(x: Array, *, comm: Comm, counts: Any, label: str = "all_to_all") -> Result:
    """y = the rows that the ranks have for me, by source rank.  x (M, *), counts (n,) -> y (M', *).

    The vjp sends every row's gradient back to where the row came from, with the counts that forward received.
    """
    y, received = comm.alltoallv(x, counts, label)

    def vjp_x(dy: Array) -> Array:
        return comm.alltoallv(dy, received, f"{label}.bwd")[0]

    return y, (vjp_x,)


def _mine(x: Array, comm: Comm, axis: int, sizes: Any) -> Array:
    """My slice of a replicated array; a view."""
    if sizes is None and x.shape[axis] % comm.size:
        raise SpecError(f"{x.shape[axis]} along axis {axis} do not divide among {comm.size} ranks; give sizes")
    sizes = collectives.shares(x.shape[axis], comm.size) if sizes is None else list(sizes)
    if len(sizes) != comm.size or sum(sizes) != x.shape[axis]:
        raise SpecError(f"sizes {sizes} for {comm.size} ranks and {x.shape[axis]} along axis {axis}")
    return np.moveaxis(np.moveaxis(x, axis, 0)[collectives.slices(sizes)[comm.rank]], 0, axis)
