"""Block-scaled tensor cores (Blackwell tcgen05 and RTX Blackwell), in integers: mxf8f6f4, mxf4, nvf4.

The rule is text.py's, with the scales inside, before the addends are aligned; the accumulator is never scaled.
mxf8f6f4 only adds the scales' exponents to each product's. The FP4 instructions first sum groups of 16 products
exactly; a group is one addend, and its exponent is that of its two scales alone. `fast.mxf8f6f4` gives the
same bits faster. Source: MMA-Sim (arXiv 2511.10909); measured outputs of these three instructions are not at hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.errors import require
from refimpl.layers.numerics.formats import E2M1, E4M3, UE8M0, Format

from .machines import F32, INPUTS, TO_FP32, Machine
from .text import Codes, Ints, chain, decode, ieee_class, operands, overrule, reference_exponent, truncate, write

MX_BLOCK = 32  # operands per UE8M0 scale, and products per mxf8f6f4 step
GROUP = 16  # FP4 products that are summed exactly
FP4_STEP, FP4_F, FP4_FLOOR = 64, 35, -139  # products per step, fraction bits below E, least E


def mxf8f6f4(a: Codes, b: Codes, c: NDArray[Any], scale_a: Codes, scale_b: Codes, *, fmt: str = "e4m3") -> NDArray[Any]:
    """d = c + sum_k 2^(x_a + x_b) a_k b_k, x = scale code - 127.  a (..., M, K), b (..., N, K) -> d (..., M, N).

    a and b are codes of an FP8, FP6 or FP4 format, c (..., M, N) and d are float32. scale_a (..., M, ceil(K/32)) and
    scale_b (..., N, ceil(K/32)) are UE8M0 codes (uint8 or float8_e8m0fnu), 255 being NaN. Steps of 32 products, F = 25.
    """
    m, a, b, c = mx_operands(a, b, c, fmt)
    xa, xb = scale_codes(scale_a, a, MX_BLOCK, UE8M0, "scale_a"), scale_codes(scale_b, b, MX_BLOCK, UE8M0, "scale_b")
    d = c.view(np.uint32).copy()
    for row in range(d.shape[-2]):
        left, right = (_scale(x, UE8M0) for x in (xa[..., row, None, :], xb))  # (..., 1, steps), (..., N, steps)
        nan = (left[2] | right[2]).any(axis=-1)
        of_row = chain(a[..., row, None, :], b, d[..., row, :], m, left[1] + right[1])
        d[..., row, :] = np.where(nan, m.out.nan, of_row)
    return d.view(np.float32)


def mxf4(a: Codes, b: Codes, c: NDArray[Any], scale_a: Codes, scale_b: Codes, *, block: int = 32) -> NDArray[Any]:
    """d = c + sum over groups of 16 of 2^(x_a + x_b) sum_k a_k b_k.  a (..., M, K), b (..., N, K) -> d (..., M, N).

    a and b are E2M1 codes, one per byte. scale_a (..., M, ceil(K/block)), scale_b (..., N, ceil(K/block)): UE8M0 codes,
    block 16 or 32. Steps of 64 products; four groups and c are aligned with F = 35.
    """
    require(block in (16, 32), f"block {block}; expected 16 or 32")
    return _fp4(a, b, c, scale_a, scale_b, block, UE8M0)


def nvf4(a: Codes, b: Codes, c: NDArray[Any], scale_a: Codes, scale_b: Codes) -> NDArray[Any]:
    """d = c + sum over groups of 16 of s_a s_b sum_k a_k b_k.  a (..., M, K), b (..., N, K) -> d (..., M, N).

    As `mxf4`, with a UE4M3 scale per 16: scale_a (..., M, ceil(K/16)), scale_b (..., N, ceil(K/16)), uint8 codes or
    float8_e4m3fn; their sign bit is ignored.
    """
    return _fp4(a, b, c, scale_a, scale_b, GROUP, E4M3)


def _fp4(a: Codes, b: Codes, c: Codes, scale_a: Codes, scale_b: Codes, block: int, form: Format) -> NDArray[Any]:
    _, a, b, c = mx_operands(a, b, c, "e2m1")
    sa, sb = scale_codes(scale_a, a, block, form, "scale_a"), scale_codes(scale_b, b, block, form, "scale_b")
    va, vb = _halves(a), _halves(b)  # (..., groups, 16)
    sa, sb = (np.repeat(s, block // GROUP, axis=-1)[..., : va.shape[-2]] for s in (sa, sb))  # one scale per group
    d = c.view(np.uint32).copy()
    for row in range(d.shape[-2]):
        for g in range(0, va.shape[-2], FP4_STEP // GROUP):
            of = slice(g, g + FP4_STEP // GROUP)
            products = va[..., row, None, of, :] * vb[..., of, :]  # (..., N, 4, 16), in quarters
            d[..., row, :] = _fp4_step(products, d[..., row, :], sa[..., row, None, of], sb[..., of], form)
    return d.view(np.float32)


def _fp4_step(p: Ints, c: Codes, scale_a: Codes, scale_b: Codes, form: Format) -> Codes:
    """One instruction: products p (..., 4, 16) in quarters, c codes (...), scale codes (..., 4) -> code (...).

    A group takes no part in E if its 16 products or one of its scales are zero; if its products only cancel, it does.
    """
    (ma, ea, nan_a), (mb, eb, nan_b), (mc, ec) = _scale(scale_a, form), _scale(scale_b, form), decode(c, F32)
    significand, exponent = ma * mb, ea + eb
    present = (p != 0).any(axis=-1) & (significand != 0)
    e = reference_exponent(present.astype(np.int64), exponent, mc, ec, FP4_FLOOR)
    addends = p.sum(axis=-1) * significand  # in units of 2^(exponent - 2 - 2 form.mantissa)
    t = truncate(addends, FP4_F - 2 - 2 * form.mantissa - (e[..., None] - exponent))
    s = t.sum(axis=-1) + truncate(mc, FP4_F - F32.mantissa - (e - ec))
    kind = np.where((nan_a | nan_b).any(axis=-1), np.nan, ieee_class(c, F32))
    return overrule(write(s, e - FP4_F, TO_FP32), kind, TO_FP32)


def _halves(codes: Codes) -> Ints:
    """E2M1 codes as integers in units of 1/2, K filled with zeros to groups.  (..., K) -> (..., ceil(K/16), 16)."""
    significand, exponent = decode(codes, E2M1)
    fill = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % GROUP)]
    return np.pad(significand << exponent, fill).reshape(*codes.shape[:-1], -1, GROUP)


def _scale(codes: Codes, form: Format) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """Integer significand, exponent and NaN-ness of scale codes: UE8M0, or E4M3 without its sign.  (...)"""
    if form is UE8M0:
        return np.ones(codes.shape, np.int64), codes.astype(np.int64) - UE8M0.bias, codes == UE8M0.nan
    unsigned = codes & np.uint8(0x7F)
    return *decode(unsigned, form), unsigned == form.nan


def mx_operands(a: Codes, b: Codes, c: NDArray[Any], fmt: str) -> tuple[Machine, Codes, Codes, NDArray[Any]]:
    """The Blackwell machine of an FP8, FP6 or FP4 format, and the operands in full; SpecError where they do not fit."""
    known = [name for name, f in INPUTS.items() if f.bits <= 8]
    require(fmt in known, f"fmt {fmt!r}; expected one of {', '.join(known)}")
    require(np.asarray(c).dtype == np.float32, f"c has dtype {np.asarray(c).dtype}; expected float32")
    return operands(a, b, c, "blackwell", fmt)


def scale_codes(s: Codes, x: Codes, block: int, form: Format, name: str) -> Codes:
    """Scale codes as uint8 with the operand's leading axes: s -> (..., rows, ceil(K/block)); SpecError for another."""
    s = np.asarray(s)
    require(s.dtype in (np.uint8, form.dtype), f"{name} has dtype {s.dtype}; expected uint8 codes, or {form.dtype}")
    expected = (*x.shape[:-1], -(-x.shape[-1] // block))
    ok = s.ndim >= 2 and s.shape[-2:] == expected[-2:]
    require(ok, f"{name} has shape {s.shape}; expected {expected}, one scale per {block} of an operand {x.shape}")
    return np.broadcast_to(s.view(np.uint8), expected)
