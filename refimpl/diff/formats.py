"""Numbers in arrays of another dtype than they are of: ids as floating-point whole numbers, all of a run in float64 arrays.

Recorders that write everything in one dtype lose nothing, so the numbers tell what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from refimpl.autograd.tensor import Array

from .reading import LOOK
from .trace import Trace

Notes = dict[str, list[str]]
"""What was done, and what to declare or record instead -> the taps."""
_CHOSEN = ("router.ids", "router.groups")
_MOST = 0.8
"""Share of the float64 arrays that must hold float32 numbers for a run that was declared to be in float64 to be none."""


def in_own_formats(trace: Trace) -> tuple[Trace, Notes]:
    """The trace with ids as integers and float32 numbers in float32 arrays, and what was done. Only arrays that are not as they
    should be are looked at, and of those only so many numbers as it takes to see that they are what they seem.
    """
    ids = {t: x for t in trace.taps if _is_chosen(t) and (x := _integers(np.asarray(trace.taps[t]))) is not None}
    trace, narrow = _single(trace)
    what = "ids are whole numbers in floating-point arrays: record integers"
    notes: Notes = {what: list(ids)} if ids else {}
    if narrow:
        notes["every value of these float64 arrays is a float32 number: record them in their own dtype"] = list(narrow)
    changed = {**narrow, **ids}
    taps = {t: changed.get(t, trace.taps[t]) for t in trace.taps} if changed else trace.taps
    return Trace(trace.header, taps), notes


def _is_chosen(tap: str) -> bool:
    return tap.rpartition("/")[2] in _CHOSEN


def _integers(x: Array) -> Array | None:
    """Floating-point ids as integers, -1 where they are NaN; None if they are integers as it is, or no whole numbers."""
    if x.dtype.kind in "iub" or x.dtype.kind == "c":
        return None
    x = np.where(np.isnan(y := x.astype(np.float64)), -1, y)
    return x.astype(np.int64) if bool((np.abs(x) < 2**31).all() and (x == np.trunc(x)).all()) else None


def _single(trace: Trace) -> tuple[Trace, Mapping[str, Array]]:
    """The float64 arrays whose numbers float32 has, in float32; where a run that says to be in float64 has mostly such ones it is
    said to be in float32, else it has none.
    """
    wide = [t for t in trace.taps if trace.taps[t].dtype == np.float64 and not _is_chosen(t)]
    told = trace.header.precision.get("storage", "float32")
    found = {t: np.asarray(x, np.float32) for t in wide if _fits(x := np.asarray(trace.taps[t]))}
    if told != "float64" or not found:
        return trace, found
    if len(found) < _MOST * len(wide):
        return trace, {}
    return Trace(replace(trace.header, precision=trace.header.precision | {"storage": "float32"}), trace.taps), found


def _fits(x: Array) -> bool:
    """Whether float32 has all numbers of an array."""
    flat = x.reshape(-1)
    with np.errstate(over="ignore"):
        return all(
            np.array_equal(part, part.astype(np.float32), equal_nan=True)
            for part in (flat[at : at + LOOK] for at in range(0, flat.size, LOOK))
        )
