"""Neighbours of V3's FP8 recipe that articles about the model describe, though V3 itself uses none of them: INT8
quantisation-aware training, LLM.int8()'s mixed decomposition, dynamic loss scaling for FP16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl.autograd import ops
from refimpl.autograd.errors import require
from refimpl.autograd.ops import Result
from refimpl.autograd.tensor import Array, data_of, primitive

from .stage import stage


@primitive
def _fake_quant(x: Array, scale: Array, *, bits: int) -> Result:
    """y = scale clip(round(x / scale)).  x (..., D), scale (..., 1) -> y (..., D)."""
    top = 2 ** (bits - 1) - 1
    q = np.rint(x / scale)

    def vjp_x(dy: Array) -> Array:
        return dy * (np.abs(q) <= top)

    return (np.clip(q, -top, top) * scale).astype(x.dtype), (vjp_x, None)


@stage(
    "int8.fake_quant",
    what="values on an INT8 grid (described in articles, not in V3)",
    eq="Jacob et al. 2018, section 3 (arXiv 1712.05877)",
    shape="B S D",
)
def fake_quant(x: Any, scale: Array, *, bits: int = 8) -> Any:
    """x on the symmetric integer grid of `bits` bits, in training; the gradient goes straight through where nothing was
    clipped and is zero elsewhere.  x (B, S, D), scale (B, S, 1) -> (B, S, D).
    """
    require(bool(np.all(scale > 0)), "int8.fake_quant: every scale must be positive")
    return _fake_quant(x, scale, bits=bits)


@stage(
    "int8.scale",
    what="INT8 scale of a row (described in articles, not in V3)",
    eq="Jacob et al. 2018, section 3 (arXiv 1712.05877)",
    shape="B S 1",
)
def amax_scale(x: Any, *, bits: int = 8) -> Array:
    """max |x| / (2^(bits-1) - 1) per row, a constant for gradients; a row of zeros gets 1.  x (B, S, D) -> (B, S, 1)."""
    x = data_of(x)
    amax = np.abs(x).max(axis=-1, keepdims=True)
    return np.where(amax == 0, 1, amax / (2 ** (bits - 1) - 1)).astype(x.dtype)


@stage(
    "int8.mixed_linear",
    what="LLM.int8()'s product (described in articles, not in V3)",
    eq="Dettmers et al. 2022, section 3 (arXiv 2208.07339)",
    shape="B S F",
)
def mixed_linear(x: Any, w: Any, *, threshold: float = 6.0) -> Any:
    """y = x wT: input channels that anywhere exceed `threshold` in full precision, the others as INT8 with one scale per row of
    x and per row of w.  x (B, S, D), w (F, D) -> (B, S, F).
    """
    outlier = (np.abs(x) > threshold).any(axis=tuple(range(x.ndim - 1)))  # (D,)
    rest_x, rest_w = x[..., ~outlier], w[:, ~outlier]
    sx, sw = amax_scale.fn(rest_x), amax_scale.fn(rest_w)
    qx, qw = np.rint(rest_x / sx).astype(np.int32), np.rint(rest_w / sw).astype(np.int32)
    y = (qx @ qw.T) * (sx * sw.T)  # int32 sums, as the integer tensor cores make them
    return (y + x[..., outlier] @ w[:, outlier].T).astype(x.dtype)


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, arXiv 1710.03740): multiply the loss so that small FP16 gradients do not
    flush to zero; halve when something overflows, double after `interval` steps without.
    """

    scale: float = 2.0**16
    interval: int = 2000
    good: int = 0

    def scaled(self, loss: Any) -> Any:
        """loss times the scale.  () -> ()."""
        return ops.mul(loss, self.scale)

    def unscale(self, grads: Mapping[str, Array]) -> dict[str, Array] | None:
        """float32 gradients without the scale, or None if any is infinite or NaN: then the step is skipped."""
        if not all(bool(np.isfinite(g).all()) for g in grads.values()):
            return None
        return {n: g.astype(np.float32) / np.float32(self.scale) for n, g in grads.items()}

    def update(self, overflowed: bool) -> LossScale:
        """The scale for the next step."""
        if overflowed:
            return replace(self, scale=max(self.scale / 2, 1.0), good=0)
        if self.good + 1 == self.interval:
            return replace(self, scale=self.scale * 2, good=0)
        return replace(self, good=self.good + 1)
