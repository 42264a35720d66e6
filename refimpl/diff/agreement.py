"""The gate on ranks: what several of them were meant to hold, they hold; what one of them was meant to record is there.

Ranks that hold the same have run the same program on the same numbers and so agree bit for bit. Where they do not, each may be
ROUNDINGS roundings from the exact value, as a tap of any trace may, and so the two may be twice that apart: a sum whose order is
not fixed does so. The roundoff is the coarsest of the run: router logits in float32 follow hidden states in bfloat16. What ranks
differ by at one tap a later stage may magnify, by FACTOR, as a candidate may what its twins err by. More is a fault that no single
rank shows: a rank that missed a reduction, or ran on something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call
from refimpl.model.phases import parts_of

from .dims import Sizes, shape_of
from .gates import Gate, phases_of
from .precision import Precision
from .shards import Rank, Shards
from .tolerance import FACTOR, ROUNDINGS, row_errors
from .trace import Trace

APART = 2 * ROUNDINGS
"""Roundoffs that two results of the same stage may be apart, each ROUNDINGS from the exact one."""


@dataclass(frozen=True)
class _Compared:
    """What was found at a tap: the fault in words, "" if there is none; whether it was equal bit for bit; how far the worst row
    is.
    """

    fault: str
    exact: bool
    error: float


def ranks_gate(trace: Trace, precision: Precision, program: Sequence[Call]) -> list[Gate]:
    """The gate of a trace that was put together of those of several ranks; none otherwise."""
    taps = trace.taps
    if not isinstance(taps, Shards):
        return []
    calls = {c.tap: c for c in program}
    stages = {tap: c.stage for tap, c in calls.items()}
    order = {t: i for i, t in enumerate(stages)}

    def place(tap: str) -> tuple[int, str]:
        return order.get(tap, len(order)), tap

    found = _all_compared(sorted(taps, key=place), stages, APART * max(map(precision.unit, taps), default=0.0), taps)
    wrong = taps.wrong | {t: c.fault for t, c in found.items() if c.fault}
    for state, texts in (("FAIL", wrong), ("?", taps.missing)):
        told = [f"{t} {texts[t]}{_split(calls.get(t), trace, taps)}" for t in sorted(texts, key=place)]
        if told:
            more = f"; and {len(told) - 1} more taps" if len(told) > 1 else ""
            return [Gate("ranks", "FAIL" if state == "FAIL" else "?", told[0] + more, tuple(told))]
    split, rounded = sum(bool(taps.marks(t).along) for t in taps), sum(not c.exact for c in found.values())
    but = f", {rounded} of them to rounding" if rounded else " bit for bit" if found else ""
    return [
        Gate(
            "ranks", "ok", f"{len(taps.ranks)} ranks: {split} taps put together, {len(found)} agree between ranks{but}"
        )
    ]


def _split(call: Call | None, trace: Trace, taps: Shards) -> str:
    """What to declare, in words: an axis of the tap along which its ranks' arrays, side by side, have the length that it should
    have; "" if there is none.
    """
    if call is None or taps.marks(call.tap).along:
        return ""
    h = trace.header
    sizes = Sizes(len(h.tokens), parts_of(phases_of(h, taps), len(h.tokens[0])))
    whole, letters = shape_of(call, trace.config, sizes), call.of.shape.split()
    for axis in [a for a, n in taps.sizes.items() if n > 1]:
        along = [r for r in taps.ranks if all(i == 0 for a, i in r.at.items() if a != axis)]
        held = [np.asarray(r.taps[call.tap]) for r in along if call.tap in r.taps]
        odd = len(held) != taps.sizes[axis] or any(a.ndim != len(whole) for a in held)
        if odd or all(_bits_equal(a, held[0]) for a in held):
            continue
        for i, letter in enumerate(letters):
            rest = {(*a.shape[:i], *a.shape[i + 1 :]) for a in held}
            if rest == {(*whole[:i], *whole[i + 1 :])} and sum([a.shape[i] for a in held]) == whole[i]:
                dims = " ".join([*letters[:i], f"{letter}@{axis}", *letters[i + 1 :]])
                return f'; side by side along {letter} they are whole: if that is meant, declare dims "{dims}"'
    return ""


def _all_compared(
    order: Sequence[str], stages: Mapping[str, str], rounding: float, taps: Shards
) -> dict[str, _Compared]:
    """Every tap that several ranks hold, in model order; what they differ by already, a later stage may magnify."""
    found: dict[str, _Compared] = {}
    drift = 0.0
    for tap in order:
        allowed = max(rounding, FACTOR * drift)
        groups = [_compared(stages.get(tap, tap), same, allowed, taps, tap) for same in taps.replicas(tap)]
        if groups:
            found[tap] = next((c for c in groups if c.fault), min(groups, key=lambda c: c.exact))
            drift = max([drift, *[c.error for c in groups if not c.fault]])
    return found


def _compared(stage: str, same: list[Rank], allowed: float, taps: Shards, tap: str) -> _Compared:
    """The arrays of ranks that were meant to hold the same, each with the lowest rank's."""
    first, exact, near, off = same[0], True, 0.0, list[tuple[float, str, Rank]]()
    for r in same[1:]:
        a, b = (np.asarray(x.taps[tap]) for x in (first, r))
        if not _bits_equal(a, b):
            exact, whole = False, a.dtype.kind in "iub"
            error, where = _integers(b, a) if whole else _floats(stage, b, a)
            if error > (0 if whole else allowed):
                off.append((error, where + ("" if whole else f", allowed {allowed:.1e}"), r))
            else:
                near = max(near, error)
    if not off:
        return _Compared("", exact, near)
    error, where, _ = max(off, key=lambda one: one[0])
    which = _named([first, *[r for _, _, r in off]], taps)
    return _Compared(f"differs between {which}: {where}; these ranks were meant to hold the same", exact, error)


def _bits_equal(a: Array, b: Array) -> bool:
    first, second = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return np.array_equal(first, second)


def _integers(x: Array, e: Array) -> tuple[float, str]:
    """How many of x are not e, and where."""
    wrong = np.argwhere(x != e).tolist()
    return float(len(wrong)), f"{len(wrong)} of {x.size} elements, the first at {wrong[0] if wrong else []}"


def _floats(stage: str, x: Array, e: Array) -> tuple[float, str]:
    """How far the worst row of x is from that of e, and which it is."""
    x, e = x.astype(np.float64), e.astype(np.float64)
    holes = ~(np.isfinite(x) & np.isfinite(e) | (x == e) | np.isnan(x) & np.isnan(e))
    errors = np.where(np.atleast_1d(holes).any(axis=-1), np.inf, row_errors(stage, x, e))
    worst = float(errors.max(initial=0))
    place = [int(i) for i in np.unravel_index(int(errors.argmax()), errors.shape)] if errors.size else []
    return worst, f"worst row {place} by {worst:.1e}"


def _named(same: list[Rank], taps: Shards) -> str:
    """The ranks by the axis in which alone they differ, else by number: `tp ranks 0 and 2`."""
    other = [a for a in taps.sizes if len({r.at[a] for r in same}) > 1]
    numbers = [str(r.at[other[0]] if len(other) == 1 else r.number) for r in same]
    kind = f"{other[0]} ranks" if len(other) == 1 else "ranks"
    fixed = (
        [f"{a} {same[0].at[a]}" for a, n in taps.sizes.items() if n > 1 and a not in other] if len(other) == 1 else []
    )
    return f"{kind} {numbers[0]} and {', '.join(numbers[1:])}" + (f" (at {', '.join(fixed)})" if fixed else "")
