"""Our own trace of a case, in the format that other implementations write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array, Parameter, Tensor, backward, data_of
from refimpl.diff import Case, Header, Trace, digest
from refimpl.diff.fp8_taps import stored, with_codes
from refimpl.diff.gradients import backward_of, gradient_name
from refimpl.diff.optimizer import Inputs, Optimizer, stepped_by
from refimpl.diff.training import PHASES, Training, read_training
from refimpl.layers import adamw
from refimpl.layers.fp8_parts import RECORDED
from refimpl.layers.mla import Attend
from refimpl.layers.module import is_buffer
from refimpl.layers.numerics.formats import to_bf16
from refimpl.layers.precision import Plan, plan
from refimpl.layers.router import bias_update, counts
from refimpl.layers.stage import Call, Patch, Recorder, observing, phase, unit
from refimpl.model import ForCausalLM, Output, effective
from refimpl.model.phases import Part, parts_of, run_parts
from refimpl.version import __version__


def trace_case(
    case: Case,
    *,
    precision: str = "float32",
    taps: Iterable[str] = ("*",),
    attend: Attend = "expanded",
    phases: Iterable[str] = ("fwd",),
    training: Mapping[str, Any] | None = None,
    patches: Iterable[Patch] = (),
) -> Trace:
    """Run the specification on a case and keep the taps that match; each is stored in the dtype its plan gives it.

    `phases` cut the run: `fwd, dec20, dec21` is a prefill of 20 tokens, then one token at a time. `training` is what the header
    says of a step (`mtp_weight`, `aux_weight`, `gamma`, `labels`): its losses, gradients and update are recorded too. `patches`
    put known mistakes into stages, to see whether the diff finds them.
    """
    used, patterns, listed = plan(precision), list(taps), list(phases)
    held, t = effective(case.weights(), used), None if training is None else read_training(training)
    with observing(*patches, used):
        parts = parts_of(listed, len(case.tokens[0]), attend)
        found, program = _run(case, held, parts, t, ["*"] if used.gemms else patterns)
    with observing(*patches):
        program = _completed(program, found, used, t.optimizer if t else None, case)
    kept = [c for c in program if c.tap in found and any(fnmatchcase(c.tap, p) for p in patterns)]
    require(kept, f"no tap matches {', '.join(patterns)}")
    header = Header(
        config=case.raw_config,
        tokens=case.tokens,
        positions=case.positions,
        valid=case.valid,
        producer={"name": "refimpl", "version": __version__},
        weights={n: digest(w) for n, w in held.items()},
        precision={"storage": {"bf16": "bfloat16"}.get(precision, precision), "accumulate": np.dtype(used.dtype).name},
        phases=listed if t is None else [*listed, *PHASES],
        layouts={"rope": "interleaved" if case.config.rope_interleave else "half", "mla": attend},
        dims={c.tap: c.of.shape for c in kept if c.own is None},
        training=dict(training or {}),
        expected=sorted(c.tap for c in kept),
    )
    return Trace(header, {c.tap: _stored(found[c.tap], c, used) for c in kept})


def _run(
    case: Case, held: dict[str, Array], parts: Sequence[Part], t: Training | None, patterns: list[str]
) -> tuple[dict[str, Array], list[Call]]:
    """What every tap that matches held, or every one if it is trained on; and the program."""
    model = ForCausalLM.from_weights(case.config, held)
    model = model.with_gradients() if t else model
    labels = t.targets(case.tokens, case.valid) if t else None
    inputs = model.inputs(case.tokens, case.positions, case.valid, labels=labels)
    recorder = Recorder(lambda tap: bool(t) or any(fnmatchcase(tap, p) for p in patterns))
    with observing(recorder):
        out = run_parts(model, inputs, parts, recorder, with_mtp=bool(model.n_mtp), losses=t.losses if t else None)
        if t:
            _update(model, out, t)
    found, program = {n: data_of(a) for n, a in recorder.taps.items()}, list(recorder.program)
    if t:
        found |= _gradients(model, recorder, out.loss)
        program += backward_of(program, {n: w.shape for n, w in held.items() if not is_buffer(n)})
    return found, program


def _completed(program: list[Call], found: dict[str, Array], used: Plan, o: Optimizer | None, case: Case) -> list[Call]:
    """The program with codes and the optimiser's step, where there are such."""
    program = _codes(program, found, used) if used.gemms else program
    return program + (_stepped(program, found, o, case, used.dtype) if o else [])


def _codes(program: list[Call], found: dict[str, Array], used: Plan) -> list[Call]:
    """The program with what its FP8 products read, which is added to what was found."""
    program = with_codes(program, used, ())
    for call in [c for c in program if c.stage in RECORDED]:
        found[call.tap] = call.of(*[found[n] for n in call.args], **call.static)
    return program


def _stepped(program: list[Call], found: dict[str, Array], o: Optimizer, case: Case, dtype: Any) -> list[Call]:
    """The calls of the optimiser's step, which is added to what was found. Before a later step than the first, moments are 0."""
    calls, masters = stepped_by(program, o), Inputs(found, case.checkpoint, o.masters)
    for call in calls:
        args = [None if n is None else masters[n].astype(dtype, copy=False) for n in call.args]
        out = np.zeros_like(args[0]) if call.stage == adamw.before.name else call.of(*args, **call.static)
        kept = next((s for pattern, s in o.storage().items() if fnmatchcase(call.tap, pattern)), "float32")
        found[call.tap] = to_bf16(out) if kept == "bfloat16" else out.astype(dtype)
    return calls


def _gradients(model: ForCausalLM, recorder: Recorder, loss: Any) -> dict[str, Array]:
    """Of every tap and weight, from one tape over the whole run."""
    inner = {gradient_name(tap): a for tap, a in recorder.taps.items() if isinstance(a, Tensor)}
    grads = backward(loss, keep=inner.values())
    leaves = {f"grad/{n}": w for n, w in model.named_weights() if isinstance(w, Parameter)}
    return {n: grads[a] for n, a in (inner | leaves).items() if a in grads}


def _update(model: ForCausalLM, out: Output, t: Training) -> None:
    """The bias after the step; what is observed is recorded."""
    c, weights = model.config, dict(model.named_weights())
    for place, routing in out.routing.items():
        bias = weights.get(f"model.layers.{place[1:]}.mlp.gate.e_score_correction_bias")
        if bias is not None and t.gamma:
            with phase("upd"), unit(place):
                load = counts(routing.ids, n_experts=c.n_routed_experts)
                bias_update(bias, load, gamma=t.gamma, zero_sum=c.dialect.bias_update == "zero_sum")


def _stored(a: Array, call: Call, used: Plan) -> Array:
    if call.stage in RECORDED:
        return stored(call.stage, a)
    wide = call.stage.startswith("grad/")  # accumulated in float32 (R 3.3.3)
    bf16 = a.dtype.kind == "f" and used.format(call.stage) == "bf16" and not wide
    return np.ascontiguousarray(a.astype(ml_dtypes.bfloat16) if bf16 else a)
