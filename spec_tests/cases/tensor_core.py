"""Operands for tensor cores: named classes of random codes, from the ordinary to the malicious."""

import numpy as np

from refimpl.layers.numerics.tensor_cores.machines import INPUTS, carrier
from refimpl.spec_tests.oracles.tensor_core import DTYPES, MACHINES, SMALLEST, WITH_HALF

TARGETS = [(arch, fmt, np.float32) for arch, fmt in MACHINES] + [(arch, fmt, np.float16) for arch, fmt in WITH_HALF]
KINDS = ["gauss", "finite", "specials", "subnormal", "largest", "cancel", "sparse", "powers", "lopsided"]


def all_codes_but(rng, fmt, shape, *, finite):
    """Any codes; only finite ones on demand."""
    f = INPUTS[fmt]
    bits = 32 if fmt == "tf32" else f.bits
    codes = rng.integers(0, 1 << bits, shape, dtype=np.uint64).astype(carrier(f))
    if finite and f.top != "finite":
        with np.errstate(invalid="ignore"):  # signalling NaN
            codes[~np.isfinite(codes.view(DTYPES[fmt]).astype(np.float64))] = 0
    return codes


def cast(x, fmt):
    """Values as codes, what is too large for the format at its largest."""
    f = INPUTS[fmt]
    with np.errstate(all="ignore"):
        values = np.clip(x, -f.max, f.max) if f.bits < 16 else x
        return values.astype(np.float32).astype(DTYPES[fmt]).view(carrier(f))


def codes(rng, fmt, kind, shape):
    """Codes of one class."""
    if kind in ("finite", "specials"):
        found = all_codes_but(rng, fmt, shape, finite=True)
        if kind == "specials":
            found = np.where(rng.random(shape) < 0.003, all_codes_but(rng, fmt, shape, finite=False), found)
            found[rng.random(shape) < 0.003] = INPUTS[fmt].overflow or 0 if fmt != "tf32" else 0x7F800000
        return found.astype(carrier(INPUTS[fmt]))
    x = rng.normal(size=shape)
    if kind == "subnormal":
        x *= 2.0 ** (SMALLEST[fmt] - 1)
    elif kind == "largest":
        x = np.sign(x) * np.float64(INPUTS[fmt].max)
    elif kind == "sparse":
        x = np.where(rng.random(shape) < 0.9, np.copysign(0.0, x), x)
    elif kind == "powers":
        x = np.sign(x) * 2.0 ** rng.integers(-20, 9, shape)
    elif kind == "lopsided":  # one large operand per row, the others just below its quantum
        x = np.sign(x) * (2 - 2.0**-3) * 2.0 ** rng.integers(-16, -5, shape)
        x[..., 0] = 2.0**3
    return cast(x, fmt)


def operands(rng, fmt, kind, m, n, k, accumulator=np.float32):
    """a (m, k), b (n, k), c (m, n) of one class; in "cancel" the second half of k undoes the first."""
    a, b = codes(rng, fmt, kind, (m, k)), codes(rng, fmt, kind, (n, k))
    if kind == "cancel" and k > 1:
        half = k // 2
        a[:, half : 2 * half], b[:, half : 2 * half] = a[:, :half], b[:, :half] ^ sign_bit(fmt)
    return a, b, accumulators(rng, (m, n), accumulator)


def sign_bit(fmt):
    return carrier(INPUTS[fmt]).type(1 << ((32 if fmt == "tf32" else INPUTS[fmt].bits) - 1))


def accumulators(rng, shape, dtype):
    """Zeros, ordinary numbers, numbers of all sizes, or any bits with infinities and NaN."""
    kind = rng.integers(4)
    with np.errstate(over="ignore"):
        if kind < 3:
            return (rng.normal(size=shape) * 2.0 ** rng.integers(-40, 40, shape) ** (kind == 2) * (kind > 0)).astype(
                dtype
            )
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    return rng.integers(0, 1 << 8 * unsigned.itemsize, shape, dtype=np.uint64).astype(unsigned).view(dtype)


def as_bits(x):
    """Patterns: NaN payloads and signs of zero count."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def rows(matmul, a, b, c, **machine):
    """One dot product per row: a, b (n, K), c bits (n,) -> bits (n,)."""
    accumulator = c.view(np.float16 if c.dtype.itemsize == 2 else np.float32)
    return as_bits(matmul(a[:, None], b[:, None], accumulator[:, None, None], **machine))[:, 0, 0]


def blocks(matmul, a, b, c, size=64, **machine):
    """The same rows as matrix products of up to 64 x 64, whose diagonals they are: the fast path, not single dots."""
    accumulator = c.view(np.float16 if c.dtype.itemsize == 2 else np.float32)
    found = []
    for i in range(0, len(a), size):
        at = slice(i, i + size)
        square = np.broadcast_to(accumulator[at], (len(a[at]),) * 2)
        found.append(np.diagonal(as_bits(matmul(a[at], b[at], square, **machine))))
    return np.concatenate(found)
