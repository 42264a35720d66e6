"""Orders and numbers in words."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config

SHOWN = 16
"""Entries of an order that are printed."""
DIGITS = (1, 2, 3, 4, 5, 7, 9)
"""To how many digits a fitted number is rounded, until it is what the candidate used."""


def order_in_words(order: Array, what: str) -> str:
    """Where each of `what` (channels, heads) comes from, -1 for nowhere: `heads are in reverse order`. order (n,)."""
    n = len(order)
    moved = np.flatnonzero(order != np.arange(n))
    if (order[moved] < 0).all():
        return f"{what if len(moved) > 1 else what[:-1]} {listed(moved)} {'are' if len(moved) > 1 else 'is'} 0"
    if len(moved) == 2 and (order[moved] == moved[::-1]).all():
        return f"{what} {moved[0]} and {moved[1]} are exchanged"
    low, high = int(moved[0]), int(moved[-1]) + 1
    for first, end in ((0, n), (low, high), (low - 1, high), (low, high + 1), (low - 1, high + 1)):
        if first >= 0 and end <= n and (said := _pattern(order[first:end] - first, what, first)):
            return said if (first, end) == (0, n) else f"of {what} {first}-{end - 1}, {said}"
    return f"{what} are {'in the order' if len(set(order.tolist())) == n else 'taken from'} {listed(order)}"


def _pattern(order: Array, what: str, first: int) -> str:
    """What an order of some, which begin at `first`, is; "" if it is none of a few."""
    n, at, step = len(order), np.arange(len(order)), int(order[0])
    if (order == at[::-1]).all():
        return f"{what} are in reverse order"
    if (order == (at + step) % n).all():
        if min(step, n - step) == 1 and n > 2:
            return f"{what} are those of their neighbour {'behind' if step == 1 else 'before'} (around the end)"
        return f"{what} {first + step}-{first + n - 1} stand before {what} {first}-{first + step - 1}"
    for rows in [a for a in range(2, n // 2 + 1) if n % a == 0]:
        if (order == at.reshape(rows, -1).T.ravel()).all():
            return _transposed(what, rows, n // rows)
    return ""


def _transposed(what: str, rows: int, columns: int) -> str:
    if rows == 2:
        return f"{what} of two halves stand in pairs"
    if columns == 2:
        return f"even {what} stand before odd ones"
    return f"{what} are transposed, {columns} x {rows} where {rows} x {columns} is meant"


def listed(numbers: Array) -> str:
    """Some numbers in words, the first of many."""
    more = len(numbers) - SHOWN
    return ", ".join([str(int(i)) for i in numbers[:SHOWN]]) + (f" and {more} more" if more > 0 else "")


def rounded(v: float) -> Iterator[float]:
    """The number with few digits, then with more."""
    seen = set[float]()
    for digits in DIGITS:
        value = float(f"{v:.{digits - 1}e}")
        if value not in seen:
            seen.add(value)
            yield value


def likely(v: float, c: Config) -> Iterator[tuple[float, str]]:
    """Numbers that a fitted one may stand for, with how to say them: a few digits, one that a model knows, more digits."""
    values = list(rounded(v))
    known = [(k, name) for name, k in constants(c).items() if abs(k - v) <= 5e-3 * abs(v)]
    short = [(k, f"{k:g}") for k in values[:2]]
    yield from short
    for k, name in sorted(known, key=lambda pair: abs(pair[0] - v)):
        yield k, f"{k:.4g} ({name})"
    yield from ((k, f"{k:.9g}") for k in values[2:])


def constants(c: Config) -> dict[str, float]:
    """Factors that models multiply by."""
    softmax = c.yarn.softmax_factor if c.yarn else 1.0
    found = {
        "the root of the width": math.sqrt(c.hidden_size),
        "the root of twice the layers": math.sqrt(2 * c.num_hidden_layers),
        "the root of a head's width": math.sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim),
        "the root of 2": math.sqrt(2),
        "mscale squared": softmax,
        "mscale": math.sqrt(softmax),
        "the routed scaling factor": c.routed_scaling_factor,
        "ln 2": math.log(2),
    }
    ones = {name: v for name, v in found.items() if v != 1}
    return ones | {f"1 / {name}": 1 / v for name, v in ones.items() if v}
