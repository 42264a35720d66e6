"""Attention's square arrays, queries by keys of every head, made a block of queries at a time where they are read, and never whole.

Keys that no query of a block sees are left out of it: behind the last one that is seen, scores are -inf and probabilities 0. That
is half of all the work of a causal model, and what is left of a block stays in a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array

MASKED = -9e3
"""An additive mask may hold any number that no score comes near instead of -inf: float16's lowest, -1e4, -1e9."""
LEAST = 1 << 19
"""Numbers of an array below which it is made whole."""
BLOCK = 1 << 18
"""Numbers that a block may hold."""


def with_infinity(mask: Array) -> Array:
    """An additive mask with -inf where it masks."""
    return np.where(mask.astype(np.float32) < MASKED, np.asarray(-np.inf, mask.dtype), mask)


@dataclass(frozen=True)
class Place:
    """Where a block of a wide array (`wide`) lies: rows start to stop of one sequence, in all heads."""

    shape: tuple[int, ...]  # of the whole array (B, H, S, T)
    sequence: int
    start: int
    stop: int

    @property
    def index(self) -> tuple[slice, ...]:
        """Of the whole array."""
        return slice(self.sequence, self.sequence + 1), slice(None), slice(self.start, self.stop)


@dataclass(frozen=True)
class Form:
    """How a stage is taken apart: which of its arguments have a row for every query, which for every key (both (B, rows, ...)),
    which is wide itself; with what that one, and the output, are filled where no key is seen, None if the output is not wide.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    wide: int
    fill: float
    gives: float | None


_SCORES = Form(queries=(0, 1), keys=(2, 3), wide=4, fill=-np.inf, gives=-np.inf)
_CTX = Form(queries=(), keys=(1,), wide=0, fill=0.0, gives=None)
FORMS = {
    "mla.scores": _SCORES,
    "mla.scores_absorbed": _SCORES,
    "mla.probs": Form(queries=(), keys=(), wide=0, fill=-np.inf, gives=0.0),
    "mla.ctx": _CTX,
    "mla.ctx_latent": _CTX,
}
"""Stages whose rows, one a query, do not know of each other."""


@dataclass
class Wide:
    """An array (B, H, S, T) of which `make(place)` gives a block (1, H, rows, t), t up to T; behind that, all is `fill`. The block
    that was made last is kept, and all of them if they are parts (`views`) of an array that is there anyhow.
    """

    shape: tuple[int, ...]
    dtype: Any
    fill: float
    make: Callable[[Place], Array]
    views: bool = False
    _blocks: dict[Place, Array] = field(default_factory=dict)

    def block(self, place: Place) -> Array:
        """The block at a place."""
        if place not in self._blocks:
            if not self.views:
                self._blocks.clear()  # first, so that the next one may take its memory
            self._blocks[place] = self.make(place)
        return self._blocks[place]

    def take(self, place: Place) -> Array:
        """The block at a place, for one who may write to it."""
        found = self.block(place)
        del self._blocks[place]
        return found

    def each(self, fn: Callable[[Array, Place], Array]) -> Wide:
        """The array with every block changed, which is then the only one that has it."""
        return Wide(self.shape, self.dtype, self.fill, lambda place: fn(self.take(place), place))

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = np.full(self.shape, self.fill, dtype or self.dtype)
        for place in places(self.shape):
            block = self.block(place)
            whole[place.index][..., : block.shape[-1]] = block
        return whole


def is_large(shape: tuple[int, ...]) -> bool:
    """Whether an array is worth being taken apart."""
    return len(shape) == 4 and math.prod(shape) >= LEAST


def places(shape: tuple[int, ...]) -> Iterator[Place]:
    """Where the blocks of an array (B, H, S, T) lie."""
    b, h, s, t = shape
    step = max(BLOCK // max(h * t, 1), 1)
    for i in range(b):
        yield from (Place(shape, i, a, min(a + step, s)) for a in range(0, s, step))


def seen(a: Array, fill: float) -> int:
    """How many of the keys, from the first on, hold all that is not `fill`.  a (1, H, rows, T)."""
    if a.dtype.itemsize < 4:
        a = a.astype(np.float32)  # exact, and quicker to look through
    last = _last(a[0, 0, -1] != fill)  # in a causal model the last query sees most
    return last if (a[..., last:] == fill).all() else _last((a != fill).any(axis=(0, 1, 2)))


def _last(here: Array) -> int:
    """Behind the last that is true, 1 if none is."""
    return len(here) - int(np.argmax(here[::-1])) if here.any() else 1


def filled(a: Array, n: int, fill: float) -> Array:
    """a (..., t) with keys up to n."""
    if a.shape[-1] == n:
        return a
    more: Array = np.full((*a.shape[:-1], n), fill, a.dtype)
    more[..., : a.shape[-1]] = a
    return more


def paired(x: Array | Wide, e: Array | Wide, some: int = 1) -> Iterator[tuple[Place | None, Array, Array]]:
    """What is to be compared of two arrays, with its place: of wide ones, a block at a time and what both leave out not at all, of
    every `some` blocks the last. A block of scores comes in two parts, of which the first, most of it, has nothing masked in a
    causal model.
    """
    if not isinstance(e, Wide):
        yield None, np.asarray(x), e
        return
    before = e.shape[-1] - e.shape[-2]
    for place in list(places(e.shape))[::-1][::some]:
        b = e.block(place)  # first: it says which of the other's keys are looked at
        a = x.block(place) if isinstance(x, Wide) else x[place.index]
        n, middle = max(a.shape[-1], b.shape[-1]), before + place.start
        a, b = filled(a, n, e.fill), filled(b, n, e.fill)
        for part in [slice(middle), slice(middle, None)] if e.fill and middle else [slice(None)]:
            yield place, a[..., part], b[..., part]


def looked_at(x: Array, like: Array | Wide, ends: dict[Place, int]) -> Array | Wide:
    """A recorded array as it is to be compared with one: without the keys that nobody sees if that one may leave them out. Where
    they hold nothing but what fills them, `ends` is told how many others there are.
    """
    if not isinstance(like, Wide):
        return x

    def view(place: Place) -> Array:
        whole, n = x[place.index], like.block(place).shape[-1]
        rest = whole[..., n:]
        if rest.dtype.itemsize < 4:
            rest = rest.astype(np.float32)  # exact, and quicker to look through
        top = rest.max(initial=like.fill)
        same = bool(top == like.fill and (top == -np.inf or rest.min(initial=like.fill) == like.fill))
        if same:
            ends[place] = n
        return whole[..., :n] if same or top < MASKED else whole

    return Wide(x.shape, x.dtype, like.fill, view, views=True)
