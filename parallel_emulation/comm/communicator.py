"""The communicator: a handful of calls that move bytes. Everything that adds or reorders is written once, on top.

A rank program is a plain function `f(comm, ...)` that blocks in these calls, the same source on the simulator
(`simulator.spmd`) and on MPI (`mpi.run`). Engines move bytes and the specification does the arithmetic, so a result
does not depend on the engine: an MPI library's own sum is in no fixed order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from refimpl.autograd import Array, SpecError, require

from .wire import as_array


class Send(NamedTuple):
    """One message out: to which rank of the group, what; the label defaults to that of the exchange."""

    to: int
    x: Any
    label: str | None = None


class Recv(NamedTuple):
    """One message in: from which rank of the group; `like` (a thing with shape and dtype) is what it must look like."""

    source: int
    label: str | None = None
    like: Any = None


class Meta(NamedTuple):
    """What every member of a group must say alike when it joins a collective."""

    op: str
    label: str
    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] = ()
    root: int | None = None

    def __str__(self) -> str:
        what = f"{self.op} {self.label!r}" if self.label else self.op
        what += "" if self.dtype is None else f" of {self.dtype}{list(self.shape)}"
        return what if self.root is None else f"{what} from root {self.root}"


class Comm(ABC):
    """One rank's end of a group of ranks.

    Arguments are copied, results belong to the caller: no two ranks ever hold the same memory. What was sent must stay
    as it is until its receiver has it (a real engine reads it where it lies); the simulator reports a program that
    changes it before. Every call takes a label, which must agree between the ranks that meet in it and is logged.
    """

    rank: int  # my number in the group
    ranks: tuple[int, ...]  # the members, as ranks of the whole run, in group order

    @property
    def size(self) -> int:
        """How many members the group has."""
        return len(self.ranks)

    @property
    def world_rank(self) -> int:
        """My number in the whole run."""
        return self.ranks[self.rank]

    def split(self, color: int, key: int = 0, label: str = "") -> Comm:
        """The group of those members that give the same color, ordered by (key, rank)."""
        return self._split(Meta("split", label), int(color), int(key))

    def barrier(self, label: str = "") -> None:
        """Wait until every member is here."""
        self._collective(Meta("barrier", label), None, None)

    def allgather(self, x: Any, label: str = "") -> Array:
        """y[r] = x of rank r.  x (*) -> y (size, *).  dtype and shape must agree."""
        x = as_array(x, "allgather")
        return self._collective(Meta("allgather", label, x.dtype, x.shape), x, None)

    def alltoallv(self, rows: Any, counts: Any, label: str = "") -> tuple[Array, Array]:
        """rows (M, *), the first counts[0] of them for rank 0, ... -> (rows (M', *), counts (size,)) by source rank.

        dtype and row shape must agree; SpecError unless counts are `size` whole numbers >= 0 that add up to M.
        """
        rows = as_array(rows, "alltoallv")
        require(rows.ndim >= 1, "alltoallv: rows need a leading axis")
        counts = checked_counts(counts, self.size, len(rows))
        y, received = self._collective(Meta("alltoallv", label, rows.dtype, rows.shape[1:]), rows, counts)
        return y, received

    def broadcast(self, x: Any, root: int = 0, label: str = "") -> Array:
        """y = x of the root; what the others give is ignored and may be None.  x (*) -> y (*)."""
        self._check_peer(root, "broadcast from")
        mine = as_array(x, "broadcast") if self.rank == root else None
        return self._collective(Meta("broadcast", label, root=root), mine, None)

    def exchange(
        self, sends: Sequence[Send | tuple[int, Any]] = (), recvs: Sequence[Recv | int] = (), label: str = ""
    ) -> list[Array]:
        """Start every send and every receive, wait for all; returns what came in, in the order of `recvs`.

        Messages between two ranks of a group arrive in the order they were sent. This is the batched isend/irecv of a
        pipeline: two ranks may exchange with each other in both directions without a deadlock.
        """
        out = [Send(*s) for s in sends]
        expected = [r if isinstance(r, Recv) else Recv(r) for r in recvs]
        return self._checked_exchange("exchange", out, expected, label)

    def send(self, x: Any, to: int, label: str = "") -> None:
        """Send one array to rank `to` of the group."""
        self._checked_exchange("send", [Send(to, x)], [], label)

    def recv(self, source: int, label: str = "", like: Any = None) -> Array:
        """The next array from rank `source` of the group; checked against the shape and dtype of `like`."""
        return self._checked_exchange("recv", [], [Recv(source, None, like)], label)[0]

    def _checked_exchange(self, op: str, sends: list[Send], recvs: list[Recv], label: str) -> list[Array]:
        for peer, *_ in (*sends, *recvs):
            self._check_peer(peer, f"{op} with")
        out = [Send(s.to, as_array(s.x, op), label if s.label is None else s.label) for s in sends]
        expected = [r if r.label is not None else Recv(r.source, label, r.like) for r in recvs]
        return self._exchange(Meta(op, label), out, expected)

    def _check_peer(self, peer: int, what: str) -> None:
        if not 0 <= peer < self.size:
            raise SpecError(f"{what} rank {peer} of a group of {self.size}")

    @abstractmethod
    def _collective(self, meta: Meta, x: Array | None, counts: Array | None) -> Any: ...

    @abstractmethod
    def _exchange(self, meta: Meta, sends: list[Send], recvs: list[Recv]) -> list[Array]: ...

    @abstractmethod
    def _split(self, meta: Meta, color: int, key: int) -> Comm: ...


def checked_counts(counts: Any, size: int, total: int) -> Array:
    """counts (size,) int64, whole numbers >= 0 that add up to `total`; SpecError otherwise."""
    counts = np.array(counts)
    if counts.dtype.kind not in "iu" or counts.shape != (size,):
        raise SpecError(f"counts are {counts.dtype}{list(counts.shape)}, expected {size} whole numbers, one per rank")
    counts = counts.astype(np.int64, copy=False)
    if counts.min() < 0 or counts.sum() != total:
        raise SpecError(f"counts {counts.tolist()} must be >= 0 and add up to {total} rows")
    return counts


def split_into(comm: Comm, groups: Sequence[Sequence[int]], label: str = "") -> Comm:
    """My group out of a list of groups of ranks, members in the order listed; every rank must be in exactly one."""
    listed = [r for group in groups for r in group]
    twice = [r for r, times in Counter(listed).items() if times > 1]
    require(not twice, f"the groups overlap in ranks {spans(twice)}")
    require(sorted(listed) == list(range(comm.size)), f"the groups hold {spans(listed)}, not ranks 0-{comm.size - 1}")
    mine = next(i for i, group in enumerate(groups) if comm.rank in group)
    return comm.split(mine, list(groups[mine]).index(comm.rank), label)


def spans(ranks: Sequence[int]) -> str:
    """Ranks in short: (0, 1, 2, 5) -> '0-2, 5'."""
    ranks = sorted(ranks)
    starts = [r for i, r in enumerate(ranks) if not i or r != ranks[i - 1] + 1]
    ends = [r for i, r in enumerate(ranks) if i == len(ranks) - 1 or r + 1 != ranks[i + 1]]
    return ", ".join([str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)])


def disagreement(theirs: Meta, mine: Meta) -> str:
    """The first thing in which two calls differ: call, label, dtype, shape or root."""
    return next(f for f, a, b in zip(Meta._fields, theirs, mine, strict=True) if a != b).replace("op", "call")


def mismatch(label: str, x: Array, want: Recv) -> str:
    """'' if a message is what its receiver expects, else the complaint."""
    if label != want.label:
        return f"is labelled {label!r}, the receiver expects {want.label!r}"
    if want.like is not None and (x.shape, x.dtype) != (tuple(want.like.shape), want.like.dtype):
        return f"is {x.dtype}{list(x.shape)}, the receiver expects {want.like.dtype}{list(want.like.shape)}"
    return ""
