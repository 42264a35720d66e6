"""Why a tap may be as far off as it may: the derivation of its tolerance, in words and numbers."""

from __future__ import annotations

from . import tolerance
from .comparison import Shown
from .fp8_rules import RULES
from .tolerance import CONSTANTS, EXTRA, FACTOR, FEW, LEAN, ROUNDINGS


def explained(shown: Shown, storage: str) -> list[str]:
    """Lines, in the order in which the limit is made."""
    f, u = shown.finding, shown.units
    if f.stage in RULES:
        return [f"{f.tap}: stage {f.stage}, declared storage {storage}", f"  allowed                {RULES[f.stage]}"]
    worst, lean = (max(getattr(t, name) for t in shown.twins) for name in ("worst", "lean"))
    inner = ", ".join(u.stages[:-1]) or "none: every input was recorded"
    extra, why = EXTRA.get(f.stage, (1.0, ""))
    floor, reason = tolerance.floor_of(f.stage)
    constant = any(s in CONSTANTS for s in u.stages)
    rows = min(t.rows for t in shown.twins)
    upright = tolerance.allowed_lean(u.stages, u.region, lean, rows)
    limit = tolerance.allowed(f.stage, u.own, worst)
    return [
        f"{f.tap}: stage {f.stage}, declared storage {storage}",
        f"  computed for it        {inner}",
        f"  roundoff u             {u.own:.2e} for the tap itself, {u.region:.2e} for the coarsest value computed for it",
        "  twins                  the stage on the candidate's inputs, each with other admissible roundings, against float64:",
        *[f"    twin {k}               worst row {t.worst:.2e}, lean {t.lean:.2e}" for k, t in enumerate(shown.twins)],
        f"  a row                  |x - e| / |e|, counted as at least {floor:g} of the largest: {reason}",
        f"  allowed, worst row     max({FACTOR:g} x {worst:.2e}, {ROUNDINGS:g} u) x {extra:g} = {limit:.2e}"
        + (f" ({why})" if why else ""),
        f"  allowed, lean          max({FACTOR:g} x {lean:.2e}, {LEAN * (2 if constant else 1):g} u"
        + (f" x (1 + 2 / sqrt({rows:.0f} rows))" if rows < FEW else "")
        + f") = {upright:.2e}",
        f"  the candidate          worst row {f.error:.2e}, lean {f.lean:.2e}: {'within' if f.ok else 'beyond'}",
    ]
