"""Some of a number of things in words: `head 2`; `channels 64-95, the second half`; `even tokens`; "" where no few words tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.autograd.tensor import Array

BLOCK = 128
"""Channels that share a scale in the report's FP8 (R 3.3.2)."""
FEW = 4
"""Things that are listed."""
Named = tuple[str, int, int]
"""A part of an axis: its name, where it begins, where it ends."""


def in_words(off: Array, one: str, labels: Array | None = None, parts: Sequence[Named] = ()) -> str:
    """Which things are off, each called `one` and a number, its place or its label; "" for all, for none, and for what is no simple
    subset.  off (n,) bool, labels (n,), `parts` stretches of them that have a name.
    """
    at, n = np.flatnonzero(off), len(off)
    if not 0 < len(at) < n:
        return ""
    whole = labels is None or np.array_equal(labels, np.arange(n))
    names = np.arange(n) if labels is None else labels
    found = _stretch(at, n, one, names, parts if whole else None)
    if not found and whole:
        found = periodic(off, one) or _blocks(off, one)
    return found or _few(at, n, one, names)


def _stretch(at: Array, n: int, one: str, names: Array, parts: Sequence[Named] | None) -> str:
    """Things that follow each other; `parts` is None where some are left out."""
    low, high = int(at[0]), int(at[-1])
    if high - low != len(at) - 1:
        return ""
    told = "" if parts is None else _remark(low, high + 1, n, parts)
    if low == high:
        return f"{one} {names[low]}{told or (', the last' if one == 'token' and high == n - 1 else '')}"
    span = (
        f"{names[low]} to {names[high]}"
        if names[low] < 0
        else f"from {names[low]} on"
        if high == n - 1
        else f"{names[low]}-{names[high]}"
    )
    return f"{many(one)} {span}{told}"


def many(one: str) -> str:
    """Its plural."""
    return f"{one[:-1]}ies" if one.endswith("y") else f"{one}s"


def _remark(low: int, end: int, n: int, parts: Sequence[Named]) -> str:
    """What a stretch is: a part with a name, a half, blocks of 128."""
    if name := next((name for name, first, last in parts if (first, last) == (low, end)), ""):
        return f", {name}"
    if 2 * (end - low) == n > 2 and low in (0, end - low):
        return f", the {'second' if low else 'first'} half"
    if n > BLOCK and low % BLOCK == 0 and (end % BLOCK == 0 or end == n):
        first, last = low // BLOCK, (end - 1) // BLOCK
        ragged = f", which has {end % BLOCK}" if end % BLOCK and first == last else ""
        return f", block {first} of {BLOCK}{ragged}" if first == last else f", blocks {first}-{last} of {BLOCK}"
    return ""


def periodic(off: Array, one: str) -> str:
    """Things that come again: one, three times at least; or some that follow each other, in all parts of what can be divided so."""
    n = len(off)
    for period in range(2, n // 2 + 1):
        if np.array_equal(off[period:], off[:-period]):
            at = np.flatnonzero(off[:period])
            if period == 2:
                return f"{'odd' if at[0] else 'even'} {many(one)}"
            if len(at) == 1:
                return f"every {_ordinal(period)} {one} from {at[0]} on" if n >= 3 * period else ""
            if n % period == 0 and at[-1] - at[0] == len(at) - 1:
                return f"{many(one)} {at[0]}-{at[-1]} of every {period}"
    return ""


def _ordinal(n: int) -> str:
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{n}{'th' if n % 100 in (11, 12, 13) else ends.get(n % 10, 'th')}"


def _blocks(off: Array, one: str) -> str:
    """A few whole blocks of 128."""
    starts = np.arange(0, len(off), BLOCK)
    blocks, same = off[starts], np.repeat(off[starts], BLOCK)[: len(off)]
    if not np.array_equal(same, off) or blocks.sum() > FEW:
        return ""
    return f"{many(one)} of blocks {', '.join(map(str, np.flatnonzero(blocks)))} of {BLOCK}"


def _few(at: Array, n: int, one: str, names: Array) -> str:
    """A few of at least twice as many, or all but one or two."""
    if len(at) <= FEW and 2 * len(at) <= n:
        return f"{many(one)} {', '.join(map(str, names[at]))}"
    rest = np.setdiff1d(np.arange(n), at)
    if len(rest) <= FEW // 2 and len(rest) * FEW <= n:
        return f"all {many(one)} but {', '.join(map(str, names[rest]))}"
    return ""
