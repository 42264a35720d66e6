"""Padding of a prompt: what a tap holds there is nobody's business, and engines that run tokens one behind the other have none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call

from .dims import TOKEN_AXES, Sizes, depth_of

PACKED = "tokens are one behind the other, without padding: put in their places"
FILLED = "tokens are one behind the other, without padding of sequences, then rows of no token: put in their places"
NOWHERE = "padding is sent to no expert"
ALL_SENT = "rows of no token are dispatched: taken out"


@dataclass(frozen=True)
class Padding:
    """Which tokens (B, L) of a run are padding. A tap of a run in parts has a stretch of them."""

    tokens: Array
    sizes: Sizes

    def at(self, call: Call) -> Array | None:
        """Which rows (B, S), of keys (B, T), of a call's tap are padding; None if none is, or if it has no such rows."""
        place = rows_at(axes := call.of.shape.split())
        if place is None:
            return None
        part, depth = self.sizes.of(call.tap), depth_of(call.tap)
        found = self.tokens[:, 0 if axes[place[1]] == "T" else part.start : part.stop - depth]
        return found if found.any() else None


def padding_of(valid: Sequence[Sequence[int]] | None, sizes: Sizes) -> Padding | None:
    """The padding of a run, None if there is none."""
    found = None if valid is None else ~np.asarray(valid, bool)
    return Padding(found, sizes) if found is not None and found.any() else None


def rows_at(axes: Sequence[str]) -> tuple[int, int] | None:
    """Which axes of a tap are sequences and tokens, or keys of a cache; None if tokens have no rows, or a number each."""
    for before, place in ((["B"], (0, 1)), (["B", "H"], (0, 2)), (["2", "B"], (1, 2))):
        n = len(before)
        if list(axes[:n]) == before and len(axes) > n + 1 and axes[n] in TOKEN_AXES:
            return place
    return None


def rows_of(call: Call, shape: Sequence[int], padding: Padding | None) -> Array | None:
    """The padding where a call's output of that shape has rows of it, else None."""
    place, rows = rows_at(call.of.shape.split()), padding.at(call) if padding else None
    fits = place is not None and rows is not None and tuple([shape[i] for i in place]) == rows.shape
    return rows if fits else None


def along(axes: Sequence[str], rows: Array, ndim: int) -> Array:
    """rows (B, S) with the other axes of a tap of `ndim` axes, each of length 1."""
    place = rows_at(axes)
    assert place is not None
    others = [i for i in range(ndim) if i not in place]
    return np.expand_dims(rows, tuple(others))


def filled(call: Call, x: Array, like: Array, padding: Padding | None) -> Array:
    """x with what `like` has in padding."""
    rows = rows_of(call, like.shape, padding)
    if rows is None or x.shape != like.shape:
        return x
    return np.where(along(call.of.shape.split(), rows, x.ndim), like, x)


def placed(
    x: Array, shape: tuple[int, ...], axes: list[str], padding: Array | None, limit: int | None, *, packed: bool = False
) -> tuple[Array, tuple[str, ...]]:
    """A tap with rows of `padding`, its own, if it has none, and with ids below `limit` there, None for what is no ids; what was
    done. `packed`: tokens are one behind the other even where there are as many rows as tokens and padding, or more.
    """
    if padding is not None and (whole := _unpacked(x, shape, axes, padding, packed)) is not None:
        return whole, (PACKED if int((~padding).sum()) == x.shape[_place(axes)] else FILLED,)
    ids = x if limit is None else _with_ids(x, padding, limit)
    return ids, () if ids is x else (NOWHERE,)


def may_be_packed(taps: Mapping[str, Array], padding: Padding | None) -> bool:
    """Whether some array has as many rows as there are tokens and padding, or more, so that its shape does not tell."""
    if padding is None:
        return False
    here = {tap: (len(padding.tokens), padding.sizes.of(tap).length) for tap in taps}
    return any(a.ndim and len(a) >= math.prod(here[t]) and a.shape[:2] != here[t] for t, a in taps.items())


def _unpacked(x: Array, shape: tuple[int, ...], axes: list[str], padding: Array, packed: bool) -> Array | None:
    """x (N, ...) of the N tokens that are no padding, and rows behind them, as (B, S, ...), there 0; None if it is not that."""
    at = _place(axes)
    if x.ndim <= at or rows_at(axes) != (at, at + 1) or shape[at : at + 2] != padding.shape:
        return None
    n, y, rest = int((~padding).sum()), np.moveaxis(x, at, 0), (*shape[:at], *shape[at + 2 :])
    few = len(y) < padding.size or (packed and x.shape[at : at + 2] != padding.shape)
    if len(y) < n or not few or y.size != len(y) * int(np.prod(rest)):
        return None
    whole = np.zeros((*padding.shape, *rest), x.dtype)
    whole[~padding] = y[:n].reshape(n, *rest)
    return np.moveaxis(whole, (0, 1), (at, at + 1))


def _place(axes: list[str]) -> int:
    """Where the tokens are: rotary tables have them in the second place."""
    return int(axes[:1] == ["2"])


def without_fill(
    call: Call, x: Array, shape: tuple[int, ...], ids: Array | None, k: int
) -> tuple[Array, tuple[str, ...]]:
    """Dispatched rows x (M, ...), sorted by expert, without those of no token, of which the ids (N, k) of all rows tell; what was
    done. `shape`: the tap's without them. Ids of another number of experts tell of no row too many.
    """
    if not call.of.shape.startswith("M ") or not x.ndim or len(x) <= shape[0]:
        return x, ()
    if ids is None or ids.shape[-1:] != (k,) or ids.size != len(x) or ids.dtype.kind not in "iu" or int(ids.min()) < 0:
        return x, ()
    return x[np.argsort(ids, axis=None, kind="stable") < shape[0]], (ALL_SENT,)


def _with_ids(x: Array, padding: Array | None, limit: int) -> Array:
    """Chosen experts or groups (B, S, K), where padding has none of `limit` the first ones: kernels write -1 or anything."""
    if padding is None or x.shape[:2] != padding.shape or x.ndim != 3 or x.dtype.kind not in "iu":
        return x
    nowhere = padding & ((x < 0) | (x >= limit)).any(axis=-1)
    return np.where(nowhere[..., None], np.arange(x.shape[-1], dtype=x.dtype), x) if nowhere.any() else x
