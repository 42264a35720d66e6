"""An FP8 product taken apart (R 3.3.2): scales of its input's tiles, codes, and the product of codes and scales.

In float64 all three are in real numbers; in float32 they are what `fp8.Fp8` computes. Nothing is refused: where an input holds NaN
or Inf, or a scale is no positive number, the result says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError
from refimpl.autograd.expert_ops import expert_spans
from refimpl.autograd.tensor import Array
from refimpl.layers.numerics.formats import E4M3, decode, encode
from refimpl.layers.numerics.quantisation import Dialect, Quantized, quantize
from refimpl.layers.numerics.quantisation.quantise import tile_scales

from .fp8 import BLOCK, ROW, Fp8
from .gemm import Plain, using
from .stage import STAGES

SCALE, CODES = RECORDED = ("act.scale", "act.q")
"""What the scales and the codes of a product's input are called."""
TILE = ROW[1]


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

    def linear(self, x: Array, w: Array, b: Array | None = None) -> Array:
        """y = x wT (+ b)."""
        y = self._product(slice(None), w).reshape(*x.shape[:-1], len(w))
        return y if b is None else y + b

    def grouped_linear(self, rows: Array, ids: Array, *ws: Array) -> Array:
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


def group_major(s: Array) -> Array:
    """Scales that lie in memory a tile after the other, read so.  s (..., G) -> (..., G)"""
    return s.reshape(s.shape[-1], -1).T.reshape(s.shape)
