"""A dtype as the cause: taps that would be right were they, and what was computed for them, kept in a narrower one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.precision import rounded
from refimpl.layers.stage import STAGES

from .corpus import Mutant
from .fits.evidence import Evidence
from .fp8_rules import RULES
from .hypothesis import REFUSED, rerun, seen, theirs
from .lanes import Lane
from .padding import filled
from .tolerance import TWINS, UNIT, Noise, allowed, distance, row_errors

NARROW = ("bfloat16", "float16")
"""Dtypes in which a part of a float32 run may have been computed, if nothing else explains it; the narrowest first."""
CODES = "float8_e4m3fn"
_MOST = 0.8
"""Share of the numbers that are ours as codes: the others were at the edge of two."""

LIKE = 0.3
"""Cosine between the errors of a candidate and of our own stages in that dtype: weights and inputs round alike in both, sums
may not. That of a mistake is 0 but for chance, which is 0.1 of a hundred numbers.
"""
ALONE = 0.7
"""The same where one stage is narrow, and nothing else: that rounds in few places."""
_FAR = 4.0
"""How many times as far as our own stages are off in that dtype a candidate may be, which sums in another order."""
_SHORT = 48
"""Stages of a region of which each is tried alone."""


def narrower(blamed: list[Evidence]) -> str:
    """In words: the dtype in which blamed taps that nothing else explains would all be right, all that was computed for them or one
    stage alone; of float8 the taps themselves, which no declaration makes right. "" if there is none.
    """
    dtype, stage = _found(blamed)
    what = f"{STAGES[stage].tap} is" if stage else "they are"
    if dtype == CODES:
        return f"every number of these taps is a {dtype}, the nearest to what it should be"
    return dtype and f"these taps conform if {what} computed in {dtype}: declare it if that is meant"


def _found(blamed: list[Evidence]) -> tuple[str, str]:
    """The dtype, and the stage that alone is computed in it.

    That twins err as much is not enough: a mistake may be as small. Rounding errors are known to the sign, and have to be those.
    """
    if not blamed or any(ev.call.of.compare in ("exact", "set") or ev.call.stage in RULES for ev in blamed):
        return "", ""
    if all(_codes(ev) for ev in blamed):
        return CODES, ""
    wide = [d for d in NARROW if all(_allows(d, ev) for ev in blamed)]
    common = set.intersection(*[{c.stage for c in ev.region if c.stage in STAGES} for ev in blamed])
    few = common if max(len(ev.region) for ev in blamed) <= _SHORT else ()
    for stages, least in (([""], LIKE), (sorted(few), ALONE)):
        found = {(d, stage): min(_like(d, stage, ev) for ev in blamed) for d in wide for stage in stages}
        if found and max(found.values()) >= least:
            return max(found, key=found.__getitem__)
    return "", ""


def _codes(ev: Evidence) -> bool:
    """Whether all numbers of a tap are float8 numbers, most of them those that are nearest to what float64 gives."""
    x = np.asarray(theirs(ev.finding.tap, ev.recorded), np.float64)
    with np.errstate(all="ignore"):
        nearest, own = (a.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) for a in (ev.e, x))
    return np.array_equal(own, x) and nearest.shape == x.shape and float((nearest == x).mean()) >= _MOST


def _holds(dtype: str, ev: Evidence) -> bool:
    """Whether all numbers of a tap are the dtype's."""
    x = theirs(ev.finding.tap, ev.recorded)
    return np.array_equal(_ROUND[dtype](x), x, equal_nan=True)


def _like(dtype: str, stage: str, ev: Evidence) -> float:
    """The cosine between what the candidate is off by and what a region is off by of which a stage, or all, rounds to a dtype; 1
    where each number is one of the dtype's.
    """
    best, off = 0.0, ev.x - ev.e
    if not stage and _holds(dtype, ev):
        return 1.0
    for reads, gives in _WAYS:
        narrow = {c.stage: _rounding(c.of.fn, dtype, reads, gives) for c in ev.region if stage in ("", c.stage)}
        first, ours = next(iter(narrow)), np.zeros(())
        with np.errstate(all="ignore"), contextlib.suppress(*REFUSED):
            ours = rerun(ev.region, ev.recorded, Mutant("", "", first, narrow[first], also=narrow)) - ev.e
        if ours.shape != off.shape or ours.dtype.kind != "f":  # a gradient, which is made of what lies on the tape
            continue
        both = np.isfinite(ours) & np.isfinite(off)
        a, b = ours[both], off[both]
        if b @ b <= _FAR**2 * (a @ a):
            best = max(best, float(a @ b) / max(float(np.sqrt((a @ a) * (b @ b))), np.finfo(float).tiny))
    return best


def _rounding(fn: Callable[..., Any], dtype: str, reads: bool, gives: bool) -> Callable[..., Any]:
    """The stage, with what it reads or gives rounded."""

    def held(a: Any, narrow: bool) -> Any:
        return _ROUND[dtype](a) if narrow and isinstance(a, np.ndarray) and a.dtype.kind == "f" else a

    return lambda *args, **static: held(fn(*[held(a, reads) for a in args], **static), gives)


_ROUND: Mapping[str, Callable[[Array], Array]] = {
    "float16": lambda a: a.astype(np.float16).astype(a.dtype),
    "bfloat16": lambda a: rounded(a, "bf16"),
}
_WAYS = ((True, True), (True, False), (False, True))
"""Whether what a stage reads is rounded, and whether what it gives is."""


def _allows(dtype: str, ev: Evidence) -> bool:
    """Whether twins of the region in that dtype err as much, and the candidate does so in most rows, as a dtype spares none. Where
    they would err as much had the last stage done nothing, whatever it does conforms: that says nothing, unless all its numbers
    are the dtype's.
    """
    f, r, region, e = ev.finding, ev.recorded, ev.region, ev.e
    narrow, family = replace(r, noise=Noise(lambda tap: UNIT[dtype], lambda call: "fp32")), 0.0
    if np.median(row_errors(f.stage, filled(ev.call, theirs(f.tap, r), e, r.padding), e)) <= f.allowed:
        return False
    for k in range(1, TWINS):
        lane = Lane(r.plan, k)
        for call in region:
            lane.values[call.tap] = narrow.noise.inner(call, lane.run(call, narrow), k)
            if call.tap in r.partial and call is not region[-1]:
                lane.overlay(call, narrow)
        family = max(family, distance(f.stage, seen(f.tap, np.asarray(lane.values[f.tap]), r), e).worst)
    limit = allowed(f.stage, UNIT[dtype], family)
    read = [a for a in ev.args if isinstance(a, np.ndarray) and a.dtype.kind == "f" and a.shape == e.shape]
    idle = any(distance(f.stage, a, e).worst <= limit for a in read)
    return f.error <= limit and (not idle or _holds(dtype, ev))
