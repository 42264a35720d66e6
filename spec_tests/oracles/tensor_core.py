"""The tensor-core rule once more, one dot product at a time, in rational numbers: an oracle for refimpl's integers.

Nothing is shared with the code under test: values come from ml_dtypes, exponents from the values' logarithms, the
quantum is a Fraction, and rounding is division.
"""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np

DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "tf32": np.float32,
    "f32": np.float32,
}
SMALLEST = {
    "e4m3": -6,
    "e5m2": -14,
    "e3m2": -2,
    "e2m3": 0,
    "e2m1": 0,
    "bf16": -126,
    "f16": -14,
    "tf32": -126,
    "f32": -126,
}
# (F, L, least E, fraction bits of the result) of fp32 accumulation: the published tables, typed once more
MACHINES = {
    ("volta", "f16"): (23, 4, -131, 23),
    ("turing", "f16"): (24, 8, -132, 23),
    ("ampere", "bf16"): (24, 8, -132, 23),
    ("ampere", "f16"): (24, 8, -132, 23),
    ("ampere", "tf32"): (24, 4, -132, 23),
    ("ada", "e4m3"): (13, 16, -132, 13),
    ("ada", "e5m2"): (13, 16, -132, 13),
    ("ada", "bf16"): (24, 8, -132, 23),
    ("ada", "f16"): (24, 8, -132, 23),
    ("ada", "tf32"): (24, 4, -132, 23),
    ("hopper", "e4m3"): (13, 32, -133, 13),
    ("hopper", "e5m2"): (13, 32, -133, 13),
    ("hopper", "bf16"): (25, 16, -133, 23),
    ("hopper", "f16"): (25, 16, -133, 23),
    ("hopper", "tf32"): (25, 8, -133, 23),
    ("blackwell", "e4m3"): (25, 32, -133, 23),
    ("blackwell", "e5m2"): (25, 32, -133, 23),
    ("blackwell", "e3m2"): (25, 32, -133, 23),
    ("blackwell", "e2m3"): (25, 32, -133, 23),
    ("blackwell", "e2m1"): (25, 32, -133, 23),
    ("blackwell", "bf16"): (25, 16, -133, 23),
    ("blackwell", "f16"): (25, 16, -133, 23),
    ("blackwell", "tf32"): (25, 8, -133, 23),
}
LEAST_E_HALF = {-131: -19, -132: -20, -133: -21}  # with float16 accumulators
WITH_HALF = [k for k in MACHINES if k[1] not in ("bf16", "tf32")]


def number(code, fmt):
    """The value of a code as a float: exact."""
    if fmt == "tf32":
        code = code & ~0x1FFF
    unsigned = np.uint8 if np.dtype(DTYPES[fmt]).itemsize == 1 else np.dtype(f"u{np.dtype(DTYPES[fmt]).itemsize}")
    with np.errstate(invalid="ignore"):  # signalling NaN
        return float(np.array(code, unsigned).view(DTYPES[fmt]).astype(np.float64))


def exponent(x, fmt):
    """floor(log2 |x|), but not below the format's smallest normal exponent."""
    return max(math.frexp(x)[1] - 1, SMALLEST[fmt])


def toward_zero(x):
    return math.floor(abs(x)) * (1 if x > 0 else -1)


def rounded(r, kept, smallest, largest, nearest):
    """The number with `kept` fraction bits next to the Fraction r: below it in size, or nearest, ties to even."""
    if r == 0:
        return 0.0
    size, e = abs(r), smallest
    while size >= Fraction(2) ** (e + 1):
        e += 1
    ulp = Fraction(2) ** (e - kept)
    n = round(size / ulp) if nearest else size // ulp
    value = n * ulp
    if value >= Fraction(2) ** (largest + 1):
        return math.copysign(math.inf, r)
    return float(value) * (1 if r > 0 else -1) + 0.0


