"""Rung 3: every stage alone, on exact inputs, so that nothing wrong before it hides it.

The inputs are those of our own run of a case, kept in the precision that the implementation declares; the limit is the diff's
(`refimpl.diff.tolerance`): how far twins of the stage at that precision are from float64 on the same inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError
from refimpl.diff import Case
from refimpl.diff.compare import Finding, Units, compare, unusable
from refimpl.diff.gauges import alternatives
from refimpl.diff.grounds import Grounds
from refimpl.diff.judge import judge
from refimpl.diff.lanes import Lane, Recorded
from refimpl.diff.precision import declared_precision
from refimpl.diff.program import integers
from refimpl.diff.replay import Step, replay
from refimpl.diff.wide import with_infinity
from refimpl.layers.precision import Plan
from refimpl.layers.rope import RopeScaling
from refimpl.layers.stage import Call, Stage
from refimpl.record import trace_case

from .process import Lacking
from .subject import Subject

_OURS = ("dtype", "kernel")
"""Settings that say how we compute, not what."""


def ground(case: Case, precision: Mapping[str, str]) -> Grounds:
    """Our own run of a case at a declared precision, with all that is needed to run its stages again."""
    found = judge(case, trace_case(case, precision=declared_precision(precision).plan.name)).grounds
    assert found is not None
    return found


def stage_findings(of: Subject, g: Grounds) -> dict[str, list[Finding | Lacking]]:
    """stage -> the implementation's output of each of its calls, judged."""
    found: dict[str, list[Finding | Lacking]] = {}
    for step in replay(g.program, g.recorded):
        unit = g.precision.unit(step.call.tap)
        found.setdefault(step.call.stage, []).append(_judged(of, step, g, Units(unit, unit, (step.call.stage,))))
    return found


def _judged(of: Subject, step: Step, g: Grounds, units: Units) -> Finding | Lacking:
    call = step.call
    inputs, params = arguments(call, g.recorded)
    try:
        x = of.stage(call.stage, inputs, params)
    except Lacking as lacking:
        return lacking
    except SpecError as error:
        return Finding(call.tap, call.stage, False, np.inf, note=str(error))
    limits = {"router.ids": g.config.n_routed_experts, "router.groups": g.config.n_group}
    flaw = unusable(x, integers(call.of), limits.get(call.stage))
    if x.shape != step.exact.shape:
        flaw = flaw or f"shape {x.shape}, expected {step.exact.shape}"
    if flaw:
        return Finding(call.tap, call.stage, False, np.inf, note=flaw)
    if call.stage == "mask":
        x = with_infinity(x)
    found = compare(step, x, units, {})
    others = [] if found.ok or call.of.compare != "gauge" else alternatives(call, x, step.exact, g.config)
    return next((f for _, other in others if (f := compare(step, other, units, {})).ok), found)


def arguments(call: Call, r: Recorded, plan: Plan | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `stage(name, inputs, params)` is asked with for a call of the program, as a plan (the run's) holds it."""
    lane = Lane(plan or r.plan)
    return named_arguments(call.of, [lane.value(a, call, r) for a in call.args], call.static)


def named_arguments(stage: Stage, given: list[Any], static: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays by the names of the stage's own arguments (a list for a starred one), and its settings, of plain types."""
    inputs: dict[str, Any] = {}
    for p in inspect.signature(stage.fn).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            inputs[p.name], given = given, []
        elif p.kind is p.POSITIONAL_OR_KEYWORD and given:
            inputs[p.name] = given.pop(0)
    settings = {k: v for k, v in static.items() if k not in _OURS}
    return inputs, {k: v.to_dict() if isinstance(v, RopeScaling) else v for k, v in settings.items()}


__all__ = ["arguments", "ground", "named_arguments", "stage_findings"]
