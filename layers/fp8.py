"""V3's FP8 linear layer (R 3.3.1-3.3.3): Fprop, Dgrad and Wgrad as scaled GEMMs on E4M3 codes, gradients straight
through.

Groups lie along each product's reduction axis. Fprop y = x wT: x in 1 x 128, w in 128 x 128. Dgrad dx = dy w: dy in
1 x 128, w's blocks turned. Wgrad dw = dyT x: both in 128 x 1 over tokens, x from what forward kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl.autograd import nn_ops
from refimpl.autograd.expert_ops import expert_spans
from refimpl.autograd.nn_ops import once
from refimpl.autograd.ops import Result
from refimpl.autograd.tensor import Array, Tensor, Vjp, data_of, primitive
from refimpl.layers.numerics.formats import E4M3, Format
from refimpl.layers.numerics.quantisation import DIALECTS, Dialect, Quantized, quantize
from refimpl.layers.numerics.tensor_cores import scaled_gemm

ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)
EXACT, POWER_OF_TWO = DIALECTS["deepseek_v3"], DIALECTS["deepseek_v32_ue8m0"]
"""Scales of activations: amax / 448, or rounded up to a power of two; amax counts at least 1e-4, as in DeepSeek's kernels."""
FREE, FREE_POWER_OF_TWO = (replace(d, clamp=None) for d in (EXACT, POWER_OF_TWO))
"""The same without that floor: for weights, as checkpoints hold them, and for gradients, which are far below 1e-4."""


@dataclass(frozen=True)
class Fp8:
    """A GEMM kernel for a precision plan.

    `mode`: the accumulation, a name of `numerics.scaled_gemm.MODES`. `inputs`, `gradients`, `weights`: how the scales
    of x, dy and w are made (power of two for what is sent between ranks, R 3.3.3). `kept`: the format in which x waits
    for Wgrad (E5M6 after attention). `gradient_tile`: (1, 128), or (128, 128) for the ablation of R App. B.2.
    `recompute`: SwiGLU keeps its inputs in FP8 and is run again.
    """

    mode: str = "exact"
    inputs: Dialect = EXACT
    gradients: Dialect = FREE
    weights: Dialect = FREE
    kept: Format = E4M3
    gradient_tile: tuple[int, int] = ROW
    recompute: bool = False

    def linear(self, x: Any, w: Any, b: Any = None) -> Any:
        """y = x wT + b.  x (..., D), w (F, D), b (F,) or None -> y (..., F)."""
        return _linear(x, w, b, kernel=self, saved=_saved(x))

    def grouped_linear(self, rows: Any, ids: Array, *ws: Any) -> Any:
        """y[m] = rows[m] w_e(m)T; every expert's rows are quantised by themselves.  rows (M, D), ids (..., K) -> y
        (M, F).
        """
        return _grouped(rows, ids, *ws, kernel=self, saved=_saved(rows))

    def swiglu(self, gate: Any, up: Any) -> Any:
        """silu(gate) up; with `recompute` backward sees it through FP8 copies of gate and up.  gate (*), up (*) ->
        (*).
        """
        taped = isinstance(gate, Tensor) or isinstance(up, Tensor)
        if not (self.recompute and taped):
            return nn_ops.swiglu(gate, up)
        inputs = [a.reshape(-1, a.shape[-1]) for a in (data_of(gate), data_of(up))]
        if _passes(*inputs):
            return nn_ops.swiglu(gate, up)
        kept = [quantize(a, ROW) for a in inputs]

        def copies() -> list[Array]:
            return [k.dequantize().reshape(gate.shape) for k in kept]

        y = _swiglu(gate, up, copies=copies)
        y.saved = lambda: nn_ops.swiglu(*copies())
        return y

    def product(self, a: Quantized, b: Quantized) -> Array:
        """a bT by the kernel's accumulation.  a (M, K), b (N, K) -> (M, N) float32."""
        return scaled_gemm(a, b, mode=self.mode).astype(np.float32)

    def describe(self) -> str:
        """One line for the printed plan."""
        if self.recompute:
            return "gate and up kept as e4m3 1x128, SwiGLU run again in backward"
        pow2 = {k: getattr(self, k).power_of_two for k in ("inputs", "gradients", "weights")}
        notes = [f"power-of-two scales of {k}" for k, v in pow2.items() if v]
        notes += [f"input kept as {self.kept.name}"] if self.kept is not E4M3 else []
        return ", ".join([f"{self.mode}, e4m3 x 1x128, w 128x128", *notes])


def _saved(x: Any) -> Callable[[], Array] | None:
    return x.saved if isinstance(x, Tensor) else None


_passing: ContextVar[bool] = ContextVar("passing", default=False)


@contextmanager
def nan_passes() -> Iterator[None]:
    """Inside, a product of what no quantiser takes is NaN, not a SpecError: of ranks that wait for each other none may stop alone;
    all come to the loss that says it.
    """
    token = _passing.set(True)
    try:
        yield
    finally:
        _passing.reset(token)


