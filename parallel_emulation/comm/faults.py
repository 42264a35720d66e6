"""Ranks that die: a communicator that ends its rank in the middle of a step, on the simulator and on MPI.

`mortal(comm, calls=40)` is the same communicator, and so are the groups split from it, until the rank makes its 40th call:
that one kills it. On the simulator a killed rank raises `RankFault` (the others are ended, as their partner is gone); under
MPI `how="kill"` sends the process SIGKILL, and mpiexec ends the job.
"""

from __future__ import annotations

import os
import signal
from typing import Any, Literal

from refimpl.autograd import Array, require

from .communicator import Comm, Meta, Recv, Send


class RankFault(RuntimeError):
    """A rank is gone: no mistake of the program, and nothing it could have prevented."""


class _Life:
    """How many calls a rank has left, over all of its groups."""

    def __init__(self, rank: int, calls: int, how: Literal["raise", "kill"]) -> None:
        self.rank, self.left, self.how = rank, calls, how

    def spend(self, meta: Meta) -> None:
        self.left -= 1
        if self.left > 0:
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RankFault(f"rank {self.rank} died in {meta}")


class _Mortal(Comm):
    """A communicator whose calls are counted."""

    def __init__(self, comm: Comm, life: _Life) -> None:
        self._comm, self._life = comm, life
        self.rank, self.ranks = comm.rank, comm.ranks

    def _collective(self, meta: Meta, x: Array | None, counts: Array | None) -> Any:
        self._life.spend(meta)
        return self._comm._collective(meta, x, counts)

    def _exchange(self, meta: Meta, sends: list[Send], recvs: list[Recv]) -> list[Array]:
        self._life.spend(meta)
        return self._comm._exchange(meta, sends, recvs)

    def _split(self, meta: Meta, color: int, key: int) -> Comm:
        self._life.spend(meta)
        return _Mortal(self._comm._split(meta, color, key), self._life)


def mortal(comm: Comm, calls: int, how: Literal["raise", "kill"] = "raise") -> Comm:
    """The communicator of a rank that dies in its call number `calls`, counted from 1."""
    require(calls >= 1, f"a rank dies in its first call at the earliest, not in call {calls}")
    return _Mortal(comm, _Life(comm.world_rank, calls, how))
