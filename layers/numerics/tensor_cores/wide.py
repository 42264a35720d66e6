"""Steps of the fast form for F >= 23 and for float16 accumulators: everything in float64, every operation exact.

With q = 2^(E - F), truncated products are integers below 2^(F + 2), and sums of them stay below 2^34. A product loses
bits only if its lowest set bit lies below q; the smallest such bit of every output is a max-plus product too. Outputs
that lose nothing are a GEMM; the others are evaluated one by one, or, where they are many, row by row.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .exact import Part, Products, aligned, finite
from .machines import Machine, carrier
from .text import Codes

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

ROWS = 16  # rows per block: 256 KB arrays
MANY = 0.1  # share of outputs with losses above which whole rows are evaluated
BIAS, FIELD = 1023, 52  # of a float64


class Wide:
    """Values (float64, NaN and infinity as 0) and max-plus factors of codes, from tables where codes are short.

    A narrow format has at most 8 bits per exponent, bf16 and tf32 have 5 (16 products at most): between the smallest E,
    -133, and the largest product's, 254, lie 1940 bits, which fit in a float64 if centred. What underflows lies below
    every E, what overflows among the lowest bits lies below every q: both are right without care.
    """

    def __init__(self, m: Machine):
        self.f = m.format
        broad = self.f.exponent == 8
        self.base = 5 if broad else 8
        self.middle, self.low_middle = (30, 17) if broad else (0, 0)
        short = carrier(self.f).itemsize < 4
        self.table = self.compute(np.arange(2**self.f.bits).astype(carrier(self.f))) if short else None

    def compute(self, codes: Codes) -> tuple[F64, F64, F64]:
        """value, 2^(base (e - middle)) and 2^(-base (lowest - low_middle)); the factors of a zero are 0."""
        significand, exponent, value = finite(codes, self.f)
        trailing = np.frexp((significand & -significand).astype(np.float64))[1] - 1
        lowest = exponent - self.f.mantissa + trailing  # exponent of the lowest set bit
        some = significand != 0
        high = np.where(some, np.ldexp(1.0, self.base * (exponent - self.middle)), 0)
        low = np.where(some, np.ldexp(1.0, self.base * (self.low_middle - lowest)), 0)
        return value, high, low

    def __call__(self, codes: Codes) -> tuple[F64, ...]:
        """The three arrays for these codes, contiguous."""
        return tuple(t[codes] for t in self.table) if self.table else self.compute(codes)


wide = cache(Wide)
"""The tables of a machine, built once."""


class WideSteps:
    """Work arrays, and the steps of a panel of operands on a block of columns."""

    def __init__(self, m: Machine, columns: int):
        self.m, self.tables = m, wide(m)
        self.arrays = [aligned((ROWS, columns), np.float64) for _ in range(5)]
        self.products = Products(m.L, columns, np.float64)

    def panel(self, a: Part, b: Part, c: NDArray[Any]) -> None:
        """c += a bᵀ, step by step.  a (M, P), b (columns, P), c (M, columns) in place."""
        (left, xa), (right, xb) = a, b
        for s, k in enumerate(range(0, left.shape[1], self.m.L)):
            rows = self.tables(left[:, k : k + self.m.L])
            columns = self.tables(np.ascontiguousarray(right[:, k : k + self.m.L].T))
            for i in range(0, len(left), ROWS):
                shift = None if xa is None or xb is None else xa[i : i + ROWS, s, None] + xb[:, s]
                self._step([x[i : i + ROWS] for x in rows], columns, c[i : i + ROWS], shift)

    def _step(self, a: list[F64], b: tuple[F64, ...], c: NDArray[Any], shift: I64 | None) -> None:
        """One instruction step.  a: value, high, low, each (R, L); b the same (L, columns); c (R, columns) in place."""
        g, wide_c, scale, total, work = (x[: len(c), : c.shape[1]] for x in self.arrays)
        wide_c[...] = c
        e = self._levels(np.matmul(a[1], b[1], out=g), 2 * self.tables.middle, shift)
        np.maximum(e, self._accumulator_exponent(wide_c, work.view(np.int64)), out=e)
        lowest = self._levels(np.matmul(a[2], b[2], out=work), -2 * self.tables.low_middle)
        lowest += e
        if shift is not None:
            lowest -= shift
        lossy = lowest > self.m.F
        self._quanta(e, shift, scale)
        self._sum_products(a[0], b[0], scale, lossy, total)
        if shift is not None:
            self._quanta(e, None, scale)
        np.multiply(wide_c, scale, out=work)
        np.trunc(work, out=work)
        total += work
        e += BIAS - self.m.F
        e <<= FIELD  # 2^(E - F)
        total *= e.view(np.float64)
        self._write(total, c)

    def _quanta(self, e: I64, shift: I64 | None, out: F64) -> None:
        """2^(F - E + shift), quanta per unit, by writing exponent fields; 0 below 2^-1022: nothing survives that."""
        bits = out.view(np.int64)
        np.subtract(self.m.F + BIAS, e, out=bits)
        if shift is not None:
            bits += shift
            np.maximum(bits, 0, out=bits)
        bits <<= FIELD

    def _levels(self, g: F64, offset: int, shift: I64 | None = None) -> I64:
        """floor(log2(g) / base) + offset + shift in place of g: the largest exponent of a max-plus product.

        Where there is no product, and g is 0, no shift may lift the level.
        """
        if shift is not None:
            offset, shift = 0, np.where(g == 0, self.m.floor, shift + offset)
        e: I64 = g.view(np.int64)
        e >>= FIELD
        e -= BIAS
        e //= self.tables.base
        e += offset if shift is None else shift
        return e

    def _accumulator_exponent(self, c: F64, e: I64) -> I64:
        """e_c, not below the smallest exponent of the accumulator's format; the floor for a zero."""
        np.right_shift(c.view(np.int64), FIELD, out=e)
        e &= 0x7FF
        e -= BIAS
        np.maximum(e, self.m.out.format.min_exponent, out=e)
        e[c == 0] = self.m.floor
        return np.maximum(e, self.m.floor, out=e)

    def _sum_products(self, a: F64, b: F64, scale: F64, lossy: NDArray[np.bool_], total: F64) -> None:
        """total[m, n] = sum_k trunc(a[m, k] b[k, n] scale[m, n])."""
        count = np.count_nonzero(lossy)
        if count > MANY * lossy.size:
            self.products.truncated_sums(a, b, scale, total)
            return
        np.matmul(a, b, out=total)
        total *= scale
        if count:
            i, j = np.divmod(np.flatnonzero(lossy), lossy.shape[1])
            total[i, j] = np.trunc(a[i] * b.T[j] * scale[i, j, None]).sum(axis=1)

    def _write(self, r: F64, c: NDArray[Any]) -> None:
        """Round r into c: to nearest even by the cast itself, or toward zero by clearing what float32 has not."""
        if not self.m.out.nearest:
            small = np.abs(r) < 2.0**self.m.out.format.min_exponent
            np.bitwise_and(r.view(np.int64), ~0x1FFFFFFF, out=r.view(np.int64))
            if np.count_nonzero(small):  # any() would cast, 16 elements at a time
                r[small] = np.trunc(r[small] * 2.0**149) * 2.0**-149
        c[...] = r
        c += 0  # -0 becomes +0
