"""The simulator: n ranks as n threads of this process, one running at a time, deterministic, on any laptop.

`spmd(4, program, x)` -> [result of rank 0, ..., of rank 3]. What hangs without a word under a real MPI (a receive that
nobody sends, collectives in different order, a rank that returns early) is here an error that says where every rank is.
"""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from refimpl.autograd import Array, Tensor, require

from .communicator import Comm, Meta, Recv, Send
from .hub import Hub
from .log import Log
from .mailbox import Group
from .wire import from_bytes, row_bytes, to_bytes

_STACK = 512 * 1024  # bytes per thread; memory is only taken where it is touched


def spmd(
    n: int,
    program: Callable[..., Any],
    *args: Any,
    seed: int | None = None,
    send_mode: Literal["buffered", "synchronous"] = "buffered",
    log: Log | None = None,
) -> list[Any]:
    """Run `program(comm, *args)` on n ranks; returns their results in rank order.

    Array arguments (also inside lists, tuples and dicts) are read-only in the ranks, a random generator is copied for
    each: ranks share no memory. A `seed` makes the order in which ranks run random; results must not depend on it.
    Synchronous sends block until they are received, and find programs that work only thanks to buffers. `log` is
    filled.

    SpecError on a deadlock, on calls that do not fit together, on messages never received; it says what every rank is
    doing. An exception in a rank ends the run and is raised here with its own traceback, and the same table as a note.
    """
    require(n >= 1, f"a run has at least one rank, not {n}")
    require(send_mode in ("buffered", "synchronous"), f"send_mode is 'buffered' or 'synchronous', not {send_mode!r}")
    hub = Hub(n, seed=seed, synchronous=send_mode == "synchronous", log=log)
    comms = [SimComm(hub, hub.world, rank) for rank in range(n)]
    contexts = [contextvars.copy_context() for _ in comms]  # the caller's observers stand around every rank
    bodies = [
        partial(at.run, program, comm, *[_private(a) for a in args]) for at, comm in zip(contexts, comms, strict=True)
    ]
    return hub.run(bodies, _STACK)


def _private(x: Any) -> Any:
    """An argument as one rank may have it: containers copied, arrays read-only, generators copied."""
    if isinstance(x, np.ndarray):
        x = x.view()
        x.flags.writeable = False
        return x
    if isinstance(x, Tensor):
        return type(x)(_private(x.data))
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*[_private(v) for v in x])
    if isinstance(x, list | tuple):
        return type(x)([_private(v) for v in x])
    if isinstance(x, dict):
        return {k: _private(v) for k, v in x.items()}
    return copy.deepcopy(x) if isinstance(x, np.random.Generator) else x


class SimComm(Comm):
    """One simulated rank's end of a group."""

    def __init__(self, hub: Hub, group: Group, rank: int) -> None:
        self._hub, self._group = hub, group
        self.rank, self.ranks = rank, group.ranks

    def _collective(self, meta: Meta, x: Array | None, counts: Array | None) -> Any:
        got = self._hub.join(self._group, self.rank, meta, (x, counts), _MEET[meta.op])
        return np.array(got) if meta.op in ("allgather", "broadcast") else got  # one source, a copy for each

    def _exchange(self, meta: Meta, sends: list[Send], recvs: list[Recv]) -> list[Array]:
        return self._hub.exchange(self._group, self.rank, meta, sends, recvs)

    def _split(self, meta: Meta, color: int, key: int) -> Comm:
        group, rank = self._hub.join(self._group, self.rank, meta, (color, key), _split)
        return SimComm(self._hub, group, rank)


# ---- Where the members of a group meet: (log, group, meta, what each brought) -> what each gets


def _split(log: Log | None, group: Group, meta: Meta, brought: list[tuple[int, int]]) -> list[tuple[Group, int]]:
    members: dict[int, list[tuple[int, int]]] = {}
    for rank, (color, key) in enumerate(brought):
        members.setdefault(color, []).append((key, rank))
    got: dict[int, tuple[Group, int]] = {}
    for part in members.values():
        order = [rank for _, rank in sorted(part)]
        child = Group(tuple([group.ranks[r] for r in order]))
        got |= {r: (child, i) for i, r in enumerate(order)}
    _note(log, group, meta, 0)
    return [got[r] for r in range(len(brought))]


def _barrier(log: Log | None, group: Group, meta: Meta, brought: list[Any]) -> list[None]:
    _note(log, group, meta, 0)
    return [None] * len(brought)


def _allgather(log: Log | None, group: Group, meta: Meta, brought: list[Any]) -> list[Array]:
    _note(log, group, meta, brought[0][0].nbytes)
    assert meta.dtype is not None
    whole = np.stack([to_bytes(x) for x, _ in brought])  # as bytes: np.stack itself would change the byte order
    return [from_bytes(whole.reshape(-1), meta.dtype, (len(brought), *meta.shape))] * len(brought)


def _broadcast(log: Log | None, group: Group, meta: Meta, brought: list[Any]) -> list[Array]:
    assert meta.root is not None
    x = np.array(brought[meta.root][0])
    _note(log, group, meta, x.nbytes, np.arange(len(brought))[:, None] == meta.root)
    return [x] * len(brought)


def _alltoallv(log: Log | None, group: Group, meta: Meta, brought: list[Any]) -> list[tuple[Array, Array]]:
    """One gather of all rows: from order (from, to) to order (to, from); each rank gets its own part of the result."""
    assert meta.dtype is not None
    size = row_bytes(meta.dtype, meta.shape)
    counts = np.stack([c for _, c in brought])  # (n, n) [from, to]
    _note(log, group, meta, size, counts)
    received = np.ascontiguousarray(counts.T)  # (n, n) [to, from]
    starts = _starts(counts).T.ravel()  # where the rows of each (to, from) lie now
    order = np.repeat(starts - _starts(received).ravel(), received.ravel()) + np.arange(received.sum())
    rows = np.concatenate([to_bytes(x).reshape(len(x), size) for x, _ in brought]).take(order, axis=0)
    ends = np.cumsum(received.sum(axis=1)).tolist()
    parts = [rows[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return [
        (from_bytes(part.reshape(-1), meta.dtype, (len(part), *meta.shape)), c)
        for part, c in zip(parts, received, strict=True)
    ]


def _starts(counts: Array) -> Array:
    """Exclusive running sum over a matrix, row by row.  counts (n, n) -> (n, n)."""
    return (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)


def _note(log: Log | None, group: Group, meta: Meta, unit: int, units: Any = 1) -> None:
    """Member i has units[i, j] times `unit` bytes for member j; `units` broadcasts to (n, n) and is kept small."""
    if log is not None:
        units = np.asarray(units)
        small = units.astype(np.min_scalar_type(units.max()))
        log.add_collective(meta.op, meta.label, group.ranks, np.broadcast_to(small, (len(group.ranks),) * 2), unit)


_MEET: dict[str, Callable[..., Sequence[Any]]] = {
    "barrier": _barrier,
    "allgather": _allgather,
    "alltoallv": _alltoallv,
    "broadcast": _broadcast,
}
