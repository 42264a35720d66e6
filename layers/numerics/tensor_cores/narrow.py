"""Steps of the fast form for FP8 with F = 13 (Hopper, Ada): everything in float32, and every float32 operation exact.

With q = 2^(E - 13): b / q is a code's significand times a power of two, a b / q has at most 8 significant bits, the
truncated products are integers below 2^15, and the sum of 32 of them stays below 2^20.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .exact import Block, Part, Products, aligned, finite
from .machines import Machine, carrier
from .text import Codes

F32 = NDArray[np.float32]

BASE = 8  # bits per exponent in the max-plus product: a sum of 32 products stays below 2^6 times the largest
ROWS = 32  # rows per block: 256 KB arrays, so that a block stays in the second-level cache
EXPONENT = 0x7F800000  # the exponent field of a float32
LOW_BITS = np.int32(~0x3FF)  # clears what E8M13 does not keep


class Narrow:
    """Tables over the 256 codes: value (float32, NaN and infinity as 0) and the two factors of the max-plus product.

    2^(8 (e_a - mid)) times 2^(8 (e_b - mid) + 1) has the biased exponent 128 + 8 (e_p - 2 mid) in float32 (1024 + ...
    in float64), so dividing by 8 is a shift. E4M3 needs 29 exponents, which fit in float32; E5M2 needs 59: float64.
    """

    def __init__(self, m: Machine):
        f = m.format
        codes = np.arange(256, dtype=carrier(f))
        _, exponent, value = finite(codes, f)
        self.value = value.astype(np.float32)
        highest = int(exponent[self.value != 0].max())
        mid = (f.min_exponent + highest) // 2
        small = highest - f.min_exponent < 15
        self.tropical: Any = np.float32 if small else np.float64
        power = np.where(self.value != 0, np.ldexp(1.0, BASE * (exponent - mid)), 0)
        self.left, self.right = power.astype(self.tropical), (2 * power).astype(self.tropical)
        self.word: Any = np.int32 if small else np.int64
        self.shift = (23 if small else 52) + BASE.bit_length() - 1
        self.offset = 127 - ((128 if small else 1024) // BASE - 2 * mid)  # from G's shifted field to a float32's


narrow = cache(Narrow)
"""The tables of a machine, built once."""


class NarrowSteps:
    """Work arrays, and the steps of a panel of operands on a block of columns."""

    def __init__(self, m: Machine, columns: int):
        self.m, self.tables = m, narrow(m)
        self.products = Products(m.L, columns, np.float32)
        self.b: F32 = aligned((m.L, columns), np.float32)
        self.right: Block = aligned((m.L, columns), self.tables.tropical)
        self.g: Block = aligned((ROWS, columns), self.tables.tropical)
        self.exponents: Block = aligned((ROWS, columns), np.int32)
        self.scale: F32 = aligned((ROWS, columns), np.float32)
        self.sum: F32 = aligned((ROWS, columns), np.float32)
        self.work: F32 = aligned((ROWS, columns), np.float32)

    def panel(self, a: Part, b: Part, c: F32) -> None:
        """c += a bᵀ, step by step.  a (M, P), b (columns, P), c (M, columns) in place; no block scales here."""
        for k in range(0, a[0].shape[1], self.m.L):
            left, right = a[0][:, k : k + self.m.L], b[0][:, k : k + self.m.L].T
            value, tropical = (x[: len(right), : right.shape[1]] for x in (self.b, self.right))
            np.take(self.tables.value, right, out=value, mode="clip")
            np.take(self.tables.right, right, out=tropical, mode="clip")
            for i in range(0, len(left), ROWS):
                self._step(left[i : i + ROWS], value, tropical, c[i : i + ROWS])

    def _step(self, a: Codes, b: F32, tropical: Block, c: F32) -> None:
        """One instruction step.  a codes (R, L), b values (L, columns), c (R, columns) in place."""
        g, scale, total, work = (x[: len(a), : b.shape[1]] for x in (self.g, self.scale, self.sum, self.work))
        e = self.exponents[: len(a), : b.shape[1]]
        np.matmul(self.tables.left[a], tropical, out=g)
        no_product = None if g.min() > 0 else g == 0  # g.all() would cast, 16 elements at a time
        np.right_shift(g.view(self.tables.word), self.tables.shift, out=e, casting="same_kind")  # E_p, shifted
        e += self.tables.offset
        e <<= 23
        np.bitwise_and(c.view(np.int32), EXPONENT, out=scale.view(np.int32))
        np.maximum(e, scale.view(np.int32), out=e)  # E as the exponent field of a float32
        np.subtract((2 * 127 + self.m.F) << 23, e.view(np.uint32), out=scale.view(np.uint32))  # 2^(F - E)
        self.products.truncated_sums(self.tables.value[a], b, scale, total)
        np.multiply(c, scale, out=work)
        np.trunc(work, out=work)
        total += work
        e -= self.m.F << 23  # 2^(E - F)
        np.multiply(total, e.view(np.float32), out=work)
        if no_product is not None:  # only zeros: the accumulator is its own largest addend
            np.copyto(work, c, where=no_product)
        np.bitwise_and(work.view(np.int32), LOW_BITS, out=work.view(np.int32))
        np.add(work, 0, out=c)  # -0 becomes +0
