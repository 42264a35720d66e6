"""Where each canonical tensor lies: whole, in model-parallel parts, or in fused experts.

Everything here is decided from headers; no tensor is read.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.errors import SpecError, require

from .header import DTYPES
from .names import expert_of, from_deepseek, shard_axis
from .safetensors import Array, SafetensorsFile

_FUSED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?")


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a file, or the part of it that is meant: one expert's gate rows of a fused
    tensor.
    """

    file: SafetensorsFile
    key: str
    part: tuple[int, slice] | tuple[()] = ()

    def read(self) -> Array:
        """A view of the mapped file."""
        array = self.file[self.key]
        return array[self.part] if self.part else array

    def extent(self, start: int, stop: int) -> tuple[int, tuple[int, ...]]:
        """Where rows [start, stop) begin in the file, and their shape; one expert's rows of a fused tensor lie together, too."""
        info = self.file.header[self.key]
        shape, first = info.shape, start
        if self.part:
            expert, rows = self.part
            first += expert * shape[1] + rows.start
            shape = shape[1:]
        row = math.prod(shape[1:]) * DTYPES[info.dtype].itemsize
        return self.file.offset(self.key) + first * row, (stop - start, *shape[1:])


@dataclass(frozen=True, slots=True)
class Source:
    """A canonical tensor: pieces to join along `axis`, or (axis None) copies that must agree."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    axis: int | None = None

    @property
    def nbytes(self) -> int:
        """Size of the stored data in bytes, copies counted once."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> Array:
        """The tensor as stored, a view if it is one piece. SpecError where copies disagree."""
        arrays = [piece.read() for piece in self.pieces]
        if self.axis is not None and len(arrays) > 1:
            return np.concatenate(arrays, axis=self.axis)
        for piece, copy in zip(self.pieces[1:], arrays[1:], strict=True):
            if not same_bits(copy, arrays[0]):
                first, other = self.pieces[0].file.path.name, piece.file.path.name
                raise SpecError(f"{piece.key!r} differs between {first} and {other}; expected copies")
        return arrays[0]


def same_bits(a: Array, b: Array, chunk: int = 1 << 24) -> bool:
    """Whether two arrays hold the same bytes, compared a chunk at a time."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (np.ascontiguousarray(v).reshape(-1).view(np.uint8) for v in (a, b))
    return all(np.array_equal(x[i : i + chunk], y[i : i + chunk]) for i in range(0, x.size, chunk))


def hf_sources(files: Iterable[SafetensorsFile]) -> Iterator[tuple[str, Source]]:
    """Canonical names, each once; fused experts come apart into views."""
    owner: dict[str, Source] = {}
    for f in files:
        for key, info in f.header.items():
            for name, source in _unfuse(f, key) or [(key, Source(info.dtype, info.shape, (Piece(f, key),)))]:
                first = owner.setdefault(name, source).pieces[0]
                if first is not source.pieces[0]:
                    there = f"{first.key} of {first.file.path.name}"
                    raise SpecError(f"tensor {name!r} is found twice: {there} and {key} of {f.path.name}")
                yield name, source


def _unfuse(f: SafetensorsFile, key: str) -> list[tuple[str, Source]]:
    """transformers 5's experts.gate_up_proj (E, 2F, D), gate rows first, and experts.down_proj (E,
    D, F).
    """
    found = _FUSED.fullmatch(key)
    if not found:
        return []
    outer, kind, scale = found[1], found[2], found[3] or ""
    info = f.header[key]
    split = kind == "gate_up_proj"
    ok = len(info.shape) == 3 and not (split and info.shape[1] % 2)
    require(
        ok,
        f"{key} of {f.path} has shape {info.shape}; expected (E, {'2F, D' if split else 'D, F'})",
    )
    experts, rows, cols = info.shape
    half = rows // 2
    parts = {"gate_proj": slice(0, half), "up_proj": slice(half, rows)} if split else {"down_proj": slice(0, rows)}
    return [
        (
            f"{outer}.{e}.{proj}.weight{scale}",
            Source(info.dtype, (r.stop - r.start, cols), (Piece(f, key, (e, r)),)),
        )
        for e in range(experts)
        for proj, r in parts.items()
    ]


def deepseek_sources(files: list[SafetensorsFile]) -> Iterator[tuple[str, Source]]:
    """convert.py's names and cuts, undone: joined along the cut axis, experts from their rank,
    copies kept.
    """
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for f in files:
        for key in f:
            pieces[from_deepseek(key)].append(Piece(f, key))
    _check_experts(pieces, files)
    for name, held in pieces.items():
        if expert_of(name) is None and len(held) != len(files):
            ranks = ", ".join(p.file.path.name for p in held)
            raise SpecError(f"{held[0].key!r} is only in {ranks}; expected in all {len(files)} parts")
        yield name, _join(name, held)


def _check_experts(pieces: dict[str, list[Piece]], files: list[SafetensorsFile]) -> None:
    """Rank r of W holds experts r E/W .. (r+1) E/W - 1 whole (convert.py)."""
    count = 1 + max((e for name in pieces if (e := expert_of(name)) is not None), default=0)
    rank = {f.path: r for r, f in enumerate(files)}
    for name, held in pieces.items():
        e = expert_of(name)
        if e is not None:
            expected, found = e * len(files) // count, [rank[p.file.path] for p in held]
            ok = found == [expected]
            require(
                ok,
                f"{held[0].key!r} is in parts {found}; expected expert {e} in part {expected}",
            )


def _join(name: str, held: list[Piece]) -> Source:
    infos = [p.file.header[p.key] for p in held]
    first, axis = infos[0], shard_axis(name) if expert_of(name) is None else None
    same = {(t.dtype, t.shape) for t in infos}
    require(len(same) == 1, f"{held[0].key!r} differs between the parts: {sorted(same)}")
    if axis is None or len(held) == 1:
        return Source(first.dtype, first.shape, tuple(held))
    require(
        axis < len(first.shape),
        f"{held[0].key!r} has shape {first.shape}; it is cut along axis {axis}",
    )
    shape = tuple(n * len(held) if i == axis else n for i, n in enumerate(first.shape))
    return Source(first.dtype, shape, tuple(held), axis)
