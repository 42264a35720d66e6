"""FP8 GEMMs with scales: V3's accumulation in two levels (R 3.3.2), under the names of the kernels that do it.

For each interval of k (128, the report's N_C) a tensor core sums D = a bᵀ over codes, from zero; then the CUDA cores
scale D and add it to a float32 accumulator, the promotion. Kernels differ in the order of the scales and in whether the
last multiplication and the addition are rounded once (fma) or twice. About half of the float32 results differ from one
kernel to the next, and hardly one after rounding to bfloat16: so a mode has a name and a statement. With scales that are
powers of two all promotions agree, and only the tensor cores differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.errors import require
from refimpl.layers.numerics.formats import FP16, Format, decode, encode
from refimpl.layers.numerics.quantisation import Quantized

from .fast import mxf8f6f4, tensor_core_matmul

F32 = NDArray[np.float32]
CHUNK = 1 << 15  # outputs promoted at a time


@dataclass(frozen=True)
class Mode:
    """How one kernel computes.

    `arch`: the tensor core, or None: then the sum over an interval is float32 in ascending k, or exact.
    `fmt`: what codes are converted to before the tensor core, "" if they are not.
    `scales`: "product" is RN(s_a s_b) D, "a then b" is (D s_a) s_b, "inside" is in the tensor core, "exact" is float64.
    `fma`: the last multiplication and the addition are one rounding. `interval`: of promotion, None for all of K.
    """

    name: str
    arch: str | None
    fmt: str
    scales: Literal["product", "a then b", "inside", "exact"]
    fma: bool
    interval: int | None
    says: str


MODES = {
    m.name: m
    for m in (
        Mode(
            *("deepgemm_sm90", "hopper", "", "product", True, 128),
            "acc = fma(RN(s_a s_b), D, acc), D by 4 wgmma steps.  DeepGEMM 54e2261, sm90_fp8_gemm_1d1d and 1d2d; \
nvcc contracts to fma by default",
        ),
        Mode(
            *("triton_sm90_wgmma", "hopper", "", "a then b", True, 128),
            "acc = fma(RN(D s_a), s_b, acc), D by 4 wgmma steps.  DeepSeek-V3 9b4e978 inference/kernel.py with BLOCK_M \
64; Triton fuses by default",
        ),
        Mode(
            *("triton_sm90_wgmma_unfused", "hopper", "", "a then b", False, 128),
            "acc = RN(acc + RN(RN(D s_a) s_b)).  The same with enable_fp_fusion=False",
        ),
        Mode(
            *("triton_sm90_mma", "hopper", "f16", "a then b", True, 128),
            "as triton_sm90_wgmma, but BLOCK_M 16 or 32 (kernel.py autotunes it): Triton converts FP8 to FP16 for mma.sync, \
F = 25. Each 32 of k are two steps of 16, those with k mod 4 = 0, 1 and then 2, 3 (PTX of Triton 3.6.0)",
        ),
        Mode(
            *("deepgemm_sm100", "blackwell", "", "inside", False, None),
            "one chain over all of K, no promotion, power-of-two scales inside the tensor core (mxf8f6f4).  DeepGEMM on \
Blackwell",
        ),
        Mode(
            *("fp32", None, "", "product", False, 128),
            "D = RN(D + a_k b_k) for ascending k, each product exact; acc = RN(acc + RN(RN(s_a s_b) D)). No hardware",
        ),
        Mode(
            *("exact", None, "", "exact", False, 128),
            "D exact; scales and the sum over intervals in float64. No hardware: what the others are measured against",
        ),
    )
}
"""The kernels by name; `says` is the arithmetic and its source."""


def scaled_gemm(
    a: Quantized, b: Quantized, *, mode: str = "deepgemm_sm90", interval: int | None = None
) -> NDArray[Any]:
    """c = a bᵀ: c[m, n] = sum_g s_a[m, g] s_b[n, g] sum_k a[m, k] b[n, k].  a (..., M, K), b (N, K) -> c (..., M, N).

    a and b are quantised in tiles of the same size along k: 1 x 128 or 128 x 128, or a whole row for one scale and a
    chain without promotion. `mode` is a key of MODES, `interval` its promotion interval if another than the mode's: at
    most the tile. c is float32, float64 for mode "exact". Raises SpecError for an unknown mode, for operands that do not
    fit, for an interval that spans tiles, and in deepgemm_sm100 for scales that are no powers of two.
    """
    require(mode in MODES, f"mode {mode!r}; known: {', '.join(MODES)}")
    how = MODES[mode]
    group = _check(a, b, how, interval)
    codes = a.codes.reshape(-1, a.shape[-1])
    if how.scales == "inside":
        c = _block_scaled(a, b, codes)
    else:
        c = np.zeros((len(codes), len(b.codes)), np.float64 if mode == "exact" else np.float32)
        step = min(interval or how.interval or group, group)
        for k, g in _intervals(a.shape[-1], group, step):
            d = _product(codes[:, k], b.codes[:, k], a, b, how)
            with np.errstate(over="ignore", invalid="ignore"):
                _promote(c, d, _row_scales(a, g), _row_scales(b, g), how)
    return c.reshape(*a.shape[:-1], len(b.codes))


def _intervals(depth: int, group: int, step: int) -> Iterator[tuple[slice, int]]:
    """Slices of k, each inside one group, and the group, in ascending order."""
    for g, first in enumerate(range(0, depth, group)):
        last = min(first + group, depth)
        yield from ((slice(k, min(k + step, last)), g) for k in range(first, last, step))


def _product(a: NDArray[Any], b: NDArray[Any], left: Quantized, right: Quantized, how: Mode) -> NDArray[Any]:
    """D = a bᵀ over one interval, codes without scales.  a (M, k), b (N, k) -> (M, N)."""
    if how.arch is not None:
        fmt = how.fmt or FMT[left.fmt.name]
        a, b = (_as_triton_feeds_mma(x, left.fmt) if how.fmt else x for x in (a, b))
        return tensor_core_matmul(a, b, np.zeros((len(a), len(b)), np.float32), arch=how.arch, fmt=fmt)
    x, y = decode(a, left.fmt), decode(b, right.fmt)
    if how.scales == "exact":
        exact: NDArray[Any] = x.astype(np.float64) @ y.T.astype(np.float64)
        return exact
    d = np.zeros((len(a), len(b)), np.float32)
    for k in range(x.shape[1]):
        d += np.multiply.outer(x[:, k], y[:, k])
    return d


def _as_triton_feeds_mma(codes: NDArray[Any], fmt: Format) -> NDArray[Any]:
    """FP16 codes in the order of the mma.sync steps, filled with zeros to whole 32s.  (R, k) -> (R, k')"""
    whole = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 32)))
    half = encode(decode(whole, fmt), FP16, overflow="overflow").reshape(len(codes), -1, 8, 2, 2)
    fed: NDArray[Any] = half.swapaxes(2, 3).reshape(whole.shape)  # k = (32s, quad, pair, 2) -> (32s, pair, quad, 2)
    return fed


