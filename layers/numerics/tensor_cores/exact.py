"""What the two fast forms share: operands as finite values, work arrays on cache lines, the truncating sum of products."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.layers.numerics.formats import Format

from .text import Codes, Ints, decode, ieee_class

Block = NDArray[Any]
Part = tuple[Codes, Ints | None]
"""Codes (R, P), and the exponents of their block scales (R, steps) or None."""


def finite(codes: Codes, f: Format) -> tuple[Ints, Ints, NDArray[np.float64]]:
    """Rule 1 with NaN and infinity as 0.  codes (...) -> significand (...), exponent (...), value (...)."""
    significand, exponent = decode(codes, f)
    significand = np.where(np.isfinite(ieee_class(codes, f)), significand, 0)
    return significand, exponent, np.ldexp(significand.astype(np.float64), exponent - f.mantissa)


def aligned(shape: tuple[int, ...], dtype: Any) -> Block:
    """An uninitialised array that begins on a cache line; np.empty promises 16 bytes, and broadcasts slow down."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    block: Block = raw[start : start + size].view(dtype).reshape(shape)
    return block


class Products:
    """Work arrays for the products of L operands and `columns` outputs, in the dtype in which they are exact."""

    def __init__(self, L: int, columns: int, dtype: Any):
        self.products = aligned((L, columns), dtype)
        self.ones = np.ones((1, L), dtype)

    def truncated_sums(self, a: Block, b: Block, scale: Block, out: Block) -> None:
        """out[m, n] = sum_k trunc(a[m, k] b[k, n] scale[m, n]).  The hot loop: four passes over (L, columns)."""
        products, ones = self.products[: len(b), : b.shape[1]], self.ones[:, : len(b)]
        for m in range(len(a)):
            np.multiply(b, scale[m], out=products)
            np.multiply(products, a[m][:, None], out=products)
            np.trunc(products, out=products)
            np.matmul(ones, products, out=out[m : m + 1])
