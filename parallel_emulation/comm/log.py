"""The log of a run: every call of every rank, with the bytes it sent to each peer. Volume claims are asserts on it."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from refimpl.autograd import Array


class Record(NamedTuple):
    """One call of one rank. `sent` holds (world rank, bytes), never the rank itself; ranks are world ranks."""

    rank: int
    op: str
    label: str
    group: tuple[int, ...]
    sent: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        """What this call put on the wires."""
        return sum([n for _, n in self.sent])


class _Whole(NamedTuple):
    """A collective, all its members at once: bytes from member i to member j are units[i, j] * unit."""

    op: str
    label: str
    group: tuple[int, ...]
    units: Array
    unit: int

    def record(self, i: int) -> Record:
        row = self.units[i]
        peers = [j for j in np.flatnonzero(row).tolist() if j != i] if self.unit else []
        sent = tuple([(self.group[j], int(row[j]) * self.unit) for j in peers])
        return Record(self.group[i], self.op, self.label, self.group, sent)


class Log:
    """The calls of a run, in order for each rank. Give an empty one to `spmd(..., log=log)` and read it afterwards.

    Collectives count as the bytes each member has for each other one (an allgather of S bytes: S to every other
    member), whatever path an engine lets them take. Splits and barriers send nothing. A simulator's log holds every
    rank, the log of an MPI process its own rank.
    """

    def __init__(self) -> None:
        self._entries: list[Record | _Whole] = []

    def add(self, record: Record) -> None:
        """Note one rank's call."""
        self._entries.append(record)

    def add_collective(self, op: str, label: str, group: tuple[int, ...], units: Array, unit: int) -> None:
        """Note the call of all members of a group: units (n, n) [from, to], `unit` bytes each."""
        self._entries.append(_Whole(op, label, group, units, unit))

    def __iter__(self) -> Iterator[Record]:
        for entry in self._entries:
            if isinstance(entry, Record):
                yield entry
            else:
                yield from [entry.record(i) for i in range(len(entry.group))]

    def select(self, *, rank: int | None = None, op: str = "*", label: str = "*") -> list[Record]:
        """The calls of a rank (default: all ranks) whose op and label match the patterns."""
        return [r for r in self if rank in (None, r.rank) and fnmatchcase(r.op, op) and fnmatchcase(r.label, label)]

    def calls(self, *, rank: int | None = None, op: str = "*", label: str = "*") -> int:
        """How many there are: the steps of an algorithm, asked for one rank."""
        return len(self.select(rank=rank, op=op, label=label))

    def bytes(self, *, rank: int | None = None, op: str = "*", label: str = "*") -> int:
        """How many bytes they sent."""
        return sum([r.bytes for r in self.select(rank=rank, op=op, label=label)])

    def matrix(self, n: int, *, op: str = "*", label: str = "*") -> Array:
        """(n, n) int64: bytes from rank i to rank j, over all matching calls; zero diagonal."""
        total = np.zeros((n, n), np.int64)
        for record in self.select(op=op, label=label):
            for peer, size in record.sent:
                total[record.rank, peer] += size
        return total
