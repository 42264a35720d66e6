"""Shards: packed rows of tokens on disk, opened by memory mapping (R 4.1).

A folder holds, for every shard NAME,

NAME.tokens   (rows, S) uint16 or uint32, little-endian: the rows, one after the other
NAME.spans    (2, pieces) int64: the first and the last + 1 token of each piece of a document, ascending, counted over all rows;
              none goes over the end of a row; what lies in none is padding

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
from typing import Any

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
    crc: tuple[int, int]


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
        rows = [[s.name, s.rows, s.pieces, *s.crc] for s in self.shards]
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

    def _mapped(self, shard: int, file: int) -> Array:
        if (shard, file) in self._maps:
            self._maps.move_to_end((shard, file))
            return self._maps[shard, file]
        s = self.shards[shard]
        dtype, shape = ((self.dtype.newbyteorder("<"), (s.rows, self.length)), (np.dtype("<i8"), (2, s.pieces)))[file]
        found = np.asarray(  # a plain array: slicing a memmap costs several times as much
            np.memmap(self._files(s)[file], dtype, "r", shape=shape)
        )
        self._maps[shard, file] = found
        if len(self._maps) > OPEN:
            self._maps.popitem(last=False)
        return found

    def rows(self, which: Array, out: Array | None = None) -> Array:
        """Rows (B,) of all shards together -> tokens (B, S), int64; into `out`, if given."""
        out = np.empty((len(which), self.length), np.int64) if out is None else out
        for shard, places, local in self._by_shard(which):
            out[places] = self.tokens(shard)[local]
        return out

    def ends(self, which: Array) -> tuple[Array, Array]:
        """How many pieces each of the rows (B,) has, and where in its row each piece ends, then the row itself (at S): (P + B,),
        row after row. The pieces of a row follow one another from its beginning; the rest of it is padding.
        """
        parts = list(self._by_shard(which))
        found = [np.searchsorted(self.spans(n)[0], np.stack([at, at + 1]) * self.length) for n, _, at in parts]
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        places, local = (np.concatenate(a) for a in list(zip(*parts, strict=True))[1:])
        first, last = np.concatenate(found, axis=1)
        some, counts = last - first, np.empty(len(which), np.int64)
        counts[places] = some
        upto = np.cumsum(counts + 1)
        ends, read = np.full(upto[-1], self.length), _runs(first, some)
        each, at = [int((b - a).sum()) for a, b in found], 0
        for (n, _, _), size in zip(parts, each, strict=True):
            read[at : at + size] = self.spans(n)[1][read[at : at + size]]
            at += size
        ends[_runs((upto - counts - 1)[places], some)] = read - np.repeat(local * self.length, some)
        return counts, ends

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

    def _by_shard(self, which: Array) -> Iterator[tuple[int, Array, Array]]:
        """(shard, places in `which` (n,), rows of the shard (n,)) for every shard that has some."""
        if len(which) and not (which.min() >= 0 and which.max() < len(self)):
            raise SpecError(f"rows {which.tolist()[:3]}...; the shards have {len(self)}")
        owner = np.searchsorted(self.first, which, side="right") - 1
        for shard in np.bincount(owner).nonzero()[0].tolist():
            places = (owner == shard).nonzero()[0]
            places = places[which[places].argsort()]  # ascending: what is near on the disk is read together
            yield shard, places, which[places] - self.first[shard]

    def _files(self, s: Shard) -> tuple[Path, Path]:
        return self.folder / f"{s.name}.tokens", self.folder / f"{s.name}.spans"

    def _check_size(self, s: Shard) -> None:
        for path, size in zip(self._files(s), (s.rows * self.length * self.dtype.itemsize, s.pieces * 16), strict=True):
            found = path.stat().st_size if path.exists() else None
            text = "is missing" if found is None else f"has {found} bytes; the index says {size}"
            require(found == size, f"{path} {text}: " + ("shard truncated?" if found is not None else "shard lost?"))


def _runs(starts: Array, counts: Array) -> Array:
    """start, start + 1, ..., `count` numbers from each start on.  starts (N,), counts (N,) -> (sum of counts,)."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def index_of(facts: Mapping[str, Any], shards: list[dict[str, Any]]) -> bytes:
    """The text of index.json."""
    body = json.dumps({"schema": SCHEMA, **facts, "shards": shards}, ensure_ascii=False, indent=1)
    return (body + "\n").encode()
