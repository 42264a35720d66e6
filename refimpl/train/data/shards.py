"""Shards: packed rows of tokens on disk, opened by memory mapping (R 4.1).

A folder holds, for every shard NAME,

NAME.tokens   (rows, S) uint16 or uint32, little-endian: the rows, one after the other
NAME.spans    (2, pieces) int64: the first and the last + 1 token of each piece of a document, ascending, counted over all rows;
              none goes over the end of a row; what lies in none is padding
NAME.first    (rows + 1,) int64: the first piece of each row, then their number. It says what a search of the spans says, in one
              look; older shards that lack it are searched

and `index.json`, written last: S, dtype, vocabulary, the tokenizer's fingerprint, how the documents were altered, and for every
shard its rows, pieces, tokens (without padding) and CRC-32s.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl.autograd.errors import SpecError, require, where
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import json_object

SCHEMA = "refimpl-shards/1"
OPEN = 512
"""Files that stay mapped, so that memory and address space do not grow with the corpus."""


@dataclass(frozen=True)
class Shard:
    """A line of the index."""

    name: str
    rows: int
    pieces: int
    tokens: int
    crc: tuple[int, ...]


class Placed(NamedTuple):
    """What sorts some rows (B,), so that what is near on the disk is read together; and for every shard that has some of them the
    shard and its rows (n,), ascending.
    """

    order: Array
    parts: list[tuple[int, Array]]


class Shards:
    """A folder of shards, checked when opened: every file is there, whole, and made by the tokenizer that is asked for.

    SpecError otherwise, also for a vocabulary larger than `vocab_size`, the model's.
    """

    def __init__(self, folder: str | Path, *, tokenizer: str | None = None, vocab_size: int | None = None) -> None:
        self.folder = Path(folder)
        index = self.folder / "index.json"
        unfinished = not index.exists() and any(self.folder.glob("*.shard.json"))
        require(not unfinished, f"{folder}: the build was not finished; the same `refimpl data build` goes on with it")
        with where(f"while reading {index}"):
            self.index = d = json_object(index)
            require(d.get("schema") == SCHEMA, f"schema {d.get('schema')!r}; expected {SCHEMA}")
            try:
                self.length, self.dtype, self.vocab_size = int(d["length"]), np.dtype(d["dtype"]), int(d["vocab_size"])
                self.tokenizer, self.pad = str(d["tokenizer"]), int(d["pad"])
                self.shards = tuple(
                    [Shard(s["name"], s["rows"], s["pieces"], s["tokens"], tuple(s["crc"])) for s in d["shards"]]
                )
            except (KeyError, TypeError, ValueError) as error:
                raise SpecError(f"no such index: {error!r}") from error
            require(self.shards, "no shards")
            require(all(len(s.crc) in (2, 3) for s in self.shards), "expected CRC-32s of two or three files a shard")
        made = f"{folder}: made by tokenizer {self.tokenizer}"
        require(tokenizer in (None, self.tokenizer), f"{made}, not by {tokenizer}: its ids mean other texts")
        fits = vocab_size is None or self.vocab_size <= vocab_size
        require(fits, f"{made} of {self.vocab_size} ids; the model has only {vocab_size}")
        self.first = np.cumsum([0, *[s.rows for s in self.shards]], dtype=np.int64)
        self._rows = int(self.first[-1])
        self.padded = any(s.tokens != s.rows * self.length for s in self.shards)
        for s in self.shards:
            self._check_size(s)
        self._maps: OrderedDict[tuple[int, int], Array] = OrderedDict()

    def __len__(self) -> int:
        return self._rows

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same rows in the same order only, as far as their CRCs tell."""
        rows = [[s.name, s.rows, s.pieces, *s.crc[:2]] for s in self.shards]  # the third follows from them
        return "sha256:" + sha256(json.dumps([self.length, self.tokenizer, rows]).encode()).hexdigest()

    @property
    def source(self) -> str:
        """The folder."""
        return str(self.folder)

    def tokens(self, shard: int) -> Array:
        """The rows of a shard (rows, S), mapped."""
        return self._mapped(shard, 0)

    def spans(self, shard: int) -> Array:
        """First and last + 1 of each piece of a shard (2, pieces), mapped."""
        return self._mapped(shard, 1)

    def first_pieces(self, shard: int) -> Array:
        """The first piece of each row of a shard, then their number (rows + 1,), mapped."""
        return self._mapped(shard, 2)

    def _mapped(self, shard: int, file: int) -> Array:
        if (shard, file) in self._maps:
            self._maps.move_to_end((shard, file))
            return self._maps[shard, file]
        s = self.shards[shard]
        dtype = self.dtype.newbyteorder("<") if file == 0 else np.dtype("<i8")
        shape = ((s.rows, self.length), (2, s.pieces), (s.rows + 1,))[file]
        found = np.asarray(  # a plain array: slicing a memmap costs several times as much
            np.memmap(self._files(s)[file], dtype, "r", shape=shape)
        )
        self._maps[shard, file] = found
        if len(self._maps) > OPEN:
            self._maps.popitem(last=False)
        return found

    def rows(self, which: Array, placed: Placed | None = None) -> Array:
        """Rows (B,) of all shards together -> tokens (B, S), int64. `placed`: of these rows, for who wants their ends too."""
        order, parts = placed or self.placed(which)
        read, at = np.empty((len(which), self.length), self.dtype), 0
        for shard, local in parts:
            # in other modes than "clip" NumPy copies once more, and an index takes twice as long
            self.tokens(shard).take(local, 0, read[at : at + len(local)], "clip")
            at += len(local)
        out = np.empty(read.shape, np.int64)
        out[order] = read
        return out

    def ends(self, which: Array, placed: Placed | None = None) -> tuple[Array, Array]:
        """How many pieces each of the rows (B,) has, and where in its row each piece ends, then the row itself (at S): (P + B,),
        row after row. The pieces of a row follow one another from its beginning; the rest of it is padding.
        """
        order, parts = placed or self.placed(which)
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        bounds = [self._pieces(shard, local) for shard, local in parts]
        first, last = (np.concatenate(a) for a in zip(*bounds, strict=True))
        counts, some = np.empty(len(which), np.int64), last - first
        require(some.min() >= 0 <= first.min(), f"{self.folder}: a row of {some.min()} pieces: a shard was damaged")
        counts[order] = some
        upto = np.cumsum(counts + 1)
        row = np.repeat(np.arange(len(which)), some)  # of every piece, in the order of the file
        within = np.arange(len(row)) - (np.cumsum(some) - some)[row]
        piece, last, at = first[row] + within, np.empty(len(row), np.int64), 0
        for (shard, _), (a, b) in zip(parts, bounds, strict=True):
            some_here = slice(at, at + int((b - a).sum()))
            last[some_here] = self.spans(shard)[1].take(piece[some_here])
            at = some_here.stop
        ends, begin = np.full(upto[-1], self.length), np.concatenate([local for _, local in parts]) * self.length
        ends[(upto - counts - 1)[order][row] + within] = last - begin[row]
        return counts, ends

    def _pieces(self, shard: int, local: Array) -> tuple[Array, Array]:
        """Of rows (n,) of a shard: the first piece (n,), and the first after the row's (n,)."""
        s = self.shards[shard]
        if len(s.crc) == 2:
            first, last = np.searchsorted(self.spans(shard)[0], np.stack([local, local + 1]) * self.length)
            return first, last
        table = self.first_pieces(shard)
        first, last = table.take(local), table.take(local + 1)
        require(last.max() <= s.pieces, f"{self._files(s)[2]}: pieces that are not there: the shard was damaged")
        return first, last

    def verify(self) -> Iterator[Shard]:
        """Read every shard and compare its CRC-32s; yields each as it is found whole. SpecError for the first that is not."""
        for s in self.shards:
            for path, expected in zip(self._files(s), s.crc, strict=True):
                with path.open("rb") as f:
                    found = 0
                    while chunk := f.read(1 << 24):
                        found = zlib.crc32(chunk, found)
                require(
                    found == expected, f"{path}: CRC-32 {found:08x}; the index has {expected:08x}: the file was damaged"
                )
            yield s

    def placed(self, which: Array) -> Placed:
        """Where rows (B,) of all shards together lie. SpecError for one that there is not."""
        order = which.argsort()
        rows = which[order]
        if len(rows) and not (rows[0] >= 0 and rows[-1] < len(self)):
            raise SpecError(f"rows {which.tolist()[:3]}...; the shards have {len(self)}")
        cuts = np.searchsorted(rows, self.first)
        some = np.diff(cuts).nonzero()[0].tolist()
        return Placed(order, [(shard, rows[cuts[shard] : cuts[shard + 1]] - self.first[shard]) for shard in some])

    def _files(self, s: Shard) -> list[Path]:
        return [self.folder / f"{s.name}.{kind}" for kind, _ in zip(("tokens", "spans", "first"), s.crc, strict=False)]

    def _check_size(self, s: Shard) -> None:
        sizes = s.rows * self.length * self.dtype.itemsize, s.pieces * 16, (s.rows + 1) * 8
        for path, size in zip(self._files(s), sizes, strict=False):
            found = path.stat().st_size if path.exists() else None
            text = "is missing" if found is None else f"has {found} bytes; the index says {size}"
            require(found == size, f"{path} {text}: " + ("shard truncated?" if found is not None else "shard lost?"))


def index_of(facts: Mapping[str, Any], shards: list[dict[str, Any]]) -> bytes:
    """The text of index.json."""
    body = json.dumps({"schema": SCHEMA, **facts, "shards": shards}, ensure_ascii=False, indent=1)
    return (body + "\n").encode()
