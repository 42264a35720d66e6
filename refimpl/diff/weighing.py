"""Two judgements of one trace under different readings: which of them explains what the other cannot.

A mistake elsewhere is blamed under both and speaks for neither. What is blamed under one alone speaks against it, but only if the
other reading brings the tap nearer: a tap that passes because what it is computed from is wrong, so that twins differ by as much
as it does, is not explained.
"""

from __future__ import annotations

from .compare import Finding
from .counting import LEFT
from .judgement import Judgement


def blamed(result: Judgement) -> set[str]:
    """The taps of the culprits."""
    return {f.tap for f in result.culprits}


def explains(gauge: str, under: Judgement, without: Judgement) -> bool:
    """Whether a gauge takes taps out of blame and puts none in: the judgement under it, and the one without."""
    return bool(without.blamed - blamed(under)) and not _against(gauge, under, without)


def _against(gauge: str, under: Judgement, without: Judgement) -> list[Finding]:
    """What is blamed under a gauge and right without, or there only because a tap is withdrawn that the gauge explains."""
    right = {f.tap: f for f in without.findings if f.ok and not f.open}
    withdrawn = without.withdrawn & set(under.gauges[gauge])
    again = {f.tap for f in without.culprits if withdrawn & set(f.region[:-1])}
    return [f for f in under.culprits if f.tap in again or (f.tap in right and right[f.tap].error < LEFT * f.error)]


def fewer(other: Judgement, result: Judgement) -> bool:
    """Whether another judgement blames only what this one blames, or knows in a gauge alone, and not all of it."""
    return blamed(other) < blamed(result).union(*result.gauges.values())


def far_less_off(other: Judgement, result: Judgement) -> bool:
    """Whether far less is off under another reading of the trace, of what it reads otherwise: what is as far off under both, to the
    bit, has to do with neither.
    """
    same = {(f.tap, f.error) for f in other.culprits} & {(f.tap, f.error) for f in result.culprits}
    beside = sum([min(1.0, error) for _, error in same])
    return other.off < result.off and other.off - beside <= LEFT * (result.off - beside)
