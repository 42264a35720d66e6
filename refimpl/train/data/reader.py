"""Batches out of shards, in an order that a seed decides, by a cursor that says how many samples are consumed (R 4.1).

A cursor counts samples of all ranks together. So a run that was saved on W ranks goes on with W' ranks where it was: the batches
are the same, only divided otherwise, and over all ranks every sample comes once an epoch, whatever W is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.layers.loss import IGNORE

from .order import Permutation
from .shards import Placed, Shards

BLOCK = 1 << 15
"""Positions whose samples are computed at once: a pass of the network is a hundred calls of NumPy, however few it is of."""
AHEAD = 1 << 17
"""Tokens that are read at once, in batches of fewer, as soon as two batches follow one another."""


@dataclass(frozen=True)
class Cursor:
    """Where a run is in its data: `samples` consumed by all ranks together, in the order of `seed`, of the shards with fingerprint
    `data`. A checkpoint keeps `to_dict()`.
    """

    samples: int
    seed: int
    data: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` of it gives an equal cursor."""
        return {"schema": "refimpl-cursor/1", "samples": self.samples, "seed": self.seed, "data": self.data}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Cursor:
        """SpecError for anything that is no cursor."""
        require(isinstance(d, Mapping) and d.get("schema") == "refimpl-cursor/1", f"not a cursor: {d!r}")
        found = cls(d.get("samples"), d.get("seed"), d.get("data"))  # type: ignore[arg-type]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (found.samples, found.seed))
        require(whole and isinstance(found.data, str), f"not a cursor: {d!r}")
        return found


@dataclass(frozen=True)
class Batch:
    """tokens (B, S); labels (B, S), -100 on padding; valid (B, S), 0 on padding, None if there is none; documents (B, S) if
    attention is to stay inside them (R 5.1), and then the first token of a document is no label either.
    """

    tokens: Array
    labels: Array
    valid: Array | None = None
    documents: Array | None = None

    def inputs(self) -> dict[str, Array]:
        """As keyword arguments of the model's `inputs`."""
        return {name: a for name, a in vars(self).items() if a is not None}


class Corpus(Protocol):
    """What there is an order of: rows, what tells them from others, and where they come from, for a message."""

    @property
    def source(self) -> str:
        """File or folder."""

    @property
    def fingerprint(self) -> str:
        """The same for the same rows only."""

    def __len__(self) -> int: ...


class Ordered(ABC):
    """The rows of a corpus in the order of `seed`, another one in every epoch; None for epochs without end."""

    seed: int
    epochs: int | None

    @property
    @abstractmethod
    def corpus(self) -> Corpus:
        """The rows."""

    def start(self) -> Cursor:
        """The cursor of a run that begins."""
        return Cursor(0, self.seed, self.corpus.fingerprint)

    def check(self, cursor: Cursor) -> None:
        """SpecError for the cursor of other data, of another order, or past the end."""
        theirs = f"the cursor is of shards {cursor.data}"
        require(cursor.data == self.corpus.fingerprint, f"{theirs}, these are {self.corpus.fingerprint}")
        require(cursor.seed == self.seed, f"the cursor is of the order of seed {cursor.seed}, not {self.seed}")
        end = self.end
        past = end is not None and cursor.samples > end
        require(not past, f"the cursor is past the end: {cursor.samples} samples consumed, there are {end}")

    @property
    def end(self) -> int | None:
        """Samples of all epochs."""
        return None if self.epochs is None else len(self.corpus) * self.epochs

    def following(self, cursor: Cursor, batch: int, *, rank: int = 0, ranks: int = 1) -> tuple[Array, Cursor]:
        """My share (n,) of the rows of the next `batch` samples, and the cursor after all of them. SpecError at the end."""
        require(batch >= 1 and 0 <= rank < ranks, f"batch {batch}, rank {rank} of {ranks}")
        self.check(cursor)
        if self.end is not None:
            batch = min(batch, self.end - cursor.samples)
        if batch == 0:
            raise SpecError(f"the data is at its end: all {self.end} samples are consumed")
        first, last = cursor.samples + batch * rank // ranks, cursor.samples + batch * (rank + 1) // ranks
        return self.samples(first, last), replace(cursor, samples=cursor.samples + batch)

    def samples(self, first: int, last: int) -> Array:
        """Which rows (last - first,) come at positions first to last - 1 of the run; nothing is read."""
        n = len(self.corpus)
        parts = []
        while first < last:
            epoch, at = divmod(first, n)
            block = at // BLOCK
            found = _block(n, (self.seed, epoch), block)[at - block * BLOCK :][: last - first]
            parts.append(found)
            first += len(found)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


Asked = tuple[Cursor, int, int, int]
"""Cursor, batch, rank, ranks of a `take`."""


