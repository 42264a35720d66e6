"""A dtype as the cause: taps that would be right were they, and what was computed for them, kept in a narrower one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from refimpl.layers.precision import FLOAT64
from refimpl.layers.stage import Call

from .compare import Finding
from .fp8_rules import RULES
from .hypothesis import seen, theirs
from .lanes import Lane, Recorded
from .padding import filled
from .tolerance import TWINS, UNIT, Noise, allowed, distance, row_errors

NARROW = ("float16", "bfloat16")
"""Dtypes in which a part of a float32 run may have been computed, if nothing else explains it."""


def narrower(blamed: list[Finding], calls: Mapping[str, Call], r: Recorded) -> str:
    """The dtype in which blamed taps that nothing else explains would all be right, "" if there is none: that whose twins err most
    nearly as the candidate does, since a coarse one allows what a finer one does.
    """
    shares = {d: [_share(d, f, [calls[t] for t in f.region], r) for f in blamed] for d in NARROW if blamed}
    fits = {d: abs(float(np.mean(np.log(all_)))) for d, all_ in shares.items() if all(all_)}
    return min(fits, key=fits.__getitem__, default="")


def _share(dtype: str, f: Finding, region: list[Call], r: Recorded) -> float:
    """The candidate's error over that of twins of the region in that dtype; 0 if it is no rounding of theirs: more than is allowed,
    or none in most rows, as a dtype spares none.
    """
    if region[-1].of.compare in ("exact", "set") or f.stage in RULES:
        return 0.0
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
        return 0.0
    for k in range(1, TWINS):
        lane = Lane(r.plan, k)
        for call in region:
            lane.values[call.tap] = narrow.noise.inner(call, lane.run(call, narrow), k)
            if call.tap in r.partial and call is not region[-1]:
                lane.overlay(call, narrow)
        family = max(family, distance(f.stage, seen(f.tap, np.asarray(lane.values[f.tap]), r), e).worst)
    return f.error / family if family and f.error <= allowed(f.stage, UNIT[dtype], family) else 0.0
