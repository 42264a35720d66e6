"""Collectives, written once from alltoallv and exchange. Sums are in rank order unless the algorithm's name says else.

Accumulation is in float32 for narrower floats, in the array's own dtype otherwise. What an algorithm puts on the wires
(n ranks, S bytes per rank) and in how many steps is in its docstring; the tests assert it on the log.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refimpl.autograd import Array, SpecError, require
from refimpl.parallel_emulation.comm import Comm, Recv, Send

Op = Callable[[Array, Array], Array]


def shares(total: int, n: int) -> list[int]:
    """How `total` things are shared out among n ranks: sizes differ by at most one, the larger ones first."""
    return [total // n + (r < total % n) for r in range(n)]


def slices(sizes: Sequence[int]) -> list[slice]:
    """The consecutive slices of those sizes."""
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype to add in: float32 for floats narrower than that, else the dtype itself."""
    extended = dtype.type.__module__ == "ml_dtypes" and not dtype.name.startswith(("int", "uint"))
    return np.dtype(np.float32) if extended or dtype == np.float16 else dtype


def in_order(parts: Sequence[Array] | Array, op: Op = np.add) -> Array:
    """((x_0 + x_1) + x_2) + ..., accumulated wide, rounded once.  n parts (*) -> y (*)."""
    y = parts[0].astype(wide(parts[0].dtype))
    for part in parts[1:]:
        y = op(y, part.astype(y.dtype))
    return y.astype(parts[0].dtype)


def all_gather(comm: Comm, x: Array, label: str = "all_gather", *, axis: int = 0, sizes: Any = None) -> Array:
    """y = [x_0; x_1; ...] along `axis`.  x (*, K_r, *) -> y (*, sum of K_r, *); `sizes`: the K_r where they differ.

    One step, S bytes to each other rank.
    """
    x = np.moveaxis(x, axis, 0)
    if sizes is None:
        return np.moveaxis(comm.allgather(x, label).reshape(-1, *x.shape[1:]), 0, axis)
    sizes = _checked_sizes(comm, sizes, None)
    require(len(x) == sizes[comm.rank], f"rank {comm.rank} gives {len(x)}, sizes says {sizes}")
    rows, counts = comm.alltoallv(np.concatenate([x] * comm.size), [len(x)] * comm.size, label)
    require(counts.tolist() == sizes, f"the ranks gave {counts.tolist()}, sizes says {sizes}")
    return np.moveaxis(rows, 0, axis)


def reduce_scatter(
    comm: Comm, x: Array, label: str = "reduce_scatter", *, axis: int = 0, sizes: Any = None, op: Op = np.add
) -> Array:
    """y = my slice of the sum over ranks.  x (*, K, *) -> y (*, K_r, *), K_r = K / size, or as `sizes` lists them.

    One step; (n-1)/n S bytes.  SpecError where the ranks do not divide K and no sizes are given.
    """
    x = np.moveaxis(x, axis, 0)
    if sizes is None and len(x) % comm.size:
        raise SpecError(f"{len(x)} along axis {axis} do not divide among {comm.size} ranks; give sizes")
    sizes = shares(len(x), comm.size) if sizes is None else _checked_sizes(comm, sizes, len(x))
    rows, counts = comm.alltoallv(x, sizes, label)
    require((counts == sizes[comm.rank]).all(), f"the ranks gave {counts.tolist()} rows, sizes says {sizes}")
    return np.moveaxis(in_order(rows.reshape(comm.size, -1, *x.shape[1:]), op), 0, axis)


def _checked_sizes(comm: Comm, sizes: Any, total: int | None) -> list[int]:
    whole = [int(s) for s in sizes]
    if len(whole) != comm.size or min(whole) < 0 or total not in (None, sum(whole)):
        raise SpecError(f"sizes {whole} for {comm.size} ranks" + (f" and {total} in all" if total is not None else ""))
    return whole


def all_reduce(comm: Comm, x: Array, label: str = "all_reduce", *, op: Op = np.add) -> Array:
    """y = x_0 + x_1 + ... in rank order, the same bits on every rank.  x (*) -> y (*).

    reduce-scatter and all-gather of the flat array, in shares that differ by at most one element: 2 steps,
    2(n-1)/n S bytes.
    """
    sizes = shares(x.size, comm.size)
    mine = reduce_scatter(comm, x.reshape(-1), f"{label}.scatter", sizes=sizes, op=op)
    return all_gather(comm, mine, f"{label}.gather", sizes=sizes).reshape(x.shape)


# ---- Rings: everybody talks to the right neighbour only


def ring_reduce_scatter(comm: Comm, x: Array, label: str = "ring_reduce_scatter", *, op: Op = np.add) -> Array:
    """My share of the sum; block b is added up in the order b+1, b+2, ..., b: fixed, but not rank order.

    x (K, *) -> y (K_r, *), K_r = shares(K, size).  n-1 steps, in step s block r-1-s moves on to r+1, (n-1)/n S bytes.
    The travelling sum is rounded to x's dtype at every hop, as on a real wire.
    """
    n, r = comm.size, comm.rank
    blocks = [x[part] for part in slices(shares(len(x), n))]
    for s in range(n - 1):
        (got,) = comm.exchange([Send((r + 1) % n, blocks[(r - 1 - s) % n])], [(r - 1) % n], label)
        b = (r - 2 - s) % n
        blocks[b] = in_order([got, blocks[b]], op)
    return np.array(blocks[r])


