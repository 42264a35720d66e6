"""Text to shards, so that an interrupted build goes on where it was and ends with the same bytes.

A shard is finished by itself: its documents are packed without those of other shards, and three files appear together, the last of
which says where its input ends. So a build loses at most the shard it was working on, however it ends.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import Transaction, json_object

from .altering import Altering, Splitter
from .documents import START, Place, documents, is_gzip
from .packing import PACKINGS, lay_out
from .shards import index_of
from .tokenizer import PAD, Tokenizer

BATCH = 64
"""Documents that the tokenizer gets at once."""


class Progress(NamedTuple):
    """After a shard: input bytes done and in all, documents, tokens (without padding), rows."""

    done: int
    total: int
    documents: int
    tokens: int
    rows: int


@dataclass(frozen=True)
class Build:
    """How shards are made; a build goes on only with the same settings and inputs."""

    length: int
    packing: str = "best-fit"
    altering: Altering = field(default_factory=Altering)
    seed: int = 0
    shard_tokens: int = 1 << 24
    split: str = "file"
    key: str = "text"

    def __post_init__(self) -> None:
        require(self.length >= 1, f"length is {self.length}; a row has at least one token")
        require(self.packing in PACKINGS, f"packing {self.packing!r}; known: {', '.join(PACKINGS)}")
        require(self.shard_tokens >= self.length, f"a shard of {self.shard_tokens} tokens has no row of {self.length}")
        a = self.altering
        require(0 <= a.fim <= 1 and 0 <= a.split <= 1, f"rates are in 0..1, not {a.fim:g} and {a.split:g}")
        require(a.most is None or a.most >= 1, f"at most {a.most} tokens of a document: at least 1")

    def facts(self, tokenizer: Tokenizer, files: Sequence[Path]) -> dict[str, Any]:
        """What goes into the index, and must be the same when a build goes on."""
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        named = {
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype,
            "pad": tokenizer.ids[PAD],
        }
        inputs = [{"name": f.name, "bytes": _size(f)} for f in files]
        return {**named, **asdict(self), "inputs": inputs}


def build(out: Path, files: Sequence[Path], tokenizer: Tokenizer, how: Build) -> Iterator[Progress]:
    """Shards of the documents in `files` into the folder `out`; yields after each, also after those that were there already.

    SpecError if `out` holds shards made in another way, or no document is found.
    """
    facts = how.facts(tokenizer, files)
    _begin(out, facts)
    records: list[dict[str, Any]] = []
    place, number, tokens, rows = START, 0, 0, 0
    before = np.cumsum([0, *[_uncompressed(f) for f in files]]).tolist()
    splitter = Splitter.of(tokenizer) if how.altering.split else Splitter({})
    while True:
        path = out / f"{len(records):06d}.shard.json"
        if path.exists():
            record = json_object(path)
        else:
            found, after, count = _gather(files, place, number, how, tokenizer, splitter)
            if not found:
                break
            record = _write(path, found, after, count, how, facts)
        place, number = Place(*record.pop("next")), record.pop("documents")
        records.append(record)
        tokens, rows = tokens + record["tokens"], rows + record["rows"]
        yield Progress(before[place.file] + place.offset, before[-1], number, tokens, rows)
    require(records, "no document in the input")
    with Transaction() as t, t.new(out / "index.json") as f:
        f.write(index_of(facts | {"documents": number}, records))


def _begin(out: Path, facts: dict[str, Any]) -> None:
    """Make the folder, or see that it is that of the same build; what a killed build left half-written goes."""
    started = out / "build.json"
    for left in out.glob(".build.json.*.tmp" if not started.exists() else ".*.tmp"):
        left.unlink()
    if started.exists():
        old = json_object(started)
        odd = [k for k in facts if json.loads(json.dumps(facts[k])) != old.get(k)]
        if odd:
            k = odd[0]
            raise SpecError(f"{out} holds shards made with {k} = {old.get(k)!r}, not {facts[k]!r}; give another folder")
    else:
        require(not out.exists() or not any(out.iterdir()), f"{out} is not empty, and holds no build of shards")
        out.mkdir(parents=True, exist_ok=True)
        with Transaction() as t, t.new(started) as f:
            f.write(json.dumps(facts, indent=1).encode())


def _gather(
    files: Sequence[Path], place: Place, number: int, how: Build, tokenizer: Tokenizer, splitter: Splitter
) -> tuple[list[Array], Place, int]:
    """Documents from `place` on, the first with this number, until they fill a shard -> their ids, what comes after."""
    found: list[Array] = []
    held = 0
    for texts, places in _batches(files, place, how):
        ids = how.altering(texts, number, how.seed, tokenizer, splitter)
        for one, after in zip(ids, places, strict=True):
            found.append(one)
            held, number, place = held + len(one), number + 1, after
            if held >= how.shard_tokens:
                return found, place, number
    return found, place, number


def _write(
    path: Path, found: list[Array], place: Place, number: int, how: Build, facts: dict[str, Any]
) -> dict[str, Any]:
    """Pack documents and write their shard, `path` last -> its record."""
    pieces = PACKINGS[how.packing]([len(ids) for ids in found], how.length)
    tokens, spans = lay_out(pieces, found, how.length, facts["pad"], facts["dtype"])
    first = np.searchsorted(spans[0], np.arange(len(tokens) + 1) * how.length)
    raw = [a.astype(a.dtype.newbyteorder("<")).tobytes() for a in (tokens, spans, first)]
    name = path.name.removesuffix(".shard.json")
    record: dict[str, Any] = {"name": name, "rows": len(tokens), "pieces": len(pieces), "tokens": sum(map(len, found))}
    record |= {"crc": [zlib.crc32(r) for r in raw], "next": list(place), "documents": number}
    with Transaction() as t:
        kinds = ("tokens", "spans", "first", "shard.json")
        for kind, data in zip(kinds, (*raw, json.dumps(record).encode()), strict=True):
            with t.new(path.with_name(f"{name}.{kind}")) as f:
                f.write(data)
    return record


def _batches(files: Sequence[Path], start: Place, how: Build) -> Iterator[tuple[list[str], list[Place]]]:
    texts: list[str] = []
    places: list[Place] = []
    for text, place in documents(files, start, split=how.split, key=how.key):
        texts.append(text)
        places.append(place)
        if len(texts) == BATCH or sum(map(len, texts)) > 1 << 22:
            yield texts, places
            texts, places = [], []
    if texts:
        yield texts, places


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error


def _uncompressed(path: Path) -> int:
    """Bytes of a file; of a compressed one what its last four bytes say, modulo 2^32: enough for a progress bar."""
    if not is_gzip(path) or _size(path) < 4:
        return _size(path)
    with path.open("rb") as f:
        f.seek(-4, 2)
        return int.from_bytes(f.read(4), "little")
