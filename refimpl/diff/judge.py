"""The verdict on a trace: gates (weights, inputs, coverage), then each recorded tap against a replay of its stage.

Three values per tap on the same recorded inputs: E, the stage in float64; P, our twin at the precision in which the
candidate keeps the tap; X, the candidate. X may be as far from E as FACTOR times P is, or a few roundings if that is
more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.precision import BF16, FLOAT32, FLOAT64, Plan
from refimpl.layers.stage import STAGES, Call
from refimpl.model import ForCausalLM
from refimpl.weights import effective

from .case import Case
from .gates import Gate, coverage_gate, inputs_gate, self_check_gate, weights_gate
from .layouts import canonical
from .replay import Given, program_of, replay
from .trace import Trace

Verdict = Literal["CONFORMS", "DIVERGES", "INCONCLUSIVE"]
EXIT = {"CONFORMS": 0, "DIVERGES": 1, "INCONCLUSIVE": 2}

FACTOR = 3.0
"""One twin stands for a family of admissible roundings; twelve innocent noisier ports stayed below 2.9 times its
error.
"""
ROUNDINGS = 4.0
"""No stage is asked to be better than this many units of roundoff: a twin that happens to round well proves nothing."""
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
"""Unit roundoff by the dtype that a tap is stored in."""
EXTRA = {
    "mla.rope_tables": (4.0, "x position: frequencies are themselves rounded, and pow errs by up to 2 units more"),
}
"""stage -> (further factor, its reason)."""


@dataclass(frozen=True)
class Finding:
    """One tap: its error against float64, the twin's, what was allowed, where it is worst."""

    tap: str
    stage: str
    ok: bool
    error: float
    twin: float
    allowed: float
    note: str = ""
    chained: float = float("nan")


@dataclass
class Judgement:
    """Gates, findings in model order, verdict."""

    gates: list[Gate] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    layouts: dict[str, str] = field(default_factory=dict)

    @property
    def culprits(self) -> list[Finding]:
        """Taps whose own stage, fed with the candidate's inputs, gives something else."""
        return [f for f in self.findings if not f.ok]

    @property
    def verdict(self) -> Verdict:
        """DIVERGES if a gate or a tap failed; INCONCLUSIVE if a gate could not decide or nothing was compared."""
        states = {g.state for g in self.gates}
        if self.culprits or "FAIL" in states:
            return "DIVERGES"
        return "INCONCLUSIVE" if "?" in states or not self.findings else "CONFORMS"

    @property
    def exit_code(self) -> int:
        """0 conforms, 1 diverges, 2 inconclusive (3, bad input, is a SpecError)."""
        return EXIT[self.verdict]


Track = Callable[[list[Call]], Iterable[Call]]
"""Shows progress through the program: returns an iterable of the same calls."""


def judge(case: Case, trace: Trace, *, track: Track = iter) -> Judgement:
    """Judge a candidate's trace of a case. SpecError if the two cannot be brought together at all."""
    result = Judgement(layouts=trace.header.layouts)
    result.gates.append(inputs_gate(case, trace))
    weights = case.weights()
    gate, rounded = weights_gate(weights, trace.header)
    result.gates.append(gate)
    if rounded:
        weights = effective(weights, BF16)
    model = ForCausalLM.from_weights(case.config, effective(weights, FLOAT64))
    inputs = model.inputs(case.tokens, case.positions, case.valid)
    with_mtp = any("/mtp" in tap for tap in trace.taps)
    attend = trace.header.layouts.get("mla", "expanded")
    program, reference = program_of(model, inputs, with_mtp=with_mtp, attend=attend)
    result.gates += [coverage_gate(program, trace, reference), self_check_gate(trace.header)]
    taps = {
        t: canonical(t, np.asarray(trace.taps[t]), trace.header.layouts, case.config)
        for t in reference
        if t in trace.taps
    }
    named = dict(inputs.named())
    twin = BF16 if trace.header.precision.get("storage") == "bfloat16" else FLOAT32
    exact = replay(program, _given(taps, weights, named, FLOAT64), FLOAT64, {})
    stored = {t: "bf16" if a.dtype.name == "bfloat16" else "fp32" for t, a in taps.items()}
    ours = replay(program, _given(taps, weights, named, twin), twin, stored)
    for call, (_, e), (_, p) in zip(track(program), exact, ours, strict=True):
        if call.tap in taps:
            result.findings.append(_compare(call, taps[call.tap], e, p, _aligned(call, taps, reference)))
    return result


def _aligned(call: Call, taps: dict[str, Array], reference: dict[str, Array]) -> Array:
    """Our own run's tap for the chained view; routing weights go into the candidate's slots by expert id."""
    ours = reference[call.tap]
    ids = call.args[1] if call.stage == "router.weights" else None
    if ids not in taps or taps[ids].shape != reference[ids].shape:
        return ours
    slot = np.argsort(np.argsort(taps[ids], axis=-1), axis=-1)
    return np.take_along_axis(np.take_along_axis(ours, np.argsort(reference[ids], axis=-1), -1), slot, -1)


