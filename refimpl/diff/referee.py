"""Two implementations disagree about a case: a third opinion, which of them left the specification and where they part."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refimpl.autograd.tensor import Array

from .case import Case
from .judge import Judgement, judge
from .report import summary
from .trace import Trace

_APART = 1e-3
"""Two recordings differ visibly at a tap from this relative distance on."""


def referee(case: Case, first: Trace, second: Trace, names: tuple[str, str]) -> tuple[list[str], int]:
    """Lines of a report, and an exit code: 0 if both conform, 1 if one diverges, 2 if neither does and one is inconclusive."""
    judged = [judge(case, t) for t in (first, second)]
    lines = [line for name, j in zip(names, judged, strict=True) for line in _one(name, j)]
    lines += ["", _parting([f.tap for f in judged[0].findings], first, second), _finding(names, judged)]
    codes = [j.exit_code for j in judged]
    return lines, 1 if 1 in codes else max(codes)


def _one(name: str, j: Judgement) -> Iterator[str]:
    yield f"{name}: {summary(j)}"
    yield from (f"  {d.said}: {', '.join(d.taps[:3])}" for d in j.causes[:3] if j.culprits)


def _parting(order: list[str], first: Trace, second: Trace) -> str:
    """Where the recordings are first visibly apart, among the taps that both have in the same arrangement."""
    for tap in order:
        a, b = (np.asarray(t.taps[tap]) if tap in t.taps else None for t in (first, second))
        if a is not None and b is not None and a.shape == b.shape and _distance(a, b) > _APART:
            return f"the two are first visibly apart at {tap}"
    return "the two are nowhere visibly apart where both were recorded"


def _distance(a: Array, b: Array) -> float:
    a, b = (np.nan_to_num(x.astype(np.float64), neginf=0.0, posinf=0.0) for x in (a, b))
    return float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-300)


def _finding(names: tuple[str, str], judged: list[Judgement]) -> str:
    wrong = [name for name, j in zip(names, judged, strict=True) if j.exit_code == 1]
    if len(wrong) == 2:
        return "both leave the specification"
    if wrong:
        return f"{wrong[0]} leaves the specification, the other does not"
    return "neither leaves the specification where it was recorded"
