"""Codes and scales of what an FP8 run multiplies: for every quantised product `T` of its plan the taps `T.act.scale` and `T.act.q`.

Scales are those of 1 x 128 tiles of the product's input, codes are read as the E4M3 numbers that they stand for. A product whose
codes and scales were both recorded is replayed on them, so that it is held to its own arithmetic and not blamed for theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import SpecError
from refimpl.autograd.expert_ops import expert_spans
from refimpl.autograd.tensor import Array
from refimpl.layers.fp8 import BLOCK, ROW, Fp8
from refimpl.layers.gemm import Plain, using
from refimpl.layers.numerics.formats import E4M3, decode, encode
from refimpl.layers.numerics.quantisation import Dialect, Quantized, quantize
from refimpl.layers.numerics.quantisation.quantise import tile_scales
from refimpl.layers.precision import Plan
from refimpl.layers.stage import STAGES, Call, Stage

from .program import names
from .trace import Trace

SCALE, CODES = RECORDED = ("act.scale", "act.q")
TILE = ROW[1]


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


# ---- The three stages. float64: real numbers; float32: as the kernel computes them.


def rows_of(x: Array, lead: int) -> Array:
    """x (..., D, ...) with the axes that a product sums over as one."""
    return x.reshape(*x.shape[:lead], -1)


def tiles_of(rows: Array) -> Array:
    """rows (..., K) cut into tiles, the ragged one filled with zeros: (..., ceil(K/128), 128)."""
    width = [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % TILE)]
    return np.pad(rows, width).reshape(*rows.shape[:-1], -1, TILE)


def spread(s: Array, width: int) -> Array:
    """One number a tile (..., ceil(K/128)) as one an element (..., K)."""
    return np.repeat(s, TILE, axis=-1)[..., :width]


def exact_scales(amax: Array, how: Dialect, floor: float | None, by: Array | float = 1.0) -> Array:
    """s = max(amax, floor) / 448 in real numbers (times `by`), rounded up to a power of two if the dialect says so; without a
    floor the scale of zeros is 1.  amax (...) -> (...)
    """
    a = np.where(amax == 0, E4M3.max, amax) if floor is None else np.maximum(amax, floor)
    s = a / E4M3.max * by
    return power_of_two_above(s) if how.power_of_two else s


def power_of_two_above(s: Array) -> Array:
    """2^ceil(log2 s), exactly; s that is not finite stays as it is."""
    mantissa, exponent = np.frexp(s)
    return np.where(np.isfinite(s), np.ldexp(1.0, exponent - (mantissa == 0.5)), s)


def scales_of(x: Array, *, how: Fp8, lead: int) -> Array:
    """s = max(amax, 1e-4) / 448 of each tile, NaN where it holds NaN or Inf.  x (B, S, D) -> (B, S, ceil(D/128))"""
    rows = rows_of(x, lead)
    amax = np.abs(tiles_of(rows)).max(axis=-1)
    if rows.dtype == np.float64:
        s = exact_scales(amax, how.inputs, how.inputs.clamp)
    else:
        s = tile_scales(np.where(np.isfinite(rows), rows, 0), ROW, dialect=how.inputs)
    return np.where(np.isfinite(amax), s, np.asarray(np.nan, s.dtype))


def codes_of(x: Array, s: Array, *, how: Fp8, lead: int) -> Array:
    """The E4M3 number nearest to x / s, 0 where x is 0.  x (B, S, D), s (B, S, ceil(D/128)) -> (B, S, D)"""
    rows = rows_of(x, lead)
    return to_e4m3(quotient(rows, spread(s, rows.shape[-1]))).astype(x.dtype).reshape(x.shape)


def quotient(x: Array, s: Array) -> Array:
    """x / s, and 0 / s = 0 whatever s is."""
    return np.where(x == 0, x, x / np.where(x == 0, 1, s))


def to_e4m3(v: Array) -> Array:
    """The nearest E4M3 numbers, ties to even, saturated.  v (...) -> (...) float32"""
    return decode(encode(v, E4M3, overflow="saturate"), E4M3)


def on_codes(stage: str) -> Callable[..., Array]:
    """A product's stage on codes and scales in the place of its input."""
    return partial(_multiplied, STAGES[stage].fn)


def _multiplied(
    fn: Callable[..., Array], codes: Array, s: Array, *rest: Any, how: Fp8, lead: int, **static: Any
) -> Array:
    """y = (codes s) wT, w in E4M3 too.  codes (B, S, D), s (B, S, ceil(D/128)), w (F, D) -> (B, S, F)"""
    rows = rows_of(codes, lead)
    kernel = _OnCodes(rows.reshape(-1, rows.shape[-1]), s.reshape(-1, s.shape[-1]), how)
    with using(kernel):
        return fn(codes, *rest, **static)


class _OnCodes(Plain):
    """A kernel that multiplies these codes and scales, whatever input it is given.  codes (N, K), s (N, ceil(K/128))"""

    def __init__(self, codes: Array, s: Array, how: Fp8) -> None:
        self.codes, self.s, self.how = codes, s, how

    def linear(self, x: Array, w: Array, b: Array | None = None) -> Array:  # type: ignore[override]
        """y = x wT (+ b)."""
        y = self._product(slice(None), w).reshape(*x.shape[:-1], len(w))
        return y if b is None else y + b

    def grouped_linear(self, rows: Array, ids: Array, *ws: Array) -> Array:  # type: ignore[override]
        """y[m] = rows[m] w_e(m)T."""
        y = np.zeros((len(rows), len(ws[0])), rows.dtype)
        for span, w in zip(expert_spans(ids, len(ws)), ws, strict=True):
            if span.start < span.stop:
                y[span] = self._product(span, w)
        return y

    def _product(self, rows: slice, w: Array) -> Array:
        codes, s = self.codes[rows], self.s[rows]
        weights = quantize(w.astype(np.float32), BLOCK, dialect=self.how.weights, name="w")
        if codes.dtype == np.float32:
            try:
                given = Quantized(encode(codes, E4M3, overflow="saturate"), s.astype(np.float32), ROW)
                return self.how.product(given, weights)
            except SpecError:  # a candidate's scale may be 0 or NaN: then its product is, too
                pass
        blocks = spread(np.repeat(weights.scales, BLOCK[0], axis=0)[: len(w)], w.shape[1])
        return (codes * spread(s, w.shape[1])) @ (decode(weights.codes, E4M3) * blocks.astype(codes.dtype)).T


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
    return Trace(trace.header, {t: _number(t, a) for t, a in _all(trace)})


def _all(trace: Trace) -> Iterator[tuple[str, Array]]:
    yield from ((t, trace.taps[t]) for t in trace.taps)


def _number(tap: str, a: Array) -> Array:
    a = np.asarray(a) if tap.endswith((CODES, SCALE)) else a
    if tap.endswith(f".{CODES}") and a.dtype.name in ("float8_e4m3fn", "uint8", "int8"):
        return decode(np.ascontiguousarray(a).view(np.uint8), E4M3)
    if tap.endswith(f".{SCALE}") and a.dtype.name in ("float8_e8m0fnu", "uint8"):
        codes = np.ascontiguousarray(a).view(np.uint8).astype(np.int64)
        return np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127)).astype(np.float32)
    return a
