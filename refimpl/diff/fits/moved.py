"""Entries of an axis in another order: tokens one late, heads reversed, v before k, two experts exchanged, found by value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import STAGES

from ..corpus import Mutant
from ..dims import TOKEN_AXES
from ..gauges import by_rank
from .evidence import Evidence, guess, near
from .words import order_in_words

WHAT = {"B": "sequences", "S": "tokens", "T": "tokens", "H": "heads", "E": "experts", "G": "groups", "K": "slots"}
LARGEST = 1 << 22
"""Pairs of entries up to which all are compared."""
STEPS = (1, -1, 2, -2)
"""By how many tokens a tap is looked for to be late."""
EDGES = ("0", "their own", "the last of those there are", "those around the end", "those of the sequence beside")
"""What tokens have that have none before them."""


def late(x: Array, axis: int, by: int, edge: str) -> Array:
    """x with every token's entry that of the token `by` before it."""
    if edge.startswith("those of"):  # all sequences' tokens one behind the other
        if axis != 1 or len(x) < 2:
            raise ValueError("there is no sequence beside")
        return np.roll(x.reshape(-1, *x.shape[2:]), by, axis=0).reshape(x.shape)
    at = np.arange(x.shape[axis])
    source = at - by
    outside = (source < 0) | (source >= len(at))
    if edge.startswith("those"):
        source = source % len(at)
    elif edge.startswith("their"):
        source = np.where(outside, at, source)
    out = np.take(x, np.clip(source, 0, len(at) - 1), axis=axis)
    if edge == "0":
        np.moveaxis(out, axis, 0)[outside] = 0
    return out


def late_in_words(by: int, edge: str) -> str:
    """By how many tokens, and what those at the end have."""
    n, side = abs(by), "before" if by > 0 else "behind"
    return f"of the token {'' if n == 1 else f'{n} places '}{side} (where there is none: {edge})"


def shifted(ev: Evidence) -> Iterator[Mutant]:
    """The output one token late or early."""
    axis = next((i for i, letter in enumerate(ev.letters) if letter in TOKEN_AXES), None)
    if axis is None or not (ev.whole or _numbers(ev)) or ev.letters[-1] == "T" or not ev.everywhere:
        return
    pair = (np.sort(y, axis=-1) if ev.call.of.compare == "set" else y for y in (ev.x, ev.e))
    (x, e), name = (np.moveaxis(y, axis, 0) for y in pair), ev.call.stage
    for by in STEPS:
        inner = (x[by:], e[:-by]) if by > 0 else (x[:by], e[-by:])
        if len(inner[0]) > 1 and near(*inner, ev.limit):
            for edge in EDGES:
                yield guess(f"{ev.call.of.tap} is that {late_in_words(by, edge)}", name, _late(name, axis, by, edge))


def _numbers(ev: Evidence) -> bool:
    """Whether the tap is whole numbers, of which the stage gives as many."""
    return ev.e.dtype.kind in "iu" and ev.x.shape == ev.e.shape and ev.finding.tap in ev.recorded.taps


def _late(name: str, axis: int, by: int, edge: str) -> Callable[..., Any]:
    return lambda *args, **static: late(STAGES[name].fn(*args, **static), axis, by, edge)


def permuted(ev: Evidence) -> Iterator[Mutant]:
    """The output with an axis, or each head's channels and the heads together, in another order."""
    if not ev.whole:
        return
    name, last = ev.call.stage, len(ev.letters) - 1
    places = [(i, WHAT.get(letter, "channels")) for i, letter in enumerate(ev.letters) if letter in WHAT or i == last]
    for axis, what in places if ev.letters[-1] != "T" else []:
        order = origin(ev.x, ev.e, axis, ev.limit)
        if order is not None:
            yield guess(f"{ev.call.of.tap}: {order_in_words(order, what)}", name, _ordered(name, order, axis))
    if ev.letters[-2:-1] == ["H"]:
        flat = (*ev.e.shape[:-2], -1)
        order = origin(ev.x.reshape(flat), ev.e.reshape(flat), -1, ev.limit)
        if order is not None:
            split = ev.config.qk_nope_head_dim if "+" in ev.letters[-1] else 0
            words = _all_parts(order, ev.e.shape[-2:], split) or order_in_words(order, "rows of all heads")
            yield guess(f"{ev.call.of.tap}: {words}", name, _ordered(name, order, -1, flat=True))


def scrambled(ev: Evidence) -> Iterator[Mutant]:
    """Every token's routing weights in another order than its ids, in none that is the same for all."""
    if ev.call.stage != "router.weights" or not ev.whole or not near(by_rank(ev.x, ev.e), ev.e, ev.limit):
        return
    ranks = np.argsort(np.argsort(-ev.x, axis=-1, kind="stable"), axis=-1, kind="stable")

    def fn(*args: Any, **static: Any) -> Array:
        falling = -np.sort(-STAGES["router.weights"].fn(*args, **static), axis=-1)
        return np.take_along_axis(falling, ranks, axis=-1)

    yield guess("each token's routing weights are right, and in another order than its experts", "router.weights", fn)


def _all_parts(order: Array, shape: tuple[int, ...], split: int) -> str:
    """Whether all heads' first channels stand before all their last ones."""
    at = np.arange(len(order)).reshape(shape)
    if split and (order == np.concatenate([at[:, :split].ravel(), at[:, split:].ravel()])).all():
        return f"first {split} channels of all heads stand before the others of all heads"
    first = np.argsort(np.concatenate([at[:, :split].ravel(), at[:, split:].ravel()])) if split else at.ravel()
    if split and (order == first).all():
        return f"heads are read as if the first {split} channels of all stood before the others of all"
    return ""


def _ordered(name: str, order: Array, axis: int, *, flat: bool = False) -> Callable[..., Any]:
    def fn(*args: Any, **static: Any) -> Array:
        y = STAGES[name].fn(*args, **static)
        z = y.reshape(*y.shape[:-2], -1) if flat else y
        return taken(z, order, axis).reshape(y.shape)

    return fn


def taken(x: Array, order: Array, axis: int) -> Array:
    """The entries of an axis in another order; 0 where it says -1."""
    out = np.take(x, np.maximum(order, 0), axis=axis)
    np.moveaxis(out, axis, 0)[order < 0] = 0
    return out


def origin(x: Array, e: Array, axis: int, limit: float) -> Array | None:
    """For every entry of x along an axis which of e's it is, -1 if it is 0; None if it is none of them, or all are in place."""
    n = x.shape[axis]
    if n < 2 or n * n > LARGEST:
        return None
    a, b = (np.moveaxis(np.where(np.isfinite(y), y, 0), axis, 0).reshape(n, -1) for y in (x, e))
    mine, size = (np.vecdot(y, y) for y in (a, b))
    far = np.maximum(mine[:, None] + size - 2 * (a @ b.T), 0)
    least = np.maximum(size, 1e-12 * size.max(initial=0))
    good = far <= (limit**2 + 1e-14) * least
    at = np.arange(n)
    order = np.where(good[at, at], at, np.where(mine == 0, -1, far.argmin(axis=1)))
    found = (order < 0) | good[at, np.maximum(order, 0)]
    return order if found.all() and (order != at).any() and (order >= 0).any() else None
