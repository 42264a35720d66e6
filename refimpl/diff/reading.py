"""Bringing a recorded tap into our axes: what people record is often the right numbers in another arrangement.

Each arrangement is recognised by its shape alone and said in a line that names what to declare. What shapes leave open (heads
before tokens where there are as many heads as tokens) is settled by value later, in `gauges`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array

from .dims import TOKEN_AXES
from .marks import marks_of

Pick = Mapping[int, slice | list[int]]
"""Axis -> which of its entries; axes that are whole are left out."""


def cut(a: Array, pick: Pick) -> Array:
    """The picked part of an array."""
    for axis, entries in pick.items():
        a = a[(slice(None),) * axis + (entries,)]
    return a


FILLED_UP = "tokens are flattened and padded"
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
    return next(_arrangements(x, shape, axes), None)


def _declared_parts(
    x: Array, shape: tuple[int, ...], axes: list[str], part: Mapping[str, list[int]]
) -> Iterator[tuple[Pick, tuple[int, ...]]]:
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


def _arrangements(x: Array, shape: tuple[int, ...], axes: list[str]) -> Iterator[Reading]:
    if coarser(x.shape, shape):
        yield Reading(x.reshape(shape), _merged(x.shape, shape, axes))
    for order in permutations(range(len(shape))):
        turned = tuple([shape[i] for i in order])
        if coarser(x.shape, turned):
            named = " ".join([axes[i] for i in order])
            yield Reading(x.reshape(turned).transpose(np.argsort(order)), f'axes are {named}: declare dims "{named}"')
    if len(shape) > 1 and "S" in axes[:2]:
        yield from _last(x, shape, axes)
    if {"S", "T"} & set(axes):
        yield from _padded(x, shape, axes)
    yield from _filled_up(x, shape, axes)
    if len(shape) > 1 and axes[1] in ("S", "T"):
        yield from _chunks(x, shape)
    if axes[:1] == ["B"]:
        yield from _first(x, shape, axes)


def _last(x: Array, shape: tuple[int, ...], axes: list[str]) -> Iterator[Reading]:
    """The last position only."""
    s = axes.index("S")
    last = tuple([1 if i == s else n for i, n in enumerate(shape)])
    if coarser(x.shape, last):
        yield Reading(x.reshape(last), "only the last position was recorded: compared there", {s: slice(-1, None)})


def _padded(x: Array, shape: tuple[int, ...], axes: list[str]) -> Iterator[Reading]:
    """More positions than there are, of every sequence, or more keys: whether these are seen shows in the others' probabilities."""
    if x.ndim == len(shape) and all(a >= b for a, b in zip(x.shape, shape, strict=True)):
        longer = {axes[i] for i in range(len(shape)) if x.shape[i] > shape[i]}
        if longer <= {"S", "T", "V"}:
            cut = x[tuple([slice(0, n) for n in shape])]
            yield Reading(cut, f"padded along {' and '.join(sorted(longer))}: cut to {'x'.join(map(str, shape))}")


def _filled_up(x: Array, shape: tuple[int, ...], axes: list[str]) -> Iterator[Reading]:
    """Flattened tokens with rows behind them, as many as make a multiple of something; other axes in any order."""
    at = next((i for i in range(len(axes) - 1) if axes[i] == "B" and axes[i + 1] in ("S", "T")), None)
    if at is None or not x.size:
        return
    tokens, rest = shape[at] * shape[at + 1], (*shape[:at], *shape[at + 2 :])
    rows = x.size // int(np.prod(rest))
    flat = (*shape[:at], rows, *shape[at + 2 :])
    for order in permutations(range(len(flat))) if rows > tokens else ():
        if coarser(x.shape, tuple([flat[i] for i in order])):
            y = x.reshape([flat[i] for i in order]).transpose(np.argsort(order))
            y = y[(slice(None),) * at + (slice(0, tokens),)]
            yield Reading(y.reshape(shape), f"{FILLED_UP} to {rows}: cut to the first {tokens}")


def _first(x: Array, shape: tuple[int, ...], axes: list[str]) -> Iterator[Reading]:
    """Fewer sequences or positions than there are: no one says which, and the first are the likeliest."""
    few = {i: n for i, n in enumerate(x.shape) if x.ndim == len(shape) and n != shape[i]}
    if few and all(axes[i] in ("B", "S", "T") and 0 < n < shape[i] for i, n in few.items()):
        what = {"B": "sequences"}
        told = " and ".join([f"{n} of {shape[i]} {what.get(axes[i], 'tokens')}" for i, n in few.items()])
        more = ": declare slices" if all(axes[i] != "B" for i in few) else ""  # which know of tokens
        note = f"{told}, taken for the first{more}"
        yield Reading(x, note, {i: slice(0, n) for i, n in few.items()})


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


def _merged(given: tuple[int, ...], full: tuple[int, ...], axes: list[str]) -> str:
    if _squeezed(given) == _squeezed(full):
        return ""
    if len(full) > 1 and axes[:2] == ["B", "S"] and given and given[0] == full[0] * full[1]:
        return "tokens are flattened to (N, ...): declare dims with N for B S"
    return f"axes are merged to {'x'.join(map(str, given))}, ours are {'x'.join(map(str, full))}"


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