def _passes(*inputs: Array) -> bool:
    """Whether they hold what no quantiser takes, and it is to pass."""
    return _passing.get() and not all(np.isfinite(a).all() for a in inputs)


def _nan(rows: int, columns: int) -> Array:
    return np.full((rows, columns), np.nan, np.float32)


class _Gemm:
    """One weight and the rows that meet it: forward at once, gradients when asked."""

    def __init__(self, x: Array, w: Array, kernel: Fp8) -> None:
        self.kernel, self.shape, self.bad = kernel, w.shape, _passes(x, w)
        if self.bad:
            self.y = _nan(len(x), len(w))
            return
        self.w = quantize(w, BLOCK, dialect=kernel.weights, name="w")
        self.x = quantize(x, ROW, dialect=kernel.inputs)
        self.y = kernel.product(self.x, self.w)  # Fprop
        if kernel.kept is not E4M3:  # R 3.3.3: E5M6, scales a power of two
            self.x = quantize(x, ROW, dialect=POWER_OF_TWO, fmt=kernel.kept)

    def dgrad(self, dy: Array) -> Array:  # (N, F) (F, D) -> (N, D)
        if self.bad or _passes(dy):
            return _nan(len(dy), self.shape[1])
        q = quantize(dy, self.kernel.gradient_tile, dialect=self.kernel.gradients, name="dy")
        return self.kernel.product(q, self.w.T)

    def wgrad(self, dy: Array, recomputed: Array | None) -> Array:  # (F, N) (N, D) -> (F, D)
        if self.bad or _passes(dy, *([] if recomputed is None else [recomputed])):
            return _nan(*self.shape)
        x = self.x.dequantize() if recomputed is None else recomputed
        tile = COLUMN if self.kernel.gradient_tile == ROW else self.kernel.gradient_tile
        q = quantize(dy, tile, dialect=self.kernel.gradients, name="dy")
        return self.kernel.product(q.T, quantize(x, COLUMN, dialect=self.kernel.inputs).T)


@primitive
def _linear(x: Array, w: Array, b: Array | None, *, kernel: Fp8, saved: Callable[[], Array] | None) -> Result:
    """y = x wT + b on FP8 codes."""
    before = x.shape  # the array itself is not kept
    gemm = _Gemm(x.reshape(-1, before[-1]), w, kernel)
    y = gemm.y if b is None else gemm.y + b

    def rows(dy: Array) -> Array:
        return dy.reshape(-1, w.shape[0])

    def dgrad(dy: Array) -> Array:
        return gemm.dgrad(rows(dy)).reshape(before)

    def wgrad(dy: Array) -> Array:
        return gemm.wgrad(rows(dy), saved().reshape(-1, w.shape[1]) if saved else None)

    def vjp_b(dy: Array) -> Array:
        return rows(dy).sum(axis=0)

    return y.reshape(*before[:-1], w.shape[0]), (dgrad, wgrad, vjp_b)


@primitive
def _grouped(rows: Array, ids: Array, *ws: Array, kernel: Fp8, saved: Callable[[], Array] | None) -> Result:
    """y[m] = rows[m] w_e(m)T on FP8 codes."""
    spans = expert_spans(ids, len(ws))
    gemms = {e: _Gemm(rows[s], ws[e], kernel) for e, s in enumerate(spans) if s.start < s.stop}
    y = np.empty_like(rows, shape=(len(rows), ws[0].shape[0]))
    for e, gemm in gemms.items():
        y[spans[e]] = gemm.y
    recomputed, before = once(lambda _: saved() if saved else None), rows.shape

    def dgrad(dy: Array) -> Array:
        drows = np.empty_like(dy, shape=before)
        for e, gemm in gemms.items():
            drows[spans[e]] = gemm.dgrad(dy[spans[e]])
        return drows

    def wgrad(e: int) -> Vjp:
        def vjp(dy: Array) -> Array:
            if e not in gemms:
                return np.zeros_like(ws[e])
            x = recomputed(dy)
            return gemms[e].wgrad(dy[spans[e]], None if x is None else x[spans[e]])

        return vjp

    return y, (dgrad, None, *[wgrad(e) for e in range(len(ws))])


@primitive
def _swiglu(gate: Array, up: Array, *, copies: Callable[[], list[Array]]) -> Result:
    """y = silu(gate) up, differentiated at FP8 copies of gate and up."""
    y, _ = nn_ops.swiglu.raw(gate, up)  # type: ignore[attr-defined]

    @once
    def vjps(_: Array) -> tuple[Vjp, Vjp]:
        pair: tuple[Vjp, Vjp] = nn_ops.swiglu.raw(*copies())[1]  # type: ignore[attr-defined]
        return pair

    return y, (lambda dy: vjps(dy)[0](dy), lambda dy: vjps(dy)[1](dy))
