"""A case with the candidate's own weights in place of its own, so that a run is judged apart from the conversion."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import cast

from refimpl.checkpoint import Checkpoint
from refimpl.diff import Case, Trace, digest
from refimpl.diff.gates import Gate, weights_gate
from refimpl.diff.precision import precision_of

from .containers import open_weights
from .holding import held_against
from .summary import experts_told


def under(case: Case, trace: Trace, path: str | Path) -> tuple[Case, Trace, Gate]:
    """(the case with the candidate's weights, the trace, a gate that says how those weights relate to the case's). The gate fails
    for anything but rounding and MTP modules left out.

    A trace that declares the case's own weights, as an engine does that quantises what it is given, is taken to have run on these.
    """
    own = case.checkpoint
    case, gate = with_weights(case, path)
    if weights_gate(own, trace.header, precision_of(trace.header, trace.taps).storage)[0].state == "ok":
        declared = {n: digest(case.checkpoint[n]) for n in case.checkpoint}
        trace = replace(trace, header=replace(trace.header, weights=declared))
        gate = replace(gate, text=gate.text + "; the trace declares the case's")
    return case, trace, gate


def with_weights(case: Case, path: str | Path) -> tuple[Case, Gate]:
    """(the case with the effective weights of a file, the gate that says how they relate to the case's)."""
    held = open_weights(path, case.config)
    found = experts_told(list(held_against(case.checkpoint, case.config, held)), case.config)
    bad = [f for f in found if not f.ok]
    counts = ", ".join(f"{n} {status}" for status, n in Counter(f.status for f in found).most_common())
    text = f"{held.container} against the case: {counts}" + (
        f"; {bad[0].name}: {bad[0].status} {bad[0].how}" if bad else ""
    )
    gate = Gate("converted", "FAIL" if bad else "ok", text, tuple(f.name for f in bad))
    held_by = cast(Checkpoint, held.only(case.checkpoint))  # shapes, rows and arrays are all that judging asks of it
    return replace(case, checkpoint=held_by), gate
