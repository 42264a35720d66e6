"""Parts of tensors: what one rank holds of the optimiser, and how any other division is made of them again.

ZeRO-1 cuts the flat weights of a rank into equal runs of elements, tensor parallelism cuts a matrix into boxes of rows or
columns. So a rank holds elements begin to end, in row-major order, of a box of a tensor: a `Piece`. Pieces of all ranks
tile the tensor, whatever the mesh was, and that is all a reader needs to know of it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd import Array, require

Shape = tuple[int, ...]
BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Place:
    """Where a piece lies: elements begin to end of the box that starts at `start`, in a tensor of `shape`."""

    shape: Shape
    start: Shape
    box: Shape
    begin: int
    end: int

    @classmethod
    def whole(cls, shape: Shape) -> Place:
        """All of a tensor."""
        return cls(shape, (0,) * len(shape), shape, 0, math.prod(shape))

    def to_json(self) -> list[Any]:
        """What a manifest says of it."""
        return [list(self.shape), list(self.start), list(self.box), self.begin, self.end]

    @classmethod
    def from_json(cls, found: Any) -> Place:
        """The inverse of to_json. SpecError for anything that no writer of ours has written."""
        ok = isinstance(found, list) and len(found) == 5 and all(isinstance(x, list) for x in found[:3])
        ok = ok and all(type(n) is int and n >= 0 for n in (*found[0], *found[1], *found[2], *found[3:]))
        require(ok, f"a piece lies at {found!r:.80}; expected shape, start, box, begin, end")
        shape, start, box = (tuple(x) for x in found[:3])
        inside = len(shape) == len(start) == len(box) and all(
            a + n <= total for a, n, total in zip(start, box, shape, strict=True)
        )
        require(inside and found[3] <= found[4] <= math.prod(box), f"a piece at {found} lies outside its tensor")
        return cls(shape, start, box, found[3], found[4])


@dataclass(frozen=True)
class Piece:
    """Where, and what: `data` holds place.end - place.begin elements."""

    place: Place
    data: Array

    @classmethod
    def whole(cls, x: Array) -> Piece:
        """All of a tensor."""
        return cls(Place.whole(tuple(x.shape)), x)

    def copied(self) -> Piece:
        """The same on memory of its own."""
        return replace(self, data=np.array(self.data, order="C"))


def is_narrow(x: Array) -> bool:
    """Whether x holds float32 numbers that are all bfloat16 ones: the lower halves of their bits are 0.

    R 3.3.3 keeps both moments in bfloat16; here they travel as float32 arrays of such numbers.
    """
    if x.dtype != np.float32 or not x.flags.c_contiguous:
        return False
    bits, lower = x.reshape(-1).view(np.uint32), 0xFFFF
    return not np.bitwise_or.reduce(bits[:64]) & lower and not np.bitwise_or.reduce(bits) & lower


def narrowed(x: Array) -> Array:
    """Such numbers in half the bytes, bit for bit."""
    assert sys.byteorder == "little"  # the upper half comes second
    return np.ascontiguousarray(x.reshape(-1).view(np.uint16)[1::2]).view(BF16).reshape(x.shape)


def widened(x: Array, dtype: np.dtype[Any]) -> Array:
    """The inverse of `narrowed`, bit for bit."""
    if x.dtype == dtype or x.dtype != BF16:
        return x
    wide: Array = (x.reshape(-1).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(x.shape)
    return wide


def assembled(pieces: Sequence[Piece]) -> Array:
    """The tensor whose pieces these are. SpecError unless they tile it: every element once."""
    shape, dtype = pieces[0].place.shape, pieces[0].data.dtype
    alike = all(p.place.shape == shape and p.data.dtype == dtype for p in pieces)
    require(
        alike,
        f"its pieces disagree about shape or dtype: {sorted({(p.place.shape, str(p.data.dtype)) for p in pieces})}",
    )
    if pieces[0].place == Place.whole(shape):
        require(len(pieces) == 1, "it is held twice")
        return pieces[0].data.reshape(shape)
    out = np.empty(shape, dtype)
    boxes: dict[tuple[Shape, Shape], list[Piece]] = {}
    for p in pieces:
        boxes.setdefault((p.place.start, p.place.box), []).append(p)
    _check_boxes(shape, list(boxes))
    for (start, box), parts in boxes.items():
        out[tuple([slice(a, a + n) for a, n in zip(start, box, strict=True)])] = _run(parts).reshape(box)
    return out


def _run(parts: Sequence[Piece]) -> Array:
    """The elements of one box, whose pieces follow each other from 0 to its end."""
    parts, at = sorted(parts, key=lambda p: (p.place.begin, p.place.end)), 0
    for p in parts:
        flaw = "missing" if p.place.begin > at else "held twice"
        require(p.place.begin == at, f"elements {min(at, p.place.begin)} to {max(at, p.place.begin)} are {flaw}")
        at = p.place.end
    size = math.prod(parts[0].place.box)
    require(at == size, f"elements {at} to {size} are missing")
    return np.concatenate([p.data.reshape(-1) for p in parts])


def _check_boxes(shape: Shape, boxes: Sequence[tuple[Shape, Shape]]) -> None:
    """Boxes that do not overlap and whose sizes add up to the whole tile it."""
    for i, (a, n) in enumerate(boxes):
        for b, m in boxes[:i]:
            apart = any(p + k <= q or q + j <= p for p, k, q, j in zip(a, n, b, m, strict=True))
            require(apart, f"boxes at {a} and {b} overlap")
    held, size = sum([math.prod(n) for _, n in boxes]), math.prod(shape)
    require(held == size, f"its boxes hold {held} of {size} elements")
