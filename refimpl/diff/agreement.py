"""The gate on ranks: what several of them were meant to hold, they hold; what one of them was meant to record is there.

Ranks that hold the same have run the same program on the same numbers and so agree bit for bit. Where they do not, each may be
ROUNDINGS roundings from the exact value, as a tap of any trace may, and so the two may be twice that apart: a sum whose order is
not fixed does so. More is a fault that no single rank shows: a rank that missed a reduction, or ran on something else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call

from .gates import Gate
from .precision import Precision
from .shards import Rank, Shards
from .tolerance import ROUNDINGS, row_errors
from .trace import Trace

APART = 2 * ROUNDINGS
"""Roundoffs that two results of the same stage may be apart, each ROUNDINGS from the exact one."""


def ranks_gate(trace: Trace, precision: Precision, program: Sequence[Call]) -> list[Gate]:
    """The gate of a trace that was put together of those of several ranks; none otherwise."""
    taps = trace.taps
    if not isinstance(taps, Shards):
        return []
    stages = {c.tap: c.stage for c in program}
    order = {t: i for i, t in enumerate(stages)}
    lines, alike, rounded = dict(taps.wrong), 0, 0
    for tap in taps:
        shared = list(taps.replicas(tap))
        found = [_disagreement(tap, stages.get(tap, tap), g, APART * precision.unit(tap), taps) for g in shared]
        said = [text for text, _ in found if text]
        lines |= {tap: said[0]} if said else {}
        alike += bool(shared) and not said
        rounded += bool(shared) and not said and not all(exact for _, exact in found)
    for state, texts in (("FAIL", lines), ("?", taps.missing)):
        told = [f"{t} {texts[t]}" for t in sorted(texts, key=lambda t: (order.get(t, len(order)), t))]
        if told:
            more = f"; and {len(told) - 1} more taps" if len(told) > 1 else ""
            return [Gate("ranks", "FAIL" if state == "FAIL" else "?", told[0] + more, tuple(told))]
    split = sum(bool(taps.marks(t).along) for t in taps)
    but = f", {rounded} of them to rounding" if rounded else " bit for bit" if alike else ""
    return [
        Gate("ranks", "ok", f"{len(taps.ranks)} ranks: {split} taps put together, {alike} agree between ranks{but}")
    ]


def _disagreement(tap: str, stage: str, same: list[Rank], allowed: float, taps: Shards) -> tuple[str, bool]:
    """What ranks that were meant to hold the same disagree about, "" if nothing; whether they agree bit for bit."""
    first, exact, off = same[0], True, list[tuple[float, str, Rank]]()
    for r in same[1:]:
        a, b = (np.asarray(x.taps[tap]) for x in (first, r))
        if not _bits_equal(a, b):
            exact = False
            error, where = _integers(b, a) if a.dtype.kind in "iub" else _floats(stage, b, a, allowed)
            off += [(error, where, r)] if error else []
    if not off:
        return "", exact
    _, where, _ = max(off, key=lambda one: one[0])
    which = _named([first, *[r for _, _, r in off]], taps)
    return f"differs between {which}: {where}; these ranks were meant to hold the same", exact


def _bits_equal(a: Array, b: Array) -> bool:
    first, second = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return np.array_equal(first, second)


def _integers(x: Array, e: Array) -> tuple[float, str]:
    """How many of x are not e, and where."""
    wrong = np.argwhere(x != e).tolist()
    return float(len(wrong)), f"{len(wrong)} of {x.size} elements, the first at {wrong[0] if wrong else []}"


def _floats(stage: str, x: Array, e: Array, allowed: float) -> tuple[float, str]:
    """How far the worst row of x is from that of e, 0 where no row is further than allowed, and which it is."""
    x, e = x.astype(np.float64), e.astype(np.float64)
    holes = ~(np.isfinite(x) & np.isfinite(e) | (x == e) | np.isnan(x) & np.isnan(e))
    errors = np.where(np.atleast_1d(holes).any(axis=-1), np.inf, row_errors(stage, x, e))
    worst = float(errors.max(initial=0))
    if not worst > allowed:
        return 0.0, ""
    place = [int(i) for i in np.unravel_index(int(errors.argmax()), errors.shape)]
    return worst, f"worst row {place} by {worst:.1e}, allowed {allowed:.1e}"


def _named(same: list[Rank], taps: Shards) -> str:
    """The ranks by the axis in which alone they differ, else by number: `tp ranks 0 and 2`."""
    other = [a for a in taps.sizes if len({r.at[a] for r in same}) > 1]
    numbers = [str(r.at[other[0]] if len(other) == 1 else r.number) for r in same]
    kind = f"{other[0]} ranks" if len(other) == 1 else "ranks"
    fixed = (
        [f"{a} {same[0].at[a]}" for a, n in taps.sizes.items() if n > 1 and a not in other] if len(other) == 1 else []
    )
    return f"{kind} {numbers[0]} and {', '.join(numbers[1:])}" + (f" (at {', '.join(fixed)})" if fixed else "")
