"""The same rank programs on MPI, through mpi4py (extra `mpi`). Bytes go in, bytes come out; MPI never adds.

Every collective first compares a fingerprint of what its members say about it, so a call that does not fit the others
is an error here too, and not the silent hang that MPI makes of it. Start with `python -m mpi4py`, which ends the whole
job when one rank raises, or with `python -m refimpl.parallel_emulation run`, which also has a timeout. See docs/mpi.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd import Array, SpecError

from .communicator import Comm, Meta, Recv, Send, disagreement, mismatch
from .log import Log, Record
from .report import joined_text, ticket_text
from .wire import dtype_from_json, dtype_to_json, from_bytes, pack, row_bytes, to_bytes, unpack

_TAG = 0


def run(program: Callable[..., Any], *args: Any, log: Log | None = None) -> Any:
    """Run `program(comm, *args)` as this process's rank of the MPI job; returns this rank's own result."""
    return program(world(log), *args)


def world(log: Log | None = None, doing: Doing | None = None) -> MpiComm:
    """All processes of the job. SpecError if mpi4py is not installed (extra `mpi`)."""
    try:
        from mpi4py import MPI  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise SpecError("mpi4py is not installed; pip install 'deepseek-v3-refimpl[mpi]'") from error
    own = MPI.COMM_WORLD.Dup()  # our messages meet nobody else's
    return MpiComm(own, MPI, tuple(range(own.Get_size())), log, doing or Doing())


@dataclass
class Doing:
    """The call this process is in, for the report when the time is up."""

    text: str = "is computing"

    @contextmanager
    def this(self, text: str) -> Iterator[None]:
        """While inside, that is what it is doing."""
        before, self.text = self.text, text
        yield
        self.text = before  # not after an error: the report is to say where that was


class MpiComm(Comm):
    """This process's end of an MPI communicator."""

    def __init__(self, comm: Any, mpi: Any, ranks: tuple[int, ...], log: Log | None, doing: Doing) -> None:
        self._comm, self._mpi, self._log, self._doing = comm, mpi, log, doing
        self.rank, self.ranks = comm.Get_rank(), ranks

    def _collective(self, meta: Meta, x: Array | None, counts: Array | None) -> Any:
        with self._doing.this(joined_text(meta, self.ranks, [])):
            self._agree(meta)
            match meta.op:
                case "barrier":
                    return self._barrier(meta)
                case "allgather":
                    return self._allgather(meta, x)
                case "broadcast":
                    return self._broadcast(meta, x)
                case _:
                    return self._alltoallv(meta, x, counts)

    def _agree(self, meta: Meta) -> None:
        """SpecError on every rank if one member's call differs from that of rank 0."""
        mine = _meta_to_json(meta)
        marks = np.empty((self.size, 16), np.uint8)
        self._comm.Allgather(np.frombuffer(hashlib.blake2b(mine, digest_size=16).digest(), np.uint8), marks)
        differing = np.flatnonzero((marks != marks[0]).any(axis=1))
        if not differing.size:
            return
        lengths = np.empty(self.size, np.int64)
        self._comm.Allgather(np.array([len(mine)]), lengths)
        texts = np.empty(int(lengths.sum()), np.uint8)
        self._comm.Allgatherv(np.frombuffer(mine, np.uint8), [texts, lengths])
        metas = [_meta_from_json(t.tobytes()) for t in np.split(texts, np.cumsum(lengths)[:-1])]
        other, first = metas[differing[0]], metas[0]
        here, there = self.ranks[differing[0]], self.ranks[0]
        differs = disagreement(first, other)
        raise SpecError(f"rank {here} calls {other} while rank {there} is in {first}: another {differs}")

    def _barrier(self, meta: Meta) -> None:
        self._note(meta, [])
        self._comm.Barrier()

    def _allgather(self, meta: Meta, x: Array | None) -> Array:
        assert x is not None
        self._note(meta, [x.nbytes] * self.size)
        y = np.empty((self.size, *x.shape), x.dtype)
        self._comm.Allgather([to_bytes(x), self._mpi.BYTE], [to_bytes(y), self._mpi.BYTE])
        return y

    def _broadcast(self, meta: Meta, x: Array | None) -> Array:
        message = None if x is None else pack(x, meta.label)
        self._note(meta, [] if x is None else [x.nbytes] * self.size)
        length = np.array([0 if message is None else message.nbytes])
        self._comm.Bcast(length, root=meta.root)
        message = np.empty(length[0], np.uint8) if message is None else message
        self._comm.Bcast([message, self._mpi.BYTE], root=meta.root)
        return unpack(message)[0]

    def _alltoallv(self, meta: Meta, x: Array | None, counts: Array | None) -> tuple[Array, Array]:
        assert x is not None and counts is not None and meta.dtype is not None
        size = row_bytes(meta.dtype, meta.shape)
        self._note(meta, (counts * size).tolist())
        received = np.empty(self.size, np.int64)
        self._comm.Alltoall(counts, received)
        y = np.empty(int(received.sum()) * size, np.uint8)
        row = self._mpi.BYTE.Create_contiguous(size).Commit()  # counts in rows stay small where bytes would overflow
        try:
            places = [np.cumsum(c) - c for c in (counts, received)]
            self._comm.Alltoallv([to_bytes(x), (counts, places[0]), row], [y, (received, places[1]), row])
        finally:
            row.Free()
        return from_bytes(y, meta.dtype, (int(received.sum()), *meta.shape)), received

    def _exchange(self, meta: Meta, sends: list[Send], recvs: list[Recv]) -> list[Array]:
        if self._log is not None:
            sent = [(self.ranks[s.to], s.x.nbytes) for s in sends if s.to != self.rank]
            self._log.add(Record(self.world_rank, meta.op, meta.label, self.ranks, tuple(sent)))
        to, source = [self.ranks[s.to] for s in sends], [self.ranks[r.source] for r in recvs]
        with self._doing.this(ticket_text(meta, self.ranks, to, source)):
            messages = [pack(s.x, s.label or "") for s in sends]
            started = [self._comm.Isend([m, self._mpi.BYTE], s.to, _TAG) for m, s in zip(messages, sends, strict=True)]
            got = [self._receive(want) for want in recvs]
            self._mpi.Request.Waitall(started)
        return got

    def _receive(self, want: Recv) -> Array:
        status = self._mpi.Status()
        message = self._comm.Mprobe(want.source, _TAG, status)
        buffer = np.empty(status.Get_count(self._mpi.BYTE), np.uint8)
        message.Recv([buffer, self._mpi.BYTE])
        x, label = unpack(buffer)
        if complaint := mismatch(label, x, want):
            raise SpecError(f"the message from rank {self.ranks[want.source]} to rank {self.world_rank} {complaint}")
        return x

    def _split(self, meta: Meta, color: int, key: int) -> Comm:
        given = np.empty((self.size, 2), np.int64)
        with self._doing.this(joined_text(meta, self.ranks, [])):
            self._agree(meta)
            self._note(meta, [])
            self._comm.Allgather(np.array([color, key]), given)
            order = sorted([r for r in range(self.size) if given[r, 0] == color], key=lambda r: (given[r, 1], r))
            dense = np.unique(given[:, 0]).tolist().index(color)  # MPI's colors are small and not negative
            child = self._comm.Split(dense, order.index(self.rank))
        return MpiComm(child, self._mpi, tuple([self.ranks[r] for r in order]), self._log, self._doing)

    def _note(self, meta: Meta, volume: list[int]) -> None:
        """Log a collective: volume[j] bytes for member j."""
        if self._log is not None:
            sent = [(self.ranks[j], n) for j, n in enumerate(volume) if n and j != self.rank]
            self._log.add(Record(self.world_rank, meta.op, meta.label, self.ranks, tuple(sent)))


def _meta_to_json(meta: Meta) -> bytes:
    dtype = None if meta.dtype is None else dtype_to_json(meta.dtype)
    return json.dumps([meta.op, meta.label, dtype, meta.shape, meta.root]).encode()


def _meta_from_json(text: bytes) -> Meta:
    op, label, dtype, shape, root = json.loads(text)
    return Meta(op, label, None if dtype is None else dtype_from_json(dtype), tuple(shape), root)
