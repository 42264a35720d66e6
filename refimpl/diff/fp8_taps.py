"""Codes and scales of what an FP8 run multiplies: for every quantised product `T` of its plan the taps `T.act.scale` and `T.act.q`.

Scales are those of 1 x 128 tiles of the product's input, codes are read as the E4M3 numbers that they stand for. A product whose
codes and scales were both recorded is replayed on them, so that it is held to its own arithmetic and not blamed for theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import ml_dtypes
import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.fp8 import Fp8
from refimpl.layers.fp8_parts import CODES, SCALE, TILE, codes_of, on_codes, scales_of
from refimpl.layers.numerics.formats import E4M3, decode, encode
from refimpl.layers.precision import Plan
from refimpl.layers.stage import Call, Stage

from .program import names
from .trace import Trace


def products(program: Iterable[Call], plan: Plan) -> list[Call]:
    """The calls of which the plan quantises the input: those that meet a weight in an FP8 kernel."""
    return [
        call
        for call in program
        if call.own is None
        and isinstance(plan.kernel(call.stage), Fp8)
        and any(n.startswith("w/") for n in names(call.args))
    ]


def has_codes(taps: Iterable[str]) -> bool:
    """Whether any of these names is that of codes or scales."""
    return any(t.endswith((f".{SCALE}", f".{CODES}")) for t in taps)


def with_codes(program: list[Call], plan: Plan, recorded: Collection[str]) -> list[Call]:
    """The program with a call for the scales and one for the codes before every quantised product; the product reads them where
    both are among the recorded.
    """
    quantised, calls = {c.tap for c in products(program, plan)}, {c.tap: c for c in program}
    found: list[Call] = []
    for call in program:
        if call.tap in quantised:
            kernel = plan.kernel(call.stage)
            assert isinstance(kernel, Fp8)
            scale, codes = act = _act(call, calls[call.args[0]].of, kernel)
            found += act
            if scale.tap in recorded and codes.tap in recorded:
                call = _on_codes(call, scale, codes)
        found.append(call)
    return found


def _act(call: Call, source: Stage, kernel: Fp8) -> tuple[Call, Call]:
    """The calls for the scales and the codes of a product's input, which `source` gives."""
    axes = source.shape.split()
    lead = 1 if axes[0] == "M" else 2
    tiles = " ".join([*axes[:lead], f"{'*'.join(axes[lead:])}/{TILE}"])
    settings = {"how": kernel, "lead": lead}
    scale, codes = f"{call.tap}.{SCALE}", f"{call.tap}.{CODES}"
    what = f"of the input of {call.stage}"  # letters count as they do at that input's tap
    s = Stage(SCALE, scales_of, f"scales {what}", "R 3.3.2", "value", tiles, source.tap)
    q = Stage(CODES, codes_of, f"codes {what}", "R 3.3.2", "value", source.shape, source.tap)
    x = call.args[0]
    return Call(SCALE, scale, (x,), settings, s), Call(CODES, codes, (x, scale), settings, q)


def _on_codes(call: Call, scale: Call, codes: Call) -> Call:
    own = replace(call.of, fn=on_codes(call.stage))
    return replace(call, args=(codes.tap, scale.tap, *call.args[1:]), static=call.static | codes.static, own=own)


# ---- As they lie in a trace


def stored(stage: str, a: Array) -> Array:
    """Codes as float8_e4m3fn, scales as float32."""
    return (
        encode(a, E4M3, overflow="saturate").view(ml_dtypes.float8_e4m3fn) if stage == CODES else a.astype(np.float32)
    )


def decoded(trace: Trace) -> Trace:
    """The trace with codes (float8_e4m3fn, or bytes) and scales (float32, E8M0, or E8M0's bytes) as float32 numbers."""
    if not has_codes(trace.taps):
        return trace
    return Trace(trace.header, {t: _number(t, trace.taps[t]) for t in trace.taps})


def _number(tap: str, a: Array) -> Array:
    if tap.endswith(f".{CODES}") and a.dtype.name in ("float8_e4m3fn", "uint8", "int8"):
        return decode(np.ascontiguousarray(a).view(np.uint8), E4M3)
    if tap.endswith(f".{SCALE}") and a.dtype.name in ("float8_e8m0fnu", "uint8"):
        codes = np.ascontiguousarray(a).view(np.uint8).astype(np.int64)
        return np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127)).astype(np.float32)
    return a