def special_sum(values):
    """What IEEE makes of a sum that holds an infinity or a NaN; None if it holds none."""
    infinities = [v for v in values if math.isinf(v)]
    if any(math.isnan(v) for v in values) or len(set(infinities)) > 1:
        return math.nan
    return infinities[0] if infinities else None


def times(x, y):
    """x * y where one may be infinite or NaN, else None."""
    if math.isnan(x) or math.isnan(y):
        return math.nan
    if math.isinf(x) or math.isinf(y):
        return math.nan if x == 0 or y == 0 else math.inf * (1 if (x > 0) == (y > 0) else -1)
    return None


def fused(addends, F, least, kept, half):
    """Align, truncate, add, write.  addends: (exact Fraction, exponent)."""
    e = max([least] + [e for x, e in addends if x != 0])
    quantum = Fraction(2) ** (e - F)
    r = sum(toward_zero(x / quantum) for x, _ in addends) * quantum
    return rounded(r, 10, -14, 15, True) if half else rounded(r, kept, -126, 127, False)


def dot(a, b, c, arch, fmt, half=False, scale=()):
    """The bits of c + sum a b for code lists a, b and the accumulator's bits c; `scale`: exponent per step (mxf8f6f4)."""
    F, L, least, kept = MACHINES[arch, fmt]
    least, out = (LEAST_E_HALF[least], "f16") if half else (least, "f32")
    acc = number(c, out)
    for i, k in enumerate(range(0, len(a), L)):
        shift = scale[i] if len(scale) else 0
        xs, ys = [number(v, fmt) for v in a[k : k + L]], [number(v, fmt) for v in b[k : k + L]]
        odd = [s for s in (times(x, y) for x, y in zip(xs, ys, strict=True)) if s is not None]
        special = special_sum([*odd, acc])
        if special is not None:
            acc = special
            continue
        addends = [
            (Fraction(x) * Fraction(y) * Fraction(2) ** shift, exponent(x, fmt) + exponent(y, fmt) + shift)
            for x, y in zip(xs, ys, strict=True)
            if x and y
        ]
        acc = fused([*addends, (Fraction(acc), exponent(acc, out))], F, least, kept, half)
    return bits(acc, half)


def bits(x, half=False):
    """The accumulator's pattern; NaN is all ones without the sign."""
    if math.isnan(x):
        return 0x7FFF if half else 0x7FFFFFFF
    return int(np.float16(x).view(np.uint16)) if half else int(np.float32(x).view(np.uint32))


def fp4_dot(a, b, c, scale_a, scale_b, scale_value, scale_exponent):
    """One mxf4 or nvf4 instruction: 64 E2M1 codes, a scale per 16; None for a NaN scale."""
    acc = number(c, "f32")
    scales = [scale_value(s) for s in (*scale_a, *scale_b)]
    if math.isnan(acc) or any(math.isnan(s) for s in scales):
        return bits(math.nan)
    if math.isinf(acc):
        return bits(acc)
    addends = [(Fraction(acc), exponent(acc, "f32"))]
    for g in range(4):
        pairs = zip(a[16 * g : 16 * g + 16], b[16 * g : 16 * g + 16], strict=True)
        ps = [Fraction(number(x, "e2m1")) * Fraction(number(y, "e2m1")) for x, y in pairs]
        s = Fraction(scale_value(scale_a[g])) * Fraction(scale_value(scale_b[g]))
        if any(ps) and s:
            addends.append((sum(ps) * s, scale_exponent(scale_a[g]) + scale_exponent(scale_b[g])))
        assert len(ps) == 16
    cancelled = [e for x, e in addends[1:] if x == 0]  # these set E, though they add nothing
    e = max([-139, *cancelled] + [e for x, e in addends if x != 0])
    quantum = Fraction(2) ** (e - 35)
    return bits(rounded(sum(toward_zero(x / quantum) for x, _ in addends) * quantum, 23, -126, 127, False))