def _given(taps: dict[str, Array], weights: dict[str, Array], inputs: dict[str, Array], plan: Plan) -> Given:
    def find(name: str) -> Array | None:
        if name.startswith("w/"):
            return plan.weight(name, np.asarray(weights[name[2:]]))
        a = inputs.get(name, taps.get(name))
        if a is None or a.dtype.kind in "iub":
            return a
        return a.astype(plan.dtype)

    return find


def _compare(call: Call, x: Array, e: Array, p: Array, chained: Array) -> Finding:
    stage = STAGES[call.stage]
    if x.shape != e.shape:
        return Finding(call.tap, call.stage, False, np.inf, 0.0, 0.0, f"shape {x.shape}, expected {e.shape}")
    if stage.compare == "set":
        return _compare_sets(call, x, e, chained)
    unit = UNIT.get(x.dtype.name, 0.0)
    x = x.astype(np.float64) if x.dtype.kind not in "iub" else x
    if stage.compare == "exact":
        wrong = int((x != e).sum())
        return Finding(
            call.tap, call.stage, not wrong, float(wrong), 0.0, 0.0, f"{wrong} of {x.size} differ" if wrong else ""
        )
    error, twin = _errors(x, e), _errors(p, e)
    extra, _ = EXTRA.get(call.stage, (1.0, ""))
    allowed = max(FACTOR * float(twin.max(initial=0)), ROUNDINGS * unit) * extra
    worst = float(error.max(initial=0))
    ok = worst <= allowed
    note = "" if ok else _describe(x, e, error)
    return Finding(
        call.tap,
        call.stage,
        ok,
        worst,
        float(twin.max(initial=0)),
        allowed,
        note,
        float(_errors(x, chained).max(initial=0)),
    )


def _errors(x: Array, e: Array) -> Array:
    """Relative distance per row (last axis), against the row's norm or a thousandth of the largest row's; NaN counts
    as inf.
    """
    x, e = np.atleast_1d(x).astype(np.float64), np.atleast_1d(e).astype(np.float64)
    masked = np.isneginf(e)
    x, e = np.where(masked, np.where(np.isneginf(x), 0, np.inf), x), np.where(masked, 0, e)
    with np.errstate(invalid="ignore"):
        distance, size = np.linalg.norm(x - e, axis=-1), np.linalg.norm(e, axis=-1)
    distance = np.where(np.isfinite(distance), distance, np.inf)
    return distance / np.maximum(np.maximum(size, 1e-3 * size.max(initial=0)), np.finfo(np.float64).tiny)


def _compare_sets(call: Call, x: Array, e: Array, chained: Array) -> Finding:
    wrong = (np.sort(x, axis=-1) != np.sort(e, axis=-1)).any(axis=-1)
    n, rows = int(wrong.sum()), wrong.size
    note = ""
    if n:
        first = tuple(np.argwhere(wrong)[0].tolist())
        theirs, expected = sorted(x[first].tolist()), sorted(e[first].tolist())
        note = f"{n} of {rows} tokens choose others, the first at {list(first)}: {theirs}, expected {expected}"
    flips = (np.sort(x, axis=-1) != np.sort(chained, axis=-1)).any(axis=-1).mean()
    return Finding(call.tap, call.stage, not n, n / rows, 0.0, 0.0, note, float(flips))


def _describe(x: Array, e: Array, error: Array) -> str:
    if not np.isfinite(x[np.isfinite(e)]).all():
        return f"{int((~np.isfinite(x)).sum())} elements are NaN or infinite"
    at = [int(i) for i in np.unravel_index(int(np.argmax(error)), error.shape)] if error.ndim else []
    bad = int((error > 0.1 * error.max()).sum())
    finite = np.isfinite(e) & np.isfinite(x)
    dot = float((x[finite] * e[finite]).sum())
    ratio = dot / max(float((e[finite] ** 2).sum()), 1e-300)
    residual = np.linalg.norm(x[finite] - ratio * e[finite]) / max(float(np.linalg.norm(e[finite])), 1e-300)
    fit = (
        f"; the candidate is {ratio:.4f} x ours (residual {residual:.1e})"
        if abs(ratio - 1) > 1e-3 and residual < 1e-3
        else ""
    )
    return f"worst row {at}, {bad} of {error.size} rows affected{fit}"


def explain(finding: Finding) -> str:
    """Why the allowed error is what it is."""
    _, reason = EXTRA.get(finding.stage, (1.0, ""))
    return f"max({FACTOR:g} x twin {finding.twin:.1e}, {ROUNDINGS:g} roundings)" + (f" {reason}" if reason else "")


__all__ = ["EXIT", "Finding", "Judgement", "Verdict", "explain", "judge"]
