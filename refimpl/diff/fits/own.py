"""Numbers of every token's own, or of every number's: a gate that multiplies rows, dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import STAGES

from ..corpus import Mutant
from .evidence import Evidence, guess, near
from .sums import parts_of
from .words import rounded

WIDTH = 8
"""Channels that a row must have for one number of its own to say anything."""


def rows(ev: Evidence) -> Iterator[Mutant]:
    """The output, or one of the parts that it is the sum of, with every row multiplied by a number of its own."""
    if not ev.whole or not ev.everywhere or ev.letters[:2] != ["B", "S"] or ev.e.shape[-1] < WIDTH:
        return
    parts = parts_of(ev)
    if parts is None or len(parts.names) != len(ev.args):  # no sum of its arguments
        yield from _of_part(ev, ev.call.of.tap, ev.x, ev.e, lambda args, r, y: y * r)
        return
    for i, name in enumerate(parts.names):
        rest = ev.e - ev.args[i]
        yield from _of_part(ev, name, ev.x - rest, ev.args[i], lambda args, r, y, i=i: y + args[i] * (r - 1))


def _of_part(ev: Evidence, name: str, x: Array, e: Array, made: Callable[..., Array]) -> Iterator[Mutant]:
    r = np.vecdot(x, e) / np.maximum(np.vecdot(e, e), np.finfo(float).tiny)
    if not near(x, r[..., None] * e, ev.limit) or not ev.explained(ev.x - x + r[..., None] * e):
        return
    where = f" in {ev.call.of.tap}" if name != ev.call.of.tap else ""
    title = f"{name} is multiplied by a number of every token's own{where}"

    def fn(*args: Any, **static: Any) -> Array:
        y = STAGES[ev.call.stage].fn(*args, **static)
        return made(args, _cut(r, y.shape[:-1])[..., None], y)

    yield guess(title, ev.call.stage, fn)


def _cut(x: Array, shape: tuple[int, ...]) -> Array:
    """The first of every axis."""
    return x[tuple([slice(n) for n in shape])]


def dropout(ev: Evidence) -> Iterator[Mutant]:
    """A share p of the numbers is 0, and the others are divided by 1 - p."""
    if not ev.whole or ev.call.of.compare in ("exact", "set"):
        return
    there = ev.e != 0
    kept = (ev.x != 0) & there
    n, left = int(there.sum()), int(kept.sum())
    if not 0 < left < n:
        return
    k = float((ev.x[kept] @ ev.e[kept]) / (ev.e[kept] @ ev.e[kept]))
    p = 1 - left / n
    if k <= 1 or abs(p - (1 - 1 / k)) > 4 * np.sqrt(p * (1 - p) / n) or not near(ev.x[kept], k * ev.e[kept], ev.limit):
        return
    for v in rounded(1 - 1 / k):
        title = f"dropout: {v:.4g} of {ev.call.of.tap}'s numbers are 0, the others are divided by {1 - v:.9g}"
        yield guess(title, ev.call.stage, _dropping(ev.call.stage, kept / (1 - v)))


def _dropping(name: str, by: Array) -> Callable[..., Any]:
    def fn(*args: Any, **static: Any) -> Array:
        y = STAGES[name].fn(*args, **static)
        out: Array = y * _cut(by, y.shape)
        return out

    return fn
