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
        self.padded = any(s.tokens != s.rows * self.length for s in self.shards)
        for s in self.shards:
            self._check_size(s)
        self._maps: OrderedDict[Path, Array] = OrderedDict()

    def __len__(self) -> int:
        return int(self.first[-1])

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
        s = self.shards[shard]
        return self._mapped(self._files(s)[0], self.dtype.newbyteorder("<"), (s.rows, self.length))

    def spans(self, shard: int) -> Array:
        """First and last + 1 of each piece of a shard (2, pieces), mapped."""
        s = self.shards[shard]
        return self._mapped(self._files(s)[1], np.dtype("<i8"), (2, s.pieces))

    def _mapped(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, int]) -> Array:
        if path in self._maps:
            self._maps.move_to_end(path)
            return self._maps[path]
        found = np.asarray(
            np.memmap(path, dtype, "r", shape=shape)
        )  # a plain array: slicing a memmap costs several times as much
        self._maps[path] = found
        if len(self._maps) > OPEN:
            self._maps.popitem(last=False)
        return found

    def rows(self, which: Array, out: Array | None = None) -> Array:
        """Rows (B,) of all shards together -> tokens (B, S), int64; into `out`, if given."""
        out = np.empty((len(which), self.length), np.int64) if out is None else out
        for shard, places, local in self._by_shard(which):
            out[places] = self.tokens(shard)[local]
        return out

    def pieces(self, which: Array) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """(place in `which`, first and last + 1 of its pieces) of rows (B,), counted from the row's first token. The pieces of a
        row follow one another from its beginning; the rest of it is padding.
        """
        for shard, places, local in self._by_shard(which):
            spans = self.spans(shard)
            begins = local * self.length
            bounds = [np.searchsorted(spans[0], at).tolist() for at in (begins, begins + self.length)]
            for place, begin, a, b in zip(places.tolist(), begins.tolist(), *bounds, strict=True):
                first, last = (spans[:, a:b] - begin).tolist()
                yield place, list(zip(first, last, strict=True))

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
        inside = bool(len(which) == 0 or (which.min() >= 0 and which.max() < len(self)))
        require(inside, f"rows {which.tolist()[:3]}...; the shards have {len(self)}")
        owner = np.searchsorted(self.first, which, side="right") - 1
        for shard in np.unique(owner).tolist():
            places = np.flatnonzero(owner == shard)
            yield shard, places, which[places] - self.first[shard]

    def _files(self, s: Shard) -> tuple[Path, Path]:
        return self.folder / f"{s.name}.tokens", self.folder / f"{s.name}.spans"

    def _check_size(self, s: Shard) -> None:
        for path, size in zip(self._files(s), (s.rows * self.length * self.dtype.itemsize, s.pieces * 16), strict=True):
            found = path.stat().st_size if path.exists() else None
            text = "is missing" if found is None else f"has {found} bytes; the index says {size}"
            require(found == size, f"{path} {text}: " + ("shard truncated?" if found is not None else "shard lost?"))


def index_of(facts: Mapping[str, Any], shards: list[dict[str, Any]]) -> bytes:
    """The text of index.json."""
    body = json.dumps({"schema": SCHEMA, **facts, "shards": shards}, ensure_ascii=False, indent=1)
    return (body + "\n").encode()
