"""How a vector is judged: the diff's tolerance for its stage, its dtype and its inputs, as numbers that any reader can apply."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.diff import tolerance
from refimpl.diff.compare import Units
from refimpl.diff.fp8_rules import QUOTIENT
from refimpl.diff.replay import Step
from refimpl.layers.fp8_parts import CODES, SCALE, quotient, rows_of, spread, to_e4m3
from refimpl.layers.stage import Stage

STORED = 2.0**-24
"""What storing the expected numbers as float32 adds."""


def kind_of(stage: Stage) -> str:
    """value: rows by their norms; set: rows without an order; same: every number; each: every number, to a share of itself."""
    special = {SCALE: "each", CODES: "same"}
    return special.get(stage.name) or {"exact": "same", "set": "set"}.get(stage.compare, "value")


def limits(step: Step, units: Units) -> dict[str, Any]:
    """kind, limit and what else the kind needs."""
    kind = kind_of(step.call.of)
    if kind == "each":
        return {"kind": kind, "limit": 0.0 if step.call.static["how"].inputs.power_of_two else QUOTIENT}
    if kind in ("set", "same"):
        return {"kind": kind, "limit": _undecided(step) if step.call.stage == CODES else 0}
    stage, family, leans = step.call.stage, 0.0, 0.0
    for twin in step.twins():
        its = tolerance.distance(stage, twin, step.e)
        family, leans = max(family, its.worst), max(leans, its.lean)
    return {
        "kind": kind,
        "limit": rounded_up(tolerance.allowed(stage, units.own, family) + STORED),
        "lean": rounded_up(tolerance.allowed_lean(units.stages, units.region, leans) + STORED),
        "floor": tolerance.floor_of(stage)[0],
    }


def _undecided(step: Step) -> int:
    """How many codes four roundings of x / s could make others."""
    x, s = (np.asarray(a, np.float64) for a in next(step.inputs()))
    rows = rows_of(x, step.call.static["lead"])
    by = np.zeros(()) if step.call.static["how"].inputs.power_of_two else QUOTIENT
    v = quotient(rows, spread(s, rows.shape[-1]))
    low, high = to_e4m3(v * (1 - by)), to_e4m3(v * (1 + by))
    return int((low != high).sum())


def rounded_up(x: float) -> float:
    """To one digit: twins add up in float32, so another processor's are not quite the same."""
    power = 10.0 ** math.floor(math.log10(x))
    return float(f"{math.ceil(x / power) * power:.0e}")
