"""A communicator that counts what its rank puts on the wires and how long it waits there, on the simulator and on MPI alike.

Unlike a `Log`, which keeps every call, it needs no memory that grows: a training run asks for the counts of each step. Bytes
are counted as a log counts them: what each member has for each other one, whatever path an engine lets it take.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from refimpl.autograd import Array

from .communicator import Comm, Meta, Recv, Send
from .wire import row_bytes


class Tally:
    """One rank's counts since `taken` was last called: bytes (n,) to each rank of the run, messages, seconds inside calls.

    Seconds hold the waiting for others; on the simulator, where one rank runs at a time, also their computing.
    """

    def __init__(self, ranks: int) -> None:
        self.sent, self.messages, self.seconds = np.zeros(ranks, np.int64), 0, 0.0

    def add(self, peer: int, size: int) -> None:
        """Note a message to a rank of the run."""
        self.sent[peer] += size
        self.messages += size > 0

    def taken(self) -> dict[str, Any]:
        """The counts as JSON; from here on they begin anew."""
        found = {"sent": self.sent.tolist(), "messages": int(self.messages), "seconds": self.seconds}
        self.sent[:], self.messages, self.seconds = 0, 0, 0.0
        return found


class _Counted(Comm):
    """A communicator whose calls are counted."""

    def __init__(self, comm: Comm, tally: Tally) -> None:
        self._comm, self._tally = comm, tally
        self.rank, self.ranks = comm.rank, comm.ranks

    def _collective(self, meta: Meta, x: Array | None, counts: Array | None) -> Any:
        if x is not None:
            for peer, size in self._sizes(meta, x, counts):
                self._tally.add(self.ranks[peer], size)
        began = time.perf_counter()
        found = self._comm._collective(meta, x, counts)
        self._tally.seconds += time.perf_counter() - began
        return found

    def _sizes(self, meta: Meta, x: Array, counts: Array | None) -> list[tuple[int, int]]:
        """(member, bytes) of what a collective sends to the others."""
        each = [x.nbytes] * self.size
        if counts is not None:
            assert meta.dtype is not None
            each = [int(n) * row_bytes(meta.dtype, meta.shape) for n in counts]
        return [(peer, size) for peer, size in enumerate(each) if peer != self.rank]

    def _exchange(self, meta: Meta, sends: list[Send], recvs: list[Recv]) -> list[Array]:
        for s in sends:
            if s.to != self.rank:
                self._tally.add(self.ranks[s.to], s.x.nbytes)
        began = time.perf_counter()
        found = self._comm._exchange(meta, sends, recvs)
        self._tally.seconds += time.perf_counter() - began
        return found

    def _split(self, meta: Meta, color: int, key: int) -> Comm:
        return _Counted(self._comm._split(meta, color, key), self._tally)


def counted(comm: Comm) -> tuple[Comm, Tally]:
    """The communicator of a whole run, counted, and so are the groups split from it; the counts."""
    tally = Tally(comm.size)
    return _Counted(comm, tally), tally
