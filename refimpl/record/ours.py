"""Our own trace of a case, in the format that other implementations write."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.diff import Case, Header, Trace, digest
from refimpl.layers.mla import Attend
from refimpl.layers.precision import Plan, plan
from refimpl.layers.stage import STAGES, Call, Patch, Recorder, observing
from refimpl.model import ForCausalLM, effective, introduce
from refimpl.version import __version__


def trace_case(
    case: Case,
    *,
    precision: str = "float32",
    taps: Iterable[str] = ("*",),
    attend: Attend = "expanded",
    patches: Iterable[Patch] = (),
) -> Trace:
    """Run the specification on a case and keep the taps that match; each is stored in the dtype its plan gives it.

    `patches` put known mistakes into stages, to see whether the diff finds them.
    """
    used, patterns = plan(precision), list(taps)
    held = effective(case.weights(), used)
    model = ForCausalLM.from_weights(case.config, held)
    inputs = model.inputs(case.tokens, case.positions, case.valid)
    recorder = introduce(Recorder(lambda tap: any(fnmatchcase(tap, p) for p in patterns)), model, inputs)
    with observing(*patches, used, recorder):
        model(inputs, attend=attend, with_mtp=bool(model.n_mtp), name="fwd")
    kept = [c for c in recorder.program if c.tap in recorder.taps]
    require(kept, f"no tap matches {', '.join(patterns)}")
    header = Header(
        config=case.raw_config,
        tokens=case.tokens,
        positions=case.positions,
        valid=case.valid,
        producer={"name": "refimpl", "version": __version__},
        weights={n: digest(w) for n, w in held.items()},
        precision={"storage": {"bf16": "bfloat16"}.get(precision, precision), "accumulate": np.dtype(used.dtype).name},
        layouts={"rope": "interleaved" if case.config.rope_interleave else "half", "mla": attend},
        dims={c.tap: STAGES[c.stage].shape for c in kept},
        expected=sorted(c.tap for c in kept),
    )
    return Trace(header, {c.tap: _stored(recorder.taps[c.tap], c, used) for c in kept})


def _stored(a: Array, call: Call, used: Plan) -> Array:
    bf16 = a.dtype.kind == "f" and used.format(call.stage) == "bf16"
    return np.ascontiguousarray(a.astype(ml_dtypes.bfloat16) if bf16 else a)