@dataclass
class Ahead:
    """What a reader has read before it is asked for, in order, each batch given once; and what is asked for next by who goes on."""

    ready: deque[tuple[Asked, tuple[Batch, Cursor]]] = field(default_factory=deque)
    next: Asked | None = None

    def holds(self, asked: Asked) -> bool:
        """Whether this is what comes next of what is read."""
        return bool(self.ready) and self.ready[0][0] == asked


@dataclass(frozen=True)
class Reader(Ordered):
    """Rows of shards as batches."""

    shards: Shards
    seed: int = 0
    epochs: int | None = 1
    masked: bool = False
    _ahead: Ahead = field(default_factory=Ahead, init=False, repr=False, compare=False)

    @property
    def corpus(self) -> Shards:
        """The shards."""
        return self.shards

    def take(self, cursor: Cursor, batch: int, *, rank: int = 0, ranks: int = 1) -> tuple[Batch, Cursor]:
        """My share of the next `batch` samples, and the cursor after all of them. Ranks take neighbouring shares whose sizes differ
        by one at most; together they are the batch. The last batch of the run may be short. SpecError at the end.
        """
        asked, ahead = (cursor, batch, rank, ranks), self._ahead
        if asked == ahead.next and not ahead.holds(asked):
            ahead.ready = self._from(*asked)
        if ahead.holds(asked):
            found = ahead.ready.popleft()[1]
        else:
            rows, after = self.following(cursor, batch, rank=rank, ranks=ranks)
            found = self._read(rows), after
        ahead.next = found[1], batch, rank, ranks
        return found

    def _from(self, cursor: Cursor, batch: int, rank: int, ranks: int) -> deque[tuple[Asked, tuple[Batch, Cursor]]]:
        """My shares of the batches from a cursor on, whole ones of AHEAD tokens together at most; none where that is not two."""
        most = AHEAD * ranks // (batch * self.shards.length)
        if self.end is not None:
            most = min(most, (self.end - cursor.samples) // batch)
        if most < 2:
            return deque()
        begin = range(cursor.samples, cursor.samples + most * batch, batch)
        first, last = batch * rank // ranks, batch * (rank + 1) // ranks
        if ranks == 1:
            rows = self.samples(begin.start, begin.stop)
        else:
            rows = np.concatenate([self.samples(at + first, at + last) for at in begin])
        whole, n = vars(self._read(rows)), last - first
        found: deque[tuple[Asked, tuple[Batch, Cursor]]] = deque()
        for i, at in enumerate(begin):
            mine = [None if a is None else a[i * n : i * n + n] for a in whole.values()]
            after = Cursor(at + batch, cursor.seed, cursor.data)
            found.append(((cursor, batch, rank, ranks), (Batch(*mine), after)))
            cursor = after
        return found

    def _read(self, rows: Array) -> Batch:
        if not (self.shards.padded or self.masked):
            tokens = self.shards.rows(rows)
            return Batch(tokens, tokens)
        placed = self.shards.placed(rows)
        tokens = self.shards.rows(rows, placed)
        number, length = self._runs(rows, placed)
        documents = np.repeat(number, length).reshape(tokens.shape)
        padding = documents < 0
        labels, valid = tokens.copy(), (~padding).astype(np.int64)
        if self.masked:
            labels.reshape(-1)[(np.cumsum(length) - length)[(number >= 0) & (length > 0)]] = IGNORE
        np.copyto(labels, IGNORE, where=padding)
        return Batch(tokens, labels, valid, documents if self.masked else None)

    def _runs(self, rows: Array, placed: Placed) -> tuple[Array, Array]:
        """Every row's pieces and then its padding: their numbers in the row, -1 for padding, and how many tokens they have.
        rows (B,) -> (B + P,), (B + P,).
        """
        counts, ends = self.shards.ends(rows, placed)
        padding = np.cumsum(counts + 1) - 1
        number = np.arange(len(ends)) - np.repeat(padding - counts, counts + 1)
        number[padding] = -1
        length = np.diff(ends, prepend=0)
        length[padding[:-1] + 1] += self.shards.length  # a row's first piece begins where the row does
        require((length >= 0).all(), "a row's pieces are longer than the row: the shard was damaged")
        return number, length


@lru_cache(maxsize=16)
def _block(n: int, seed: tuple[int, ...], block: int) -> Array:
    found = Permutation(n, seed)(np.arange(block * BLOCK, min(n, (block + 1) * BLOCK)))
    found.flags.writeable = False
    return found


# ---- Random generators of a run


def random_state(rng: np.random.Generator) -> dict[str, Any]:
    """The state of a generator, JSON-able, for a checkpoint."""
    state: dict[str, Any] = dict(rng.bit_generator.state)
    require(state["bit_generator"] == "PCG64", f"{state['bit_generator']}: expected np.random.default_rng's PCG64")
    return state


def random_generator(state: Mapping[str, Any]) -> np.random.Generator:
    """The generator that goes on from a state. SpecError for what is none."""
    bits: Any = np.random.PCG64()
    try:
        bits.state = dict(state)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise SpecError(f"not the state of a generator: {state!r}") from error
    return np.random.Generator(bits)
