"""What a tap's error looks like: a map of tokens by features, a histogram and the worst entries; small, whatever the tap's size.

The error of an element is |x - e| over the root mean square of its row of e. So a row's elements have as their root mean square
the row's error, the one that is held to what the tap is allowed (`tolerance`). Of ids, what counts is whether an expert or a
group was chosen: an element is then 1 where only one of the two chose it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Stage

from .reading import Pick, cut, entries
from .tolerance import element_errors, row_errors

ROWS, COLUMNS = 64, 96
"""A map's cells at most; in a larger tap a cell is the largest error of its block, so that no single element is lost."""
WORST = 8
LOWEST, BINS = -18, 48
"""The histogram: half decades from 1e-18 on."""


@dataclass(frozen=True)
class Entry:
    """One element: its index in the whole tap, the candidate's value, the specification's, the error."""

    at: tuple[int, ...]
    candidate: float
    expected: float
    error: float


@dataclass(frozen=True)
class Picture:
    """axes: letters of an entry's index. rows, columns: the map's, as letters; size: how many of each before they were pooled;
    ends: first and last index of the rows. heat (r, c): error, NaN where nothing was compared; strip (r,): the worst row's
    error, NaN likewise. unseen: elements not compared; equal: those that are exact; counts: the others by half decade, those
    that are NaN or infinite in the last.
    """

    axes: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    size: tuple[int, int]
    ends: tuple[tuple[int, ...], tuple[int, ...]]
    heat: Array
    strip: Array
    unseen: int
    equal: int
    counts: tuple[int, ...]
    worst: tuple[Entry, ...]


def picture(stage: Stage, x: Array, exact: Array, settled: Array | None, pick: Pick) -> Picture:
    """The picture of a candidate's tap x, or of the part `pick` of it, beside the whole exact one; rows that are not settled are
    left out.
    """
    axes, kind = stage.shape.split(), stage.compare
    places = entries(exact.shape, pick)
    e = cut(exact, pick)
    if kind == "set":
        x, e = _chosen(x, e)
        axes[-1], places[-1] = "G" if stage.name == "router.groups" else "E", np.arange(e.shape[-1])
    elif not axes:
        x, e, axes, places = x.reshape(1), e.reshape(1), ["1"], [np.arange(1)]
    error, row = _errors(stage.name, x, e, exactly=kind in ("exact", "set"))
    if settled is not None:
        keep = settled.reshape(row.shape)
        error, row = np.where(keep[..., None], error, np.nan), np.where(keep, row, np.nan)
    return _pictured(axes, places, x, e, error, row)


def _chosen(x: Array, e: Array) -> tuple[Array, Array]:
    """Two arrays of ids (..., K) as 0 and 1 for every id that there is."""
    n = int(max(x.max(initial=0), e.max(initial=0))) + 1
    ids = np.arange(n)
    first, second = (np.logical_or.reduce([a[..., k, None] == ids for k in range(a.shape[-1])]) for a in (x, e))
    return first.astype(np.int8), second.astype(np.int8)


def _errors(stage: str, x: Array, e: Array, *, exactly: bool) -> tuple[Array, Array]:
    """Of every element and of every row (all axes but the last). What is not a number is infinitely far."""
    if exactly:
        error = (x != e).astype(np.float64)
        return error, error.max(axis=-1, initial=0)
    with np.errstate(all="ignore"):
        error = element_errors(stage, x, e)
        row = row_errors(stage, x, e).reshape(error.shape[:-1])
    return tuple(np.where(a < 1e30, a, np.inf) for a in (error, row))  # type: ignore[return-value]


def _pictured(axes: list[str], places: list[Array], x: Array, e: Array, error: Array, row: Array) -> Picture:
    tokens = next((a for a in ("S", "S-k", "T", "M") if a in axes), "")
    down = [i for i, a in enumerate(axes) if a in ("B", tokens)]
    across = [i for i in range(len(axes)) if i not in down]
    size = (math.prod([error.shape[i] for i in down]), math.prod([error.shape[i] for i in across]))
    last = len(axes) - 1  # in `row` this axis is gone: a row belongs to all tokens where it runs along them
    strip = np.broadcast_to(row[..., None], error.shape) if last in down else row
    order = [i for i in [*down, *across] if i != last or last in down]
    heat = pooled(error.transpose([*down, *across]).reshape(size), ROWS, COLUMNS)
    finite = error[np.isfinite(error) & (error > 0)]
    bins = np.clip(np.floor(2 * (np.log10(finite) - LOWEST)).astype(int), 0, BINS - 1)
    counts = [*np.bincount(bins, minlength=BINS).tolist(), int(np.isposinf(error).sum())]
    return Picture(
        axes=tuple(axes),
        rows=tuple([axes[i] for i in down]),
        columns=tuple([axes[i] for i in across]),
        size=size,
        ends=(tuple([int(places[i][0]) for i in down]), tuple([int(places[i][-1]) for i in down])),
        heat=heat,
        strip=pooled(strip.transpose(order).reshape(size[0], -1), ROWS, 1)[:, 0],
        unseen=int(np.isnan(error).sum()),
        equal=int((error == 0).sum()),
        counts=tuple(counts),
        worst=tuple(_worst(places, x, e, error)),
    )


def pooled(a: Array, rows: int, columns: int) -> Array:
    """(n, m) -> at most (rows, columns): the largest of each block, NaN only where all of it is."""
    for axis, most in enumerate((rows, columns)):
        n = a.shape[axis]
        starts = np.arange(min(n, most)) * n // max(min(n, most), 1)
        a = np.fmax.reduceat(a, starts, axis=axis)
    return a.astype(np.float32)


def _worst(places: Sequence[Array], x: Array, e: Array, error: Array) -> list[Entry]:
    """The largest errors, of equal ones those that come first."""
    flat = np.where(np.isnan(error), 0, error).ravel()
    k = min(WORST, flat.size)
    least = np.partition(flat, flat.size - k)[flat.size - k]
    high = np.flatnonzero((flat >= least) & (flat > 0))
    high = high[np.argsort(-flat[high], kind="stable")][:k]
    return [_entry(places, np.unravel_index(int(i), error.shape), x, e, float(flat[i])) for i in high]


def _entry(places: Sequence[Array], at: tuple[Array, ...], x: Array, e: Array, error: float) -> Entry:
    index = tuple([int(p[i]) for p, i in zip(places, at, strict=True)])
    return Entry(index, float(x[at]), float(e[at]), error)
