"""A dtype as the cause: taps that would be right were they, and what was computed for them, kept in a narrower one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.precision import FLOAT64, rounded
from refimpl.layers.stage import STAGES, Call

from .compare import Finding
from .corpus import Mutant
from .fp8_rules import RULES
from .hypothesis import REFUSED, given, rerun, seen, theirs
from .lanes import Lane, Recorded
from .padding import filled
from .supposed import as_ours
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
_SHORT = 48
"""Stages of a region of which each is tried alone."""


def narrower(blamed: list[Finding], calls: Mapping[str, Call], r: Recorded) -> str:
    """In words: the dtype in which blamed taps that nothing else explains would all be right, all that was computed for them or one
    stage alone; of float8 the taps themselves, which no declaration makes right. "" if there is none.
    """
    dtype, stage = _found(blamed, calls, r)
    what = f"{STAGES[stage].tap} is" if stage else "they are"
    if dtype == CODES:
        return f"every number of these taps is a {dtype}, the nearest to what it should be"
    return dtype and f"these taps conform if {what} computed in {dtype}: declare it if that is meant"


def _found(blamed: list[Finding], calls: Mapping[str, Call], r: Recorded) -> tuple[str, str]:
    """The dtype, and the stage that alone is computed in it.

    That twins err as much is not enough: a mistake may be as small. Rounding errors are known to the sign, and have to be those.
    """
    regions = {f.tap: [calls[t] for t in f.region] for f in blamed}
    if not blamed or any(c[-1].of.compare in ("exact", "set") or c[-1].stage in RULES for c in regions.values()):
        return "", ""
    if all(_codes(f, regions[f.tap], r) for f in blamed):
        return CODES, ""
    wide = [d for d in NARROW if all(_allows(d, f, regions[f.tap], r) for f in blamed)]
    off = {f.tap: _off(f, regions[f.tap], r) for f in blamed} if wide else {}

    def like(dtype: str, stage: str) -> float:
        return min(_like(dtype, stage, f, regions[f.tap], off[f.tap], r) for f in blamed)

    common = set.intersection(*[{c.stage for c in region if c.stage in STAGES} for region in regions.values()])
    few = common if max(map(len, regions.values())) <= _SHORT else ()
    for stages, least in (([""], LIKE), (sorted(few), ALONE)):
        found = {(d, stage): like(d, stage) for d in wide for stage in stages}
        if found and max(found.values()) >= least:
            return max(found, key=found.__getitem__)
    return "", ""


def _codes(f: Finding, region: list[Call], r: Recorded) -> bool:
    """Whether all numbers of a tap are float8 numbers, most of them those that are nearest to what float64 gives."""
    x = np.asarray(theirs(f.tap, r), np.float64)
    _, e = given(region, r)
    with np.errstate(all="ignore"):
        nearest = e.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        exact = np.array_equal(x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64), x)
    return exact and nearest.shape == x.shape and float((nearest == x).mean()) >= _MOST


def _off(f: Finding, region: list[Call], r: Recorded) -> Array:
    """By how much the candidate is off."""
    _, e = given(region, r)
    return np.asarray(filled(region[-1], as_ours(f.tap, theirs(f.tap, r), e, r), e, r.padding), np.float64) - e


def _like(dtype: str, stage: str, f: Finding, region: list[Call], off: Array, r: Recorded) -> float:
    """The cosine between what the candidate is off by and what a region is off by of which a stage, or all, rounds to a dtype; 1
    where each number is one of the dtype's.
    """
    x, best = theirs(f.tap, r), 0.0
    if not stage and np.array_equal(_ROUND[dtype](x), x, equal_nan=True):
        return 1.0
    _, e = given(region, r)
    for reads, gives in _WAYS:
        narrow = {c.stage: _rounding(c.of.fn, dtype, reads, gives) for c in region if stage in ("", c.stage)}
        first, ours = next(iter(narrow)), np.zeros(())
        with np.errstate(all="ignore"), contextlib.suppress(*REFUSED):
            ours = rerun(region, r, Mutant("", "", first, narrow[first], also=narrow)) - e
        if ours.shape != off.shape or ours.dtype.kind != "f":  # a gradient, which is made of what lies on the tape
            continue
        both = np.isfinite(ours) & np.isfinite(off)
        a, b = ours[both], off[both]
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


def _allows(dtype: str, f: Finding, region: list[Call], r: Recorded) -> bool:
    """Whether twins of the region in that dtype err as much, and the candidate does so in most rows, as a dtype spares none."""
    narrow = replace(r, noise=Noise(lambda tap: UNIT[dtype], lambda call: "fp32"))
    exact, family = Lane(FLOAT64), 0.0
    for call in region:
        exact.values[call.tap] = exact.run(call, r)
        if call.tap in r.partial and call is not region[-1]:
            exact.overlay(call, r)
    e = seen(f.tap, np.asarray(exact.values[f.tap]), r)
    x = theirs(f.tap, r)
    x = filled(region[-1], x, e, r.padding)
    if np.median(row_errors(f.stage, x, e)) <= f.allowed:
        return False
    for k in range(1, TWINS):
        lane = Lane(r.plan, k)
        for call in region:
            lane.values[call.tap] = narrow.noise.inner(call, lane.run(call, narrow), k)
            if call.tap in r.partial and call is not region[-1]:
                lane.overlay(call, narrow)
        family = max(family, distance(f.stage, seen(f.tap, np.asarray(lane.values[f.tap]), r), e).worst)
    return f.error <= allowed(f.stage, UNIT[dtype], family)
