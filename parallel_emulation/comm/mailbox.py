"""Where simulated ranks leave things for each other: groups, messages on their way, receives that wait."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.autograd import Array

from .communicator import Meta, Recv


@dataclass(eq=False, slots=True)
class Group:
    """A communicator: its members (world ranks), the collective they are gathering for, their messages on the way."""

    ranks: tuple[int, ...]
    meta: Meta | None = None
    posted: dict[int, Any] = field(default_factory=dict)  # member -> what it brought
    sends: dict[tuple[int, int], deque[Message]] = field(default_factory=dict)  # (from, to) -> not yet received
    recvs: dict[tuple[int, int], deque[tuple[Ticket, int, Recv]]] = field(default_factory=dict)

    def absent(self) -> list[int]:
        """World ranks of the members that the posted ones wait for."""
        return [rank for i, rank in enumerate(self.ranks) if i not in self.posted] if self.posted else []


@dataclass(eq=False, slots=True)
class Ticket:
    """A rank in send, recv or exchange: what has come in so far, how many matches it still waits for."""

    owner: int  # world rank
    meta: Meta
    group: Group
    out: list[Any]
    missing: int
    asleep: bool = False

    def open_ends(self) -> tuple[list[int], list[int]]:
        """World ranks that have yet to receive from this one, and that it has yet to receive from."""
        to = [m.to for queue in self.group.sends.values() for m in queue if m.ticket is self]
        pairs = [pair for pair, queue in self.group.recvs.items() for t, _, _ in queue if t is self]
        return to, [self.group.ranks[source] for source, _ in pairs]


@dataclass(eq=False, slots=True)
class Message:
    """A message on its way: the copy that travels, and the sender's own array to see whether it stays as it was."""

    ticket: Ticket
    to: int  # world rank
    label: str
    data: Array
    original: Array


def same_bytes(a: Array, b: Array) -> bool:
    """Bitwise comparison (NaNs equal themselves); the common case of plain rows without a temporary copy."""
    if a.dtype.fields is not None:
        return all(same_bytes(a[name], b[name]) for name in a.dtype.fields)
    kind = np.dtype(f"u{a.dtype.itemsize}") if a.dtype.itemsize in (1, 2, 4, 8) else np.dtype(f"V{a.dtype.itemsize}")
    return bool(np.array_equal(np.asarray(a).view(kind), np.asarray(b).view(kind)))
