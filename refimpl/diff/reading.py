"""Bringing a recorded tap into our axes: what people record is often the right numbers in another arrangement.

Each arrangement is recognised by its shape (`ways`) and said in a line that names what to declare. What shapes leave open is
settled by value: all taps together (`nearest`), or tap by tap (`gauges`: heads before tokens where there are as many of both).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array

from .dims import TOKEN_AXES
from .marks import marks_of
from .ways import Pick as Pick
from .ways import Way, ways


def cut(a: Array, pick: Pick) -> Array:
    """The picked part of an array."""
    for axis, entries in pick.items():
        a = a[(slice(None),) * axis + (entries,)]
    return a


def entries(shape: Sequence[int], pick: Pick) -> list[Array]:
    """Which entries of every axis of a tap of this shape were picked."""
    return [np.arange(n)[pick.get(axis, slice(None))] for axis, n in enumerate(shape)]


LOOK, _FEW = 1 << 14, 1 << 9
"""Numbers that are looked at at a time."""


@dataclass(frozen=True)
class Reading:
    """A tap in our axes, or a part of it: `pick` says, axis by axis, which entries the candidate recorded; `note` says what was
    done, "" if nothing.
    """

    array: Array
    note: str = ""
    pick: Pick = field(default_factory=dict)


def read(
    x: Array,
    shape: tuple[int, ...],
    axes: list[str],
    dims: str | None = None,
    part: Mapping[str, list[int]] | None = None,
) -> Reading | None:
    """x in the shape that our axes have, by the first arrangement that fits; None if none does. `dims` is the candidate's own
    word on its axes: letters as in ours, "N" for B S flattened; `part` which entries of an axis it says it recorded, of taps that
    are not there whole.
    """
    for pick, few in _declared_parts(x, shape, axes, part or {}):
        told = read(x, few, axes, dims)
        if told is not None and not told.pick:
            return Reading(told.array, told.note, pick)
    if dims is not None and (told := _declared(x, shape, axes, dims)) is not None:
        return told
    if x.shape == shape:
        return Reading(x)
    if dims is not None and (
        agree := [w for w in _as_declared(ways(x.shape, shape, axes), axes, dims) if not w.guessed]
    ):
        return read_so(x, agree[0])
    return next(readings(x, shape, axes), None)


def _declared_parts(
    x: Array, shape: tuple[int, ...], axes: list[str], part: Mapping[str, list[int]]
) -> Iterator[tuple[dict[int, list[int]], tuple[int, ...]]]:
    """What x may be a part of by what was declared, along all of these axes or some, and the shape it then has; where the number of
    its entries tells, that alone.
    """
    here = {axes.index(a): entries for a, entries in part.items() if a in axes}
    picks = [dict(some) for n in range(len(here), -1, -1) for some in combinations(here.items(), n)]
    shapes = [tuple([len(p[i]) if i in p else n for i, n in enumerate(shape)]) for p in picks]
    exact = [x.size == math.prod(few) for few in shapes]
    for pick, few, fits in zip(picks, shapes, exact, strict=True):
        if pick and (fits or not any(exact)):
            yield pick, few


def _declared(x: Array, shape: tuple[int, ...], axes: list[str], dims: str) -> Reading | None:
    """x by the letters that its producer gives: they are split where they stand for two of ours, and put in our order."""
    theirs = unflattened(marks_of(dims).dims.split(), axes)
    if sorted(theirs) != sorted(axes) or len(set(axes)) != len(axes):
        return None
    size = dict(zip(axes, shape, strict=True))
    full = tuple([size[a] for a in theirs])
    if not coarser(x.shape, full):
        return None
    return Reading(x.reshape(full).transpose([theirs.index(a) for a in axes]))


def unflattened(terms: list[str], axes: list[str]) -> list[str]:
    """Declared axes with the sequences and tokens that N stands for among these axes."""
    flat = next((axes[i : i + 2] for i, a in enumerate(axes[:-1]) if a == "B" and axes[i + 1] in TOKEN_AXES), ["N"])
    return [a for t in terms for a in (flat if t == "N" and "N" not in axes else [t])]


def readings(x: Array, shape: tuple[int, ...], axes: list[str], *, guess: bool = False) -> Iterator[Reading]:
    """x in our axes, in every way that its shape allows, the likeliest first, if wanted those that only values could confirm."""
    yield from (read_so(x, way) for way in ways(x.shape, shape, axes) if guess or not way.guessed)
    if len(shape) > 1 and axes[1] in ("S", "T"):
        yield from _chunks(x, shape)


def read_so(x: Array, way: Way) -> Reading:
    """x as it lies by one way."""
    return Reading(way.of(x), way.note, way.pick)


def open_ways(
    x: Array,
    shape: tuple[int, ...],
    axes: list[str],
    dims: str | None = None,
    part: Mapping[str, list[int]] | None = None,
) -> list[Way]:
    """In which ways x may lie, if its shape and what was declared do not tell, or what they tell is a guess."""
    for pick, few in _declared_parts(x, shape, axes, part or {}):
        if x.shape == few or (dims is not None and _declared(x, few, axes, dims) is not None):
            return []
        found = [replace(w, part=pick) for w in _as_declared(ways(x.shape, few, axes), axes, dims)]
        if found := [w for w in found if not set(w.changed) & set(pick)]:
            return found if len(found) > 1 or found[0].guessed or found[0].changed else []
    if x.shape == shape or (dims is not None and _declared(x, shape, axes, dims) is not None):
        return []
    found = _as_declared(ways(x.shape, shape, axes), axes, dims)
    return found if len(found) > 1 or (found and found[0].guessed) else []


def _as_declared(found: list[Way], axes: list[str], dims: str | None) -> list[Way]:
    """Those ways that agree with the order that is declared, if there are any."""
    theirs = unflattened(marks_of(dims).dims.split(), axes) if dims is not None else []
    if sorted(theirs) != sorted(axes) or len(set(axes)) != len(axes):
        return found
    meant = [theirs.index(a) for a in axes]
    agree = [w for w in found if not w.flat and [*sorted(w.long, key=lambda i: meant[i])] == w.long]
    return sorted([replace(w, declared=True) for w in agree], key=lambda w: w.steps) or found


def _chunks(x: Array, shape: tuple[int, ...]) -> Iterator[Reading]:
    """Positions in chunks, (B, n, c, ...) or stacked as (n, B, c, ...), the last of them filled up."""
    batch, length = shape[:2]
    if x.ndim < 3 or not coarser(x.shape[3:], shape[2:]):
        return
    for y in (x, x.swapaxes(0, 1)):
        n, c = y.shape[1:3]
        if y.shape[0] == batch and (n - 1) * c < length <= n * c:
            whole = y.reshape(batch, n * c, *y.shape[3:])[:, :length]
            yield Reading(whole.reshape(shape), f"positions are in {n} chunks of {c}: put together")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([n for n in shape if n != 1])


def coarser(given: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether `given` is `full` with neighbouring axes merged, axes of length 1 apart."""
    given, rest = _squeezed(given), list(_squeezed(full))
    for n in given:
        product = 1
        while rest and product < n:
            product *= rest.pop(0)
        if product != n:
            return False
    return not rest


