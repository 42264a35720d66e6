"""Which runs the vectors are taken from, and what every stage of a run is given: numbers that no machine's roundings change.

The specification runs in float64; what its taps held is cut to a few bits, and the cut numbers are the inputs of the vectors.
Sums in another order, more threads or another processor's `exp` move a float64 number by 1e-15 of itself, and a cut moves with it
once in 10^9. Sums of numbers of few bits lie in the middle between two more often: so everything is moved by NUDGE first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.diff import Case, Trace
from refimpl.diff.fp8_taps import stored, with_codes
from refimpl.diff.lanes import Recorded
from refimpl.diff.precision import Precision, precision_of
from refimpl.diff.run import Run
from refimpl.layers import PRESETS
from refimpl.layers.fp8_parts import RECORDED
from refimpl.layers.numerics.formats import to_bf16
from refimpl.layers.stage import Call
from refimpl.record import new_case, trace_case
from refimpl.record.regimes import REGIMES

PLAIN = "plain"
"""The case without a regime."""
LENGTH = 8
"""Tokens a sequence, of two."""
BITS = 18
"""Significant bits of an input in float32: products of two still have to be rounded, and a near tie of 1e-5 stays one."""
NUDGE = 1 + 2.0**-40
"""What a float64 number is multiplied by before it is rounded: far more than its own roundings, far less than float32's."""
DTYPES = {"float32": "float32", "bfloat16": "bf16", "fp8": "fp8"}
"""dtype of the vectors -> precision plan."""
_CUT = ("fwd", "dec3", "dec7")
_STEP = {"mtp_weight": 0.3, "aux_weight": 1e-2, "gamma": 1e-3}
_ADAMW = {"lr": 2.2e-4, "max_norm": 1.0}


@dataclass(frozen=True)
class Phase:
    """A part of a run of which vectors are made: of which taps (by their beginnings), in which regimes and dtypes, and what
    `trace_case` is told.
    """

    id: str
    taps: tuple[str, ...]
    regimes: tuple[str, ...] = (PLAIN,)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def takes(self, call: Call, dtype: str) -> bool:
        """Whether a call of its run is one of its vectors: of a forward pass in FP8 those that are not bfloat16's."""
        here = call.tap.startswith(self.taps) or (self.id == "backward" and "loss" in call.tap)
        return here and (dtype != "fp8" or self.id != "forward" or call.own is not None)


PHASES = (
    Phase("forward", ("fwd/",), (PLAIN, *REGIMES)),
    Phase("chunk", ("dec3/",), (PLAIN, "offset", "padding"), ("float32", "bfloat16"), {"phases": _CUT}),
    Phase(
        "step", ("dec7/",), (PLAIN, "offset", "padding"), ("float32", "bfloat16"), {"phases": _CUT, "attend": "auto"}
    ),
    Phase("backward", ("bwd/", "grad/", "upd/"), (PLAIN,), tuple(DTYPES), {"training": _STEP}),
    Phase("update", ("upd/",), (PLAIN,), ("float32",), {"training": _STEP | {"optimizer": _ADAMW}}),
)
"""Prefill; its second half on a cache; one token on a cache, absorbed; losses, gradients and the bias; AdamW."""


def all_runs() -> dict[str, tuple[str, str, Phase]]:
    """regime/dtype/phase -> these, of every run that vectors are taken from, in order."""
    return {
        f"{regime}/{dtype}/{phase.id}": (regime, dtype, phase)
        for regime in PHASES[0].regimes
        for dtype in DTYPES
        for phase in PHASES
        if regime in phase.regimes and dtype in phase.dtypes
    }


@dataclass(frozen=True)
class Ground:
    """A run's program, what every call of it is given, and the dtype each tap is kept in."""

    program: list[Call]
    recorded: Recorded
    precision: Precision


def case_in(folder: Path, regime: str) -> Case:
    """A case of preset tiny with an MTP module, made in a folder unless it is there."""
    path = folder / regime
    if not (path / "tokens.json").is_file():
        new_case(path, PRESETS["tiny"], regimes="" if regime == PLAIN else regime, length=LENGTH, mtp=True)
    return Case.read(path)


def ground(case: Case, dtype: str, phase: Phase) -> Ground:
    """A run of the case in float64, its taps cut to a dtype."""
    exact = trace_case(case, precision="float64", **phase.settings)
    accumulate = {"storage": {"bf16": "bfloat16"}.get(DTYPES[dtype], DTYPES[dtype]), "accumulate": "float32"}
    header = replace(exact.header, precision=accumulate)
    found = _run(case, Trace(header, dict(exact.taps)))
    program, plan = found.program(case.config)[0], found.precision.plan
    taps = {c.tap: cut(exact.taps[c.tap], plan.format(c.stage)) for c in program if c.tap in exact.taps}
    if plan.gemms:
        taps |= _codes(with_codes(program, plan, ()), taps)
    found = _run(case, Trace(header, taps))
    comparison, program = found.comparison(case.config, frozenset())
    return Ground(program, comparison.recorded, found.precision)


def _run(case: Case, trace: Trace) -> Run:
    return Run(case, trace, precision_of(trace.header, trace.taps), {})


def _codes(program: list[Call], taps: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Scales and codes of what the products read, in float32."""
    held = {n: np.asarray(a, np.float32) for n, a in taps.items()}
    for call in program:
        if call.stage in RECORDED and all(n in held for n in call.args):
            held[call.tap] = call.of(*[held[n] for n in call.args], **call.static)
            yield call.tap, stored(call.stage, held[call.tap])


def cut(a: Array, fmt: str) -> Array:
    """Nearest numbers of a format: of `bf16` bfloat16's, of any other float32's of BITS significant bits; integers stay."""
    a = np.asarray(a)
    if a.dtype.kind != "f":
        return a
    a = a * NUDGE
    if fmt == "bf16":
        return to_bf16(a.astype(np.float32)).astype(ml_dtypes.bfloat16)
    mantissa, exponent = np.frexp(a)
    with np.errstate(under="ignore"):
        return np.ldexp(np.rint(np.ldexp(mantissa, BITS)), exponent - BITS).astype(np.float32)


def one_a_stage(program: list[Call], phase: Phase, dtype: str) -> dict[str, str]:
    """tap -> name of the calls that become vectors: of each stage the last one, of the main model if that has it."""
    found: dict[str, str] = {}
    for call in sorted((c for c in program if phase.takes(c, dtype)), key=lambda c: "/mtp" not in c.tap):
        found[call.tap.rpartition("/")[2] if call.stage in RECORDED else call.stage] = call.tap
    return {tap: name for name, tap in found.items()}