FMT = {"e4m3fn": "e4m3", "e5m2": "e5m2"}
"""Formats of the codes, and what the tensor cores call them."""


def _promote(c: NDArray[Any], d: NDArray[Any], sa: F32, sb: F32, how: Mode) -> None:
    """c += s_a s_b d in the mode's order and roundings, in place.  c, d (M, N), sa (M,), sb (N,)."""
    rows = max(1, CHUNK // max(1, c.shape[1]))
    for i in range(0, len(c), rows):
        at = slice(i, i + rows)
        left, right = (
            (sa[at, None] * sb, d[at]) if how.scales == "product" else (d[at] * sa[at, None].astype(d.dtype), sb)
        )
        c[at] = fma32(left, right, c[at]) if how.fma else c[at] + left * right


def fma32(x: F32, y: F32, z: F32) -> F32:
    """RN(x y + z), one float32 rounding.  Broadcasts.

    The product is exact in float64, the sum s is not. Its error e is known exactly (TwoSum); if e is not 0, s is rounded
    to odd, moved toward e if its last bit is 0. From 53 bits rounded to odd the cast to 24 bits is then right, where from
    53 bits rounded to nearest it would round a second time (x = y = 1 + 2^-12, z = 2^-60).
    """
    p, wide = np.multiply(x, y, dtype=np.float64), z.astype(np.float64)
    s = p + wide
    t = s - p
    e = (p - (s - t)) + (wide - t)
    bits = s.view(np.int64)
    move = (e != 0) & np.isfinite(s) & (bits & 1 == 0)
    bits += move * np.where((e > 0) == (s > 0), 1, -1)
    return s.astype(np.float32)


def _block_scaled(a: Quantized, b: Quantized, codes: NDArray[Any]) -> NDArray[Any]:
    """mxf8f6f4 over all of K: a scale per tile is repeated per 32.  codes of a (M, K) -> (M, N)."""
    count = -(-codes.shape[1] // 32)
    per_row = ((x.scale_codes.reshape(-1, x.scales.shape[-1]), x.tile) for x in (a, b))
    sa, sb = (np.repeat(np.repeat(s, r, axis=0), -(-min(k, codes.shape[1]) // 32), axis=1) for s, (r, k) in per_row)
    c = np.zeros((len(codes), len(b.codes)), np.float32)
    return mxf8f6f4(codes, b.codes, c, sa[: len(codes), :count], sb[: len(b.codes), :count], fmt=FMT[a.fmt.name])


def _row_scales(x: Quantized, g: int) -> F32:
    """The scale of every row in group g.  -> (rows,)"""
    rows = x.codes.size // max(1, x.shape[-1])
    return np.repeat(x.scales.reshape(-1, x.scales.shape[-1])[:, g], x.tile[0])[:rows].astype(np.float32)


def _check(a: Quantized, b: Quantized, how: Mode, interval: int | None) -> int:
    """The size of the groups along k; SpecError unless the operands, the mode and the interval fit."""
    names = f"{a.name} {a.shape} and {b.name} {b.shape}"
    require(len(b.shape) == 2 and len(a.shape) >= 2, f"{names}; expected (..., M, K) and (N, K)")
    require(a.shape[-1] == b.shape[-1] > 0, f"{names}: K differs or is 0; expected (..., M, K) and (N, K)")
    require(a.fmt is b.fmt, f"{a.name} is {a.fmt.name}, {b.name} is {b.fmt.name}; expected one format")
    require(a.fmt.name in FMT, f"{a.name} has format {a.fmt.name}; expected {' or '.join(FMT)}")
    group, other = (min(x.tile[1], x.shape[-1]) for x in (a, b))
    require(group == other, f"{a.name} has tiles of {group} along k, {b.name} of {other}; expected the same")
    require(
        interval is None or 0 < interval <= group,
        f"interval {interval}; expected at most {group}, the tile along k: a promotion applies one scale",
    )
    if how.scales == "inside":
        whole = group in (a.shape[-1], 32) or group % 32 == 0
        require(whole and interval is None, f"{how.name}: tiles of {group}; expected a multiple of 32, and no interval")
    return group
