"""A snapshot: all that a run needs to go on as if it had never stopped, as one rank holds it; and reading it back."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd import Array, require, where
from refimpl.checkpoint import SafetensorsFile, open_file
from refimpl.checkpoint.header import NAMES
from refimpl.checkpoint.safetensors import Pending, write_tensors

from .disk import File, Summed, helpers
from .manifest import Entry, Manifest, Shard, canonical, read_manifest
from .pieces import Piece, assembled, is_narrow, narrowed, widened


@dataclass(frozen=True)
class Snapshot:
    """Steps taken; my pieces by "kind/name" ("master/lm_head.weight", "adam.m/...", "ema/..."); facts as JSON.

    Facts are those of the run, the same on every rank: config, cursor of the data, random states, counters.
    """

    step: int
    pieces: Mapping[str, Piece]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.step >= 0, f"step {self.step} of a run; it must not be negative")
        canonical(dict(self.facts))

    def copied(self) -> Snapshot:
        """The same on memory of its own: what happens to the arrays from now on does not reach it."""
        return replace(self, pieces={name: p.copied() for name, p in self.pieces.items()})


def file_name(rank: int, size: int) -> str:
    """The name of a rank's shard."""
    return f"rank-{rank:05}-of-{size:05}.safetensors"


def write_shard(f: File, snapshot: Snapshot, summing: Executor) -> Callable[[], Shard]:
    """A rank's pieces as a safetensors file -> what the manifest says of it, when all sums are done.

    They are made in the threads of `summing`, so the last ones while the file is synced.
    """
    summed = Summed(f, summing)
    with helpers() as narrowing:  # apart: what is summed later must not hold up what is written next
        order = write_tensors(summed, _stored(snapshot, narrowing))

    def described() -> Shard:
        head, *sums = summed.sums
        found = {name: snapshot.pieces[name] for name in order}
        crcs = zip(sums, found.items(), strict=True)
        return Shard(summed.nbytes, head, {name: Entry(crc, NAMES[p.data.dtype], p.place) for crc, (name, p) in crcs})

    return described


def _stored(snapshot: Snapshot, threads: Executor) -> dict[str, Array | Pending]:
    """As a file holds it: bfloat16 numbers in two bytes, made in other threads shortly before it is their turn."""
    held: dict[str, Array | Pending] = {name: p.data for name, p in snapshot.pieces.items()}
    narrow = sorted([name for name, p in snapshot.pieces.items() if is_narrow(p.data)])  # in the order of the file
    jobs: dict[str, Future[Array]] = {}
    todo = iter(narrow)

    def make(name: str) -> Array:
        for ahead in itertools.islice(todo, 3 - len(jobs)):
            jobs[ahead] = threads.submit(narrowed, snapshot.pieces[ahead].data)
        return jobs.pop(name).result()

    return held | {n: Pending("BF16", snapshot.pieces[n].data.shape, partial(make, n)) for n in narrow}


class Saved:
    """A checkpoint on disk: `step`, `facts`, and the whole tensors of a kind, whatever the ranks were that wrote them."""

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        """Open a checkpoint; `verify` reads every byte once. SpecError for a flaw: which file, which tensor, what."""
        self.folder = folder
        with where(f"while opening the checkpoint {folder}"):
            self._manifest: Manifest = read_manifest(folder)
            self.step, self.facts = self._manifest.step, self._manifest.facts
            self._files = {file: self._open(file, shard) for file, shard in self._manifest.shards.items()}
            self._held: dict[str, list[str]] = {}
            for file, shard in self._manifest.shards.items():
                for name in shard.pieces:
                    self._held.setdefault(name, []).append(file)
            if verify:
                for file, shard in self._manifest.shards.items():
                    _verify(self._files[file], shard)

    def _open(self, file: str, shard: Shard) -> SafetensorsFile:
        path = self.folder / file
        require(path.is_file(), f"the shard {file} is missing, one of {len(self._manifest.shards)}")
        size = path.stat().st_size
        require(size == shard.nbytes, f"the shard {file} has {size} bytes; expected {shard.nbytes}: truncated?")
        f = open_file(path)
        require(set(f) == set(shard.pieces), f"the shard {file} holds other tensors than the manifest says")
        return f

    def kinds(self) -> list[str]:
        """The kinds of tensors it holds: master, adam.m, adam.v, ema."""
        return sorted({name.partition("/")[0] for name in self._held})

    def tensors(self, kind: str) -> Mapping[str, Array]:
        """Name -> whole tensor of a kind, put together when asked for; empty if the checkpoint has none."""
        names = [name.removeprefix(f"{kind}/") for name in self._held if name.startswith(f"{kind}/")]
        return _Tensors(self, kind, names)

    def whole(self, name: str) -> Array:
        """One tensor by "kind/name". SpecError unless its pieces tile it."""
        with where(f"while putting {name} together from {self.folder}"):
            return assembled([self._piece(file, name) for file in self._held[name]])

    def _piece(self, file: str, name: str) -> Piece:
        entry = self._manifest.shards[file].pieces[name]
        dtype = next((d for d, text in NAMES.items() if text == entry.dtype), None)
        require(dtype is not None, f"dtype {entry.dtype!r}")
        assert dtype is not None
        data = widened(self._files[file][name], np.dtype(dtype))
        size = entry.place.end - entry.place.begin
        require(data.dtype == dtype and data.size == size, f"{data.dtype} x {data.size}; expected {dtype} x {size}")
        return Piece(entry.place, data)


class _Tensors(Mapping[str, Array]):
    """A kind's tensors by name."""

    def __init__(self, saved: Saved, kind: str, names: list[str]) -> None:
        self._saved, self._kind, self._names = saved, kind, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        return self._saved.whole(f"{self._kind}/{name}")

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _verify(file: SafetensorsFile, shard: Shard) -> None:
    """SpecError unless every byte is the one that was written."""
    require(zlib.crc32(file.head) == shard.head, f"the header of {file.path.name} is damaged: its checksum differs")
    for name, entry in shard.pieces.items():
        crc = zlib.crc32(np.ascontiguousarray(file[name]).reshape(-1).view(np.uint8).data)
        require(crc == entry.checksum, f"{name} in {file.path.name} is damaged: its checksum differs")