def is_bfloat16(x: Array) -> bool:
    """Whether a float32 array holds bfloat16 values and enough of them for that to be no accident."""
    return "bfloat16" in narrow_formats(x)


def is_float16(x: Array) -> bool:
    """Whether a float32 array holds values that float16 has, and enough of them for that to be no accident."""
    return "float16" in narrow_formats(x)


def narrow_formats(x: Array) -> set[str]:
    """Which of bfloat16 and float16 have every value of a float32 array, which has more than 16 different ones: their low bits are
    zero. Where they are not, that is seen in the first numbers.
    """
    if x.dtype != np.float32:
        return set()
    words: Any = np.ascontiguousarray(x).reshape(-1).view(np.uint32)
    used = np.uint32(0)
    for at in range(0, len(words), LOOK):
        used |= np.bitwise_or.reduce(words[at : at + LOOK])
        if used & np.uint32(2**13 - 1):
            return set()
    if not _are_many(words):
        return set()
    small = bool((np.abs(x[np.isfinite(x)]) <= 65504).all())
    return ({"float16"} if small else set()) | ({"bfloat16"} if not used & np.uint32(2**16 - 1) else set())


def _are_many(words: Array) -> bool:
    """Whether there are more than 16 different ones."""
    if np.unique(words[:_FEW]).size > 16:
        return True
    for _ in range(16):
        words = words[words != words[:1]]
    return bool(words.size)