def ring_all_gather(comm: Comm, x: Array, label: str = "ring_all_gather") -> Array:
    """y = [x_0; x_1; ...] along the first axis, which may be uneven.  x (K_r, *) -> y (sum of K_r, *).

    n-1 steps, in step s block r-s moves on to r+1: n-1 blocks, (n-1)/n of the result's bytes.
    """
    n, r = comm.size, comm.rank
    blocks = {r: x}
    for s in range(n - 1):
        (blocks[(r - 1 - s) % n],) = comm.exchange([Send((r + 1) % n, blocks[(r - s) % n])], [(r - 1) % n], label)
    return np.concatenate([blocks[b] for b in range(n)])


def ring_all_reduce(comm: Comm, x: Array, label: str = "ring_all_reduce", *, op: Op = np.add) -> Array:
    """The sum over ranks, each block in its own order (see ring_reduce_scatter); the same bits on every rank.

    x (*) -> y (*).  2(n-1) steps, 2(n-1)/n S bytes.
    """
    mine = ring_reduce_scatter(comm, x.reshape(-1), f"{label}.scatter", op=op)
    return ring_all_gather(comm, mine, f"{label}.gather").reshape(x.shape)


# ---- Recursive doubling


def recursive_doubling_all_reduce(comm: Comm, x: Array, label: str = "recursive_doubling", *, op: Op = np.add) -> Array:
    """The sum over ranks as a balanced tree; the same bits on every rank.  x (*) -> y (*).

    log2 n steps of S bytes, in step s with rank r xor 2^s.  Where n is no power of two, the last n - 2^k ranks first
    give theirs to rank r - 2^k and get the result from it: two more steps.
    """
    n, r = comm.size, comm.rank
    whole = 1 << (n.bit_length() - 1)  # the largest power of two <= n
    if r >= whole:
        comm.send(x, r - whole, f"{label}.fold")
        return comm.recv(r - whole, f"{label}.unfold", like=x)
    y = np.array(x)
    if r + whole < n:
        y = in_order([y, comm.recv(r + whole, f"{label}.fold", like=x)], op)
    distance = 1
    while distance < whole:
        peer = r ^ distance
        (got,) = comm.exchange([Send(peer, y)], [Recv(peer, like=x)], label)
        y = in_order([y, got], op)  # the peer has the same bits: a + b = b + a
        distance *= 2
    if r + whole < n:
        comm.send(y, r + whole, f"{label}.unfold")
    return y


# ---- All-to-all, as an engine may do it inside: the same result, other steps and bytes


def all_to_all(comm: Comm, blocks: Array, label: str = "all_to_all") -> Array:
    """y[r] = block `me` of rank r: a transposition of the ranks' rows.  blocks (n, *) -> y (n, *).  (n-1)/n S bytes."""
    _check_blocks(comm, blocks)
    return comm.alltoallv(blocks, [1] * comm.size, label)[0]


def pairwise_all_to_all(comm: Comm, blocks: Sequence[Array] | Array, label: str = "pairwise") -> list[Array]:
    """all_to_all with blocks of any size.  n-1 steps, in step s to r+s and from r-s; S/n bytes a step."""
    _check_blocks(comm, blocks)
    n, r = comm.size, comm.rank
    got = {r: np.array(blocks[r])}
    for s in range(1, n):
        to, source = (r + s) % n, (r - s) % n
        (got[source],) = comm.exchange([Send(to, blocks[to])], [source], label)
    return [got[i] for i in range(n)]


def ring_all_to_all(comm: Comm, blocks: Sequence[Array] | Array, label: str = "ring_all_to_all") -> list[Array]:
    """all_to_all between neighbours only: pass on what is not mine.

    n-1 steps; in step s every rank passes on n-s blocks, together (n-1)/2 S bytes: n/2 times those of pairwise.
    """
    _check_blocks(comm, blocks)
    n, r = comm.size, comm.rank
    got = {r: np.array(blocks[r])}
    travelling = [blocks[(r + d) % n] for d in range(1, n)]  # those with 1, 2, ... hops to go
    for s in range(1, n):
        sends = [Send((r + 1) % n, block) for block in travelling]
        mine, *travelling = comm.exchange(sends, [(r - 1) % n] * len(sends), label)
        got[(r - s) % n] = mine
    return [got[i] for i in range(n)]


def bruck_all_to_all(comm: Comm, blocks: Array, label: str = "bruck") -> Array:
    """all_to_all of equal blocks in few steps.  blocks (n, *) -> y (n, *).

    ceil(log2 n) steps: in step k all blocks whose distance has bit k move 2^k ranks on; S/2 bytes a step for n = 2^k.
    """
    _check_blocks(comm, blocks)
    n, r = comm.size, comm.rank
    held = np.roll(blocks, -r, axis=0)  # held[d]: the block that has d ranks to go
    step = 1
    while step < n:
        moving = [d for d in range(n) if d & step]
        (held[moving],) = comm.exchange([Send((r + step) % n, held[moving])], [(r - step) % n], label)
        step *= 2
    return held[(r - np.arange(n)) % n]  # held[d] came from rank r - d


def _check_blocks(comm: Comm, blocks: Sequence[Array] | Array) -> None:
    require(len(blocks) == comm.size, f"{len(blocks)} blocks for {comm.size} ranks: one for each is needed")
