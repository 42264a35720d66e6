"""The fast form of text.py: the same bits from BLAS and whole-array operations, proven equal by the tests.

Ideas, in order of effect:

* The largest product exponent of every output is a max-plus product. Write 2^(B e) for every operand: the sum over k of
  2^(B (e_a + e_b)) has the exponent B max(e_a + e_b) + r with 0 <= r < B as long as there are at most 2^(B-1) products,
  so one small GEMM gives E for all outputs, whatever the order in which the BLAS adds.
* Then every product is scaled by 2^(F - E), truncated and summed. For F = 13 the integers and their sums fit in float32
  (narrow.py), where any order of summation gives the same bits; for F >= 23 they fit in float64, where
  moreover many outputs lose nothing, and one GEMM gives their sum (wide.py).
* np.setbufsize(16): the buffer of NumPy's ufunc iterator would otherwise be used to copy broadcast operands (2 x).

Memory is bounded by blocks: some ten megabytes beside operands and result, and a copy of the result if it is tall or holds
special values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.layers.numerics.formats import UE8M0, Format

from . import block_scaled as scaled
from . import text as integer
from .machines import TO_E8M13, Machine, carrier, infinity, magnitude_mask
from .narrow import NarrowSteps
from .text import Codes, Ints
from .wide import WideSteps

COLUMNS = 2048  # outputs per row of a block: the vector axis, 8 KB of float32
ROWS = 256  # outputs per column, where a temporary of the size of the result is needed
PANEL = 128  # k per prepared panel of operands
TINY = 64  # outputs per matrix up to which the integer form, which takes all matrices at once, is as fast


def tensor_core_matmul(a: Codes, b: Codes, c: NDArray[Any], *, arch: str, fmt: str) -> NDArray[Any]:
    """d = c + a bᵀ as the tensor core computes it.  a (..., M, K), b (..., N, K), c (..., M, N) -> d (..., M, N).

    a and b are codes of `fmt`: uint8 for "e4m3", "e5m2" and, on blackwell, "e3m2", "e2m3", "e2m1" (low bits); uint16
    for "bf16" and "f16"; uint32 for "tf32"; or arrays of the dtype itself. c and d are float32, or float16 where the
    machine has float16 accumulators. `arch` is "hopper", "ada", "ampere", "blackwell", "volta" or "turing". Leading
    axes broadcast, and c broadcasts to (M, N). Raises SpecError naming the operand whose dtype, shape or codes are
    wrong, and for a pair (arch, fmt) that does not exist. `text.tensor_core_matmul` says what the bits are.
    """
    m, a, b, d = integer.operands(a, b, c, arch, fmt)
    if d.shape[-2] * d.shape[-1] <= TINY:
        return integer.matmul_codes(m, a, b, d)
    d = d.copy()
    for i in np.ndindex(d.shape[:-2]):
        accumulate(Operand(a[i], m.format), Operand(b[i], m.format), d[i], m)
    return d


def mxf8f6f4(a: Codes, b: Codes, c: NDArray[Any], scale_a: Codes, scale_b: Codes, *, fmt: str = "e4m3") -> NDArray[Any]:
    """d = c + sum_k 2^(x_a + x_b) a_k b_k, x = scale code - 127: `block_scaled.mxf8f6f4`, and its bits, faster.

    a (..., M, K), b (..., N, K), c (..., M, N), scale_a (..., M, ceil(K/32)), scale_b (..., N, ceil(K/32)) -> as c
    """
    m, a, b, d = scaled.mx_operands(a, b, c, fmt)
    named = ((scale_a, a, "scale_a"), (scale_b, b, "scale_b"))
    sa, sb = (scaled.scale_codes(s, x, m.L, UE8M0, name) for s, x, name in named)
    d = d.copy()
    for i in np.ndindex(d.shape[:-2]):
        left, right = (Operand(x[i], m.format, s[i].astype(np.int64) - UE8M0.bias) for x, s in ((a, sa), (b, sb)))
        accumulate(left, right, d[i], m)
        nan = (sa[i] == UE8M0.nan).any(axis=1)[:, None] | (sb[i] == UE8M0.nan).any(axis=1)
        d[i][nan] = np.array(m.out.nan, carrier(m.out.format)).view(d.dtype)
    return d


class Operand:
    """Codes (R, K), the exponents of their block scales (R, steps) if any, and which rows hold a NaN or an infinity."""

    def __init__(self, codes: Codes, f: Format, shift: Ints | None = None):
        self.codes, self.shift = codes, shift
        top = (codes & carrier(f).type(magnitude_mask(f))).max(axis=1)
        limit = infinity(f) if f.top == "ieee" else magnitude_mask(f) - (f.top == "fn")
        self.nan, self.infinite = top > limit, (top == limit) & (f.top == "ieee")

    def part(self, rows: slice, k: slice, L: int) -> tuple[Codes, Ints | None]:
        """Codes and shifts of some rows and of k from a multiple of L on."""
        return self.codes[rows, k], None if self.shift is None else self.shift[rows, k.start // L : -(-k.stop // L)]


def accumulate(a: Operand, b: Operand, c: NDArray[Any], m: Machine) -> None:
    """c += a bᵀ in place.  a (M, K), b (N, K), accumulator c (M, N)."""
    if c.shape[0] > c.shape[1]:  # the longer axis is the vector axis
        turned = np.ascontiguousarray(c.T)
        accumulate(b, a, turned, m)
        c[...] = turned.T
        return
    infinite = bool(a.infinite.any() or b.infinite.any())
    start = c.copy() if infinite or not np.isfinite(c).all() else None
    with _small_buffers(), np.errstate(over="ignore", invalid="ignore", under="ignore"):
        _finite(a, b, c, m)
        if infinite and start is not None:
            for i in range(0, len(c), ROWS):
                _infinities(a, b, slice(i, i + ROWS), c, start, m)
    nan = np.array(m.out.nan, carrier(m.out.format)).view(c.dtype)
    c[np.isnan(c) | a.nan[:, None] | b.nan | (False if start is None else np.isnan(start))] = nan


def _finite(a: Operand, b: Operand, c: NDArray[Any], m: Machine) -> None:
    """All steps in the order of k; NaN and infinite operands count as zero here."""
    columns = min(COLUMNS, c.shape[1])
    steps = NarrowSteps(m, columns) if m.out is TO_E8M13 else WideSteps(m, columns)
    for n in range(0, c.shape[1], columns):
        block = slice(n, n + columns)
        for k in range(0, a.codes.shape[1], PANEL):
            panel = slice(k, k + PANEL)
            steps.panel(a.part(slice(None), panel, m.L), b.part(block, panel, m.L), c[:, block])


def _infinities(a: Operand, b: Operand, rows: slice, c: NDArray[Any], start: NDArray[Any], m: Machine) -> None:
    """Put what infinite operands give into rows of c, which holds the finite part.  c, start (M, N).

    The sum of the classes (rule 7) says what comes out, unless the finite part is not finite either, because it began
    so or overflowed: then the order of the steps matters, and the integer form decides.
    """
    s = _class_sums(a.codes[rows], b.codes, m.format)
    i, j = np.nonzero(np.isinf(s) & ~np.isfinite(c[rows]))
    np.copyto(c[rows], s, where=~np.isfinite(s), casting="same_kind")
    i += rows.start
    shift = None if a.shift is None or b.shift is None else a.shift[i] + b.shift[j]
    c[i, j] = integer.chain(a.codes[i], b.codes[j], start[i, j].view(carrier(m.out.format)), m, shift).view(c.dtype)


def _class_sums(a: Codes, b: Codes, f: Format) -> NDArray[np.float32]:
    """sum_k a_k b_k on classes: +-inf, NaN, or 0 for anything finite.  a (M, K), b (N, K) -> (M, N).

    By counting, since a BLAS may skip zeros: `total` infinite products, `net` of them positive less negative, and `bad`
    products of an infinity and a zero.
    """
    bad, total, net = np.zeros((3, len(a), len(b)), np.float32)
    for k in range(0, a.shape[1], PANEL):
        (za, fa, ia), (zb, fb, ib) = _signs(a[:, k : k + PANEL], f), _signs(b[:, k : k + PANEL], f)
        bad += abs(ia) @ zb.T + za @ abs(ib).T
        total += abs(ia) @ abs(fb + ib).T + abs(fa) @ abs(ib).T
        net += ia @ (fb + ib).T + fa @ ib.T
    infinite = np.where(total > 0, np.copysign(np.float32(np.inf), net), np.float32(0))
    return np.where((bad > 0) | (abs(net) < total), np.float32(np.nan), infinite)


def _signs(x: Codes, f: Format) -> tuple[NDArray[np.float32], ...]:
    """Ones where x is zero, signs where it is finite and not zero, signs where it is infinite; NaN is nowhere."""
    kind = integer.ieee_class(x, f)
    sign = np.sign(np.nan_to_num(kind, nan=0.0))
    return tuple(y.astype(np.float32) for y in (kind == 0, sign * np.isfinite(kind), sign * np.isinf(kind)))


@contextmanager
def _small_buffers() -> Iterator[None]:
    """Buffers of 16 elements for NumPy's ufuncs, in this thread, until the block ends."""
    before = np.setbufsize(16)
    try:
        yield
    finally:
        np.setbufsize(before)
