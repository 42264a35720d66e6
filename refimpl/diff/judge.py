"""The verdict on a trace: gates (weights, inputs, coverage), then each recorded tap against replays of its stage.

On the same recorded inputs: E, the stage in float64; P, a family of our own twins at the precision in which the
candidate keeps the tap; X, the candidate. X may be about as far from E as the P are (`tolerance.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.precision import BF16, FLOAT64, Plan
from refimpl.layers.stage import Call
from refimpl.model import ForCausalLM, effective

from .case import Case
from .compare import Finding, compare, unusable
from .gates import Gate, coverage_gate, declared_plan, inputs_gate, self_check_gate, weights_gate
from .layouts import canonical
from .replay import Given, program_of, replay
from .tolerance import TWINS, nudge
from .trace import Trace

Verdict = Literal["CONFORMS", "DIVERGES", "INCONCLUSIVE"]
EXIT = {"CONFORMS": 0, "DIVERGES": 1, "INCONCLUSIVE": 2}


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
        return "INCONCLUSIVE" if "?" in states else "CONFORMS"

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
    attend = trace.header.layouts.get("mla", "expanded")
    program, reference = program_of(model, inputs, with_mtp=bool(model.n_mtp), attend=attend)
    result.gates += [coverage_gate(program, trace, reference), self_check_gate(trace.header)]
    plan = declared_plan(trace.header)
    taps, flawed = _admit(program, reference, trace, case)
    given = _Given(taps, weights, dict(inputs.named()))
    stored = {t: "bf16" if a.dtype.name == "bfloat16" else "fp32" for t, a in taps.items()}
    exact = replay(program, given.to(FLOAT64), FLOAT64, {})
    twins = [replay(program, given.to(plan, seed), plan, stored) for seed in range(TWINS)]
    for call, (_, e), *ours in zip(track(program), exact, *twins, strict=True):
        if call.tap in flawed:
            result.findings.append(Finding(call.tap, call.stage, False, np.inf, note=flawed[call.tap]))
        if call.tap in taps:
            chained = _aligned(call, taps, reference)
            result.findings.append(compare(call, taps[call.tap], e, [p for _, p in ours], chained))
    return result


def _admit(
    program: list[Call], reference: dict[str, Array], trace: Trace, case: Case
) -> tuple[dict[str, Array], dict[str, str]]:
    """The taps that a stage can be replayed on, in our layout; and for each of the others what is wrong with it."""
    taps, flawed, c = {}, {}, case.config
    limits = {"router.ids": c.n_routed_experts, "router.groups": c.n_group}
    for call in program:
        if call.tap in trace.taps:
            x, ours = np.asarray(trace.taps[call.tap]), reference[call.tap]
            note = unusable(x, ours, limits.get(call.stage))
            if note:
                flawed[call.tap] = note
                continue
            x = x.astype(np.int64) if ours.dtype.kind in "iu" else x
            taps[call.tap] = canonical(call.tap, x, trace.header.layouts, c)
    return taps, flawed


@dataclass(frozen=True)
class _Given:
    """What the candidate ran on: its recorded taps, the weights, the inputs."""

    taps: dict[str, Array]
    weights: dict[str, Array]
    inputs: dict[str, Array]

    def to(self, plan: Plan, seed: int = 0) -> Given:
        """Look-up by name in a plan's dtype, taps nudged by `seed`."""

        def find(name: str) -> Array | None:
            if name.startswith("w/"):
                return plan.weight(name, np.asarray(self.weights[name[2:]]))
            a = self.inputs.get(name, self.taps.get(name))
            return a if a is None or a.dtype.kind in "iub" else nudge(a.astype(plan.dtype), seed)

        return find


def _aligned(call: Call, taps: dict[str, Array], reference: dict[str, Array]) -> Array:
    """Our own run's tap for the chained view; routing weights go into the candidate's slots by expert id."""
    ours = reference[call.tap]
    ids = call.args[1] if call.stage == "router.weights" else None
    if ids not in taps:
        return ours
    slot = np.argsort(np.argsort(taps[ids], axis=-1), axis=-1)
    return np.take_along_axis(np.take_along_axis(ours, np.argsort(reference[ids], axis=-1), -1), slot, -1)


__all__ = ["EXIT", "Finding", "Judgement", "Verdict", "judge"]
