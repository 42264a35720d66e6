"""Tensor cores bit for bit: the specification, in integers. One rule, and the table of machines in machines.py.

A tensor core computes d = c + sum_k a_k b_k in steps of L products. One step:

1. decode     x = M * 2^(e - m), M an integer, m the fraction bits; subnormals keep their format's smallest e
2. multiply   p = a * b exactly, with exponent e_p = e_a + e_b: products are not renormalised
3. align      E = the largest exponent among the accumulator and the nonzero products; the quantum is q = 2^(E - F)
4. truncate   every addend, c too, becomes t = sign(x) * floor(|x| / q): toward zero, each on its own
5. add        S = the sum of the integers t, exactly: the order of the products inside a step does not matter
6. write      S * q goes into the accumulator, truncated again (float16 accumulators: to nearest even)
7. specials   infinities and NaN as IEEE has them, the NaN being 0x7fffffff; a zero is always +0

and a longer K is a chain of steps in the order of k. `step` is the text of it, each rule a function above it.
`fast` computes the same bits, faster. Sources: machines.py; the report's "14 bits" (R 3.3.2) are 1 + F.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.errors import SpecError, require
from refimpl.layers.numerics.formats import Format

from .machines import TF32, Machine, Out, carrier, infinity, machine, magnitude_mask, sign_bit

Ints = NDArray[np.int64]
Codes = NDArray[Any]


def decode(codes: Codes, f: Format) -> tuple[Ints, Ints]:
    """Rule 1, x = M * 2^(e - m).  codes (...) -> M (...), e (...).

    A subnormal has field 0, no hidden bit, and the exponent of field 1. It is not normalised, which shows in E.
    """
    x = codes.astype(np.int64)
    magnitude = x & magnitude_mask(f)
    field, fraction = magnitude >> f.mantissa, magnitude & (2**f.mantissa - 1)
    significand = fraction + (np.minimum(field, 1) << f.mantissa)
    return np.where(x > magnitude, -significand, significand), np.maximum(field, 1) - f.bias


def reference_exponent(p: Ints, ep: Ints, mc: Ints, ec: Ints, floor: int) -> Ints:
    """Rule 3, E = max(e_c, e_p over k, floor).  p, ep (..., L), mc, ec (...) -> E (...).  A zero takes no part."""
    products = np.where(p == 0, floor, ep).max(axis=-1)
    e: Ints = np.maximum(np.maximum(products, np.where(mc == 0, floor, ec)), floor)
    return e


def truncate(significand: Ints, shift: Ints) -> Ints:
    """Rule 4, t = sign(M) * floor(|M| * 2^shift).  (An arithmetic right shift of a negative number is a floor.)"""
    left, right = np.clip(shift, 0, 62), np.clip(-shift, 0, 62)
    t: Ints = np.sign(significand) * ((np.abs(significand) << left) >> right)
    return t


def write(s: Ints, quantum: Ints, out: Out) -> Codes:
    """Rule 6, the code of S * 2^quantum: (...) -> (...).

    The result keeps `kept` bits below its own leading one, and none below the smallest subnormal. The exponent field is
    added to the significand, not put beside it: a carry (nearest) runs over into it and, past the largest number, gives
    infinity. Truncation gives infinity from 2^(emax + 1) on only.
    """
    f, magnitude = out.format, np.abs(s)
    leading = np.frexp(magnitude.astype(np.float64))[1] - 1 + quantum  # |S| < 2^53: exact
    exponent = np.maximum(leading, f.min_exponent)
    drop = np.clip(exponent - out.kept - quantum, -62, 62)
    n = (magnitude << np.maximum(-drop, 0)) >> np.maximum(drop, 0)
    if out.nearest:
        rest, half = magnitude - (n << np.maximum(drop, 0)), (1 << np.maximum(drop, 0)) >> 1
        n += (drop > 0) & ((rest > half) | ((rest == half) & (n % 2 == 1)))
    code = (((exponent - f.min_exponent) << out.kept) + n) << (f.mantissa - out.kept)
    code = np.where(n == 0, 0, np.minimum(code, infinity(f)))
    return (code + np.where((s < 0) & (n != 0), sign_bit(f), 0)).astype(carrier(f))


def ieee_class(codes: Codes, f: Format) -> NDArray[np.float64]:
    """0, +-1 (any finite number), +-inf or NaN: all that rule 7 needs to know.  codes (...) -> (...)"""
    kind: NDArray[np.float64] = np.sign(decode(codes, f)[0]).astype(np.float64)
    magnitude = codes & carrier(f).type(magnitude_mask(f))
    if f.top == "ieee":
        kind = np.where(magnitude == infinity(f), np.copysign(np.inf, kind), kind)
        return np.where(magnitude > infinity(f), np.nan, kind)
    return np.where(magnitude == magnitude_mask(f), np.nan, kind) if f.top == "fn" else kind


def special(a: Codes, b: Codes, c: Codes, m: Machine) -> NDArray[np.float64]:
    """Rule 7: c + sum_k a_k b_k on classes; where it is infinite or NaN, so is d.  (..., L), (...) -> (...)"""
    with np.errstate(invalid="ignore"):  # inf * 0 and inf - inf are NaN, and meant
        products = ieee_class(a, m.format) * ieee_class(b, m.format)
        total: NDArray[np.float64] = products.sum(axis=-1) + ieee_class(c, m.out.format)
    return total


def overrule(d: Codes, s: NDArray[np.float64], out: Out) -> Codes:
    """The code of s where s is infinite or NaN, else d."""
    infinite = infinity(out.format) + np.where(s < 0, sign_bit(out.format), 0)
    return np.where(np.isnan(s), out.nan, np.where(np.isinf(s), infinite, d)).astype(d.dtype)


def align(a: Codes, b: Codes, c: Codes, m: Machine, shift: Ints | int = 0) -> tuple[Ints, Ints, Ints]:
    """Rules 1 to 4: a, b (..., L), c (...) -> products t (..., L) and accumulator t_c (...) in quanta, and E (...).

    `shift` (...) is the exponent of the block scales, added to each product's (block_scaled.py); 0 elsewhere.
    """
    (ma, ea), (mb, eb), (mc, ec) = decode(a, m.format), decode(b, m.format), decode(c, m.out.format)
    p, ep = ma * mb, ea + eb + np.asarray(shift)[..., None]
    e = reference_exponent(p, ep, mc, ec, m.floor)
    t = truncate(p, m.F - 2 * m.format.mantissa - (e[..., None] - ep))
    return t, truncate(mc, m.F - m.out.format.mantissa - (e - ec)), e


def step(a: Codes, b: Codes, c: Codes, m: Machine, shift: Ints | int = 0) -> Codes:
    """d = c + 2^shift sum_k a_k b_k, one instruction step: codes (..., L), (..., L), (...) -> code (...)."""
    t, tc, e = align(a, b, c, m, shift)
    s = t.sum(axis=-1) + tc
    return overrule(write(s, e - m.F, m.out), special(a, b, c, m), m.out)


def chain(a: Codes, b: Codes, c: Codes, m: Machine, shift: Ints | None = None) -> Codes:
    """A long dot product: steps of L in the order of k, the last one as short as it is.  (..., K), (...) -> (...).

    `shift` (..., steps) is as in `align`.
    """
    for i, k in enumerate(range(0, a.shape[-1], m.L)):
        c = step(a[..., k : k + m.L], b[..., k : k + m.L], c, m, 0 if shift is None else shift[..., i])
    return c


def tensor_core_matmul(a: Codes, b: Codes, c: NDArray[Any], *, arch: str, fmt: str) -> NDArray[Any]:
    """d = c + a bᵀ as the tensor core computes it.  a (..., M, K), b (..., N, K), c (..., M, N) -> d (..., M, N).

    Arguments, errors and bits are those of `fast.tensor_core_matmul`; this is the text that it is held to.
    """
    return matmul_codes(*operands(a, b, c, arch, fmt))


def matmul_codes(m: Machine, a: Codes, b: Codes, c: NDArray[Any]) -> NDArray[Any]:
    """`tensor_core_matmul` on operands that are known to fit."""
    d = c.view(carrier(m.out.format)).copy()
    for row in range(d.shape[-2]):  # one row at a time: memory for N * L products
        d[..., row, :] = chain(a[..., row, None, :], b, d[..., row, :], m)
    return d.view(c.dtype)


def operands(a: Codes, b: Codes, c: NDArray[Any], arch: str, fmt: str) -> tuple[Machine, Codes, Codes, NDArray[Any]]:
    """The machine, a and b as codes, and c in full, all with the same leading axes; SpecError where they do not fit."""
    c = np.asarray(c)
    m = machine(arch, fmt, c.dtype)
    a, b = as_codes(a, m.format, "a"), as_codes(b, m.format, "b")
    require(a.shape[-1] == b.shape[-1], f"a has shape {a.shape}, b {b.shape}; expected (..., M, K), (..., N, K)")
    require(a.shape[-1] > 0, f"a has shape {a.shape}: K is 0; expected at least one product")
    try:
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2], c.shape[:-2])
        full = np.broadcast_to(c, (*lead, a.shape[-2], b.shape[-2]))
    except ValueError:
        raise SpecError(f"c has shape {c.shape}; expected (..., M, N) for a {a.shape} and b {b.shape}") from None
    a, b = np.broadcast_to(a, lead + a.shape[-2:]), np.broadcast_to(b, lead + b.shape[-2:])
    return m, a, b, np.ascontiguousarray(full)


def as_codes(x: Codes, f: Format, name: str) -> Codes:
    """Codes as unsigned integers; SpecError for another dtype or a code out of the format."""
    x, unsigned = np.asarray(x), carrier(f)
    require(x.ndim >= 2, f"{name} has shape {x.shape}; expected a matrix, or a batch of them")
    require(x.dtype in (unsigned, f.dtype), f"{name} has dtype {x.dtype}; expected {unsigned} codes, or {f.dtype}")
    x = x.view(unsigned)
    if f is TF32:
        return x >> np.uint32(13)
    bad = np.argwhere(x >> unsigned.type(f.bits)) if f.bits < 8 else np.empty((0, x.ndim))
    at = [int(i) for i in bad[0]] if len(bad) else []
    require(not at, f"{name}{at} is no code of {f.name}; expected less than {2**f.bits}")
    return x
