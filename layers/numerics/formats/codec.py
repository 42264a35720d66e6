"""Encode and decode: float32 values to codes of a format and back, exactly, in blocks that stay in the cache.

Encoding is one rule for every floating format. To round |x| to a multiple of 2^q, q = e - M at exponent e, add
2^(q + 23): the last bit of that sum weighs 2^q, so the processor's own addition rounds to nearest even, and the low
bits of the sum's pattern count the multiples. Clamping e from below to the smallest normal exponent gives gradual
underflow. Decoding is a table of all codes: of all pairs of codes for 8-bit formats, two values per look-up.

NumPy arrays go block by block through preallocated work arrays (whole-array temporaries are 3 to 4 times slower);
CuPy's go in one piece through the same lines.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array

from .formats import BF16, FP16, UE8M0, Format
from .rounding import bf16_array, bf16_bits, to_odd_fp32

Overflow = Literal["saturate", "overflow", "refuse"]
_BLOCK = 32768  # elements, or pairs of them: what a block touches stays in the second-level cache
_ABS, _EXPONENT = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)


def encode(x: Array, fmt: Format, *, overflow: Overflow, name: str = "x") -> Array:
    """The nearest code to each value, ties to the even code.  x (...) -> codes (...) int

    codes are uint8 or uint16, one per element; -0 and the sign of NaN are kept; float64 is rounded once. `overflow` is
    for what rounds beyond the largest finite value, infinities included. "saturate": the largest finite value
    (cvt.rn.satfinite, torch from 2.12). "overflow": infinity, or NaN in E4M3 (ml_dtypes). "refuse": SpecError, for NaN
    too. Raises SpecError naming `name` and the first such element: also NaN for a format without it; and for UE8M0,
    where the rounding has to be said (`scales.encode_scales`).
    """
    require(fmt is not UE8M0, "UE8M0 codes come from scales.encode_scales, which says how a scale is rounded")
    if overflow not in ("saturate", "refuse") and (overflow != "overflow" or fmt.overflow is None):
        raise SpecError(f"{overflow=} for {fmt.name}; expected 'saturate', 'refuse' or, with a NaN, 'overflow'")
    check_values(x, name)
    if fmt is BF16 and overflow == "overflow" and isinstance(x, np.ndarray):  # compiled, and the same rule
        return bf16_array(x).view(np.uint16)
    values = to_odd_fp32(x).reshape(-1)
    codes = np.empty_like(values, dtype=fmt.container)
    step = _BLOCK if isinstance(values, np.ndarray) else max(values.size, 1)
    work = np.empty_like(values, dtype=np.uint32, shape=(2, min(step, values.size)))
    for i in range(0, values.size, step):
        bad = _encode_block(values[i : i + step], fmt, overflow, codes[i : i + step], work)
        if bad is not None:
            at = ", ".join(str(int(k)) for k in np.unravel_index(i + bad, x.shape))
            raise SpecError(f"{name}[{at}] = {float(values[i + bad])} has no code in {fmt.name}, {overflow=}")
    return codes.reshape(x.shape)


def decode(codes: Array, fmt: Format, *, name: str = "codes") -> Array:
    """The value of each code, exact, in float32.  codes (...) int -> x (...)

    codes: uint8 or uint16, or the format's own dtype. Raises SpecError naming `name` for another dtype and for a
    number that is no code of the format (above 15 in E2M1, above 4095 in E5M6).
    """
    codes = as_codes(codes, fmt, name)
    if fmt is FP16:
        return codes.view(np.float16).astype(np.float32)
    if fmt is BF16 and isinstance(codes, np.ndarray):
        return codes.view(ml_dtypes.bfloat16).astype(np.float32)
    if fmt is BF16:
        return (codes.astype(np.uint32) << 16).view(np.float32)
    flat = codes.reshape(-1)
    x = np.empty_like(flat, dtype=np.float32)
    paired = flat.size // 2 * 2 if fmt.bits == 8 else 0
    if paired:
        _look_up(_pairs(fmt), flat[:paired].view(np.uint16), x[:paired].view(np.float64))
    _look_up(fmt.values, flat[paired:], x[paired:])
    return x.reshape(codes.shape)


def round_to(x: Array, fmt: Format, *, overflow: Overflow, name: str = "x") -> Array:
    """decode(encode(x)): values of the format, as float32.  x (...) -> (...)"""
    return decode(encode(x, fmt, overflow=overflow, name=name), fmt)


def as_codes(codes: Array, fmt: Format, name: str = "codes") -> Array:
    """The codes as contiguous uint8 or uint16.  codes (...) int -> (...) int

    Raises SpecError naming `name` for another dtype and for a number that is no code of the format.
    """
    if codes.dtype not in (fmt.container, fmt.dtype):
        raise SpecError(f"{name} has dtype {codes.dtype}; expected {fmt.container} codes of {fmt.name}")
    codes = codes.astype(codes.dtype, order="C", copy=False).view(fmt.container)
    if fmt.bits % 8 and codes.size:
        largest = int(codes.max())
        require(largest < 2**fmt.bits, f"{name} holds {largest}, which is no code of {fmt.name} ({fmt.bits} bits)")
    return codes


def check_values(x: Array, name: str = "x") -> None:
    """SpecError unless x holds values that can be quantised: codes cannot, nor integers."""
    if x.dtype.kind != "f" and x.dtype != BF16.dtype:
        raise SpecError(f"{name} has dtype {x.dtype}; expected floating-point values of 16 bits or more")


def _encode_block(x: Array, fmt: Format, overflow: Overflow, out: Array, work: Array) -> int | None:
    """Writes the codes of one block; the index of the first element that has none, or None. work (2, N) int"""
    if not fmt.exponent:
        return _encode_integers(x, fmt, overflow, out)
    u, a, e = x.view(np.uint32), work[0, : x.size], work[1, : x.size]
    np.bitwise_and(u, _ABS, out=a)
    largest = int(a.max())
    beyond, has_nan = largest > _pattern_of_max(fmt), largest > _EXPONENT
    if has_nan and (overflow == "refuse" or fmt.nan is None):
        return int(np.argmax(np.isnan(x)))
    if beyond:  # up to the next number above, where that is rounded to; else to the largest
        ulp = 0 if overflow == "saturate" else 1 << (23 - fmt.mantissa)
        np.minimum(a, np.uint32(_pattern_of_max(fmt) + ulp), out=a)
    _count_quanta(a, e, fmt)
    out[...] = a  # the low bits
    if beyond and overflow == "refuse" and int(out.max()) > fmt.max_code:
        return int(np.argmax(out > fmt.max_code))
    if has_nan:
        out[np.isnan(x)] = fmt.nan
    np.right_shift(u, 32 - fmt.bits, out=e)
    np.bitwise_and(e, np.uint32(1 << (fmt.bits - 1)), out=e)
    np.bitwise_or(out, e, out=out, casting="unsafe")
    return None


def _count_quanta(a: Array, e: Array, fmt: Format) -> None:
    """Patterns of |x| -> codes in the low bits, in place; e is a work array of the same size."""
    if fmt is BF16:  # 2^(q + 23) could overflow, but the exponents are float32's own
        np.right_shift(bf16_bits(a), 16, out=a)
        return
    shift, field = 23 - fmt.mantissa, fmt.min_exponent + 127
    np.bitwise_and(a, _EXPONENT, out=e)
    np.maximum(e, np.uint32(field << 23), out=e)  # below it: the quantum of the subnormals
    np.add(e, np.uint32(shift << 23), out=e)  # the pattern of 2^(q + 23)
    np.add(a.view(np.float32), e.view(np.float32), out=a.view(np.float32))  # rounds; its low bits count quanta
    np.right_shift(e, shift, out=e)  # the exponent's place in a code
    np.add(a, e, out=a)
    np.subtract(a, np.uint32((shift + field) << fmt.mantissa), out=a)


def _encode_integers(x: Array, fmt: Format, overflow: Overflow, out: Array) -> int | None:
    low, high = -fmt.max_code - 1, fmt.max_code
    nearest = np.rint(x)  # ties to even
    bad = np.isnan(x) if overflow == "saturate" else ~((nearest >= low) & (nearest <= high))
    if bad.any():
        return int(np.argmax(bad))
    out[...] = np.clip(nearest, low, high).astype(np.int8).view(np.uint8)
    return None


def _pattern_of_max(fmt: Format) -> int:
    return int(np.float32(fmt.max).view(np.uint32))


@cache
def _pairs(fmt: Format) -> NDArray[np.float64]:
    """The values of two neighbouring codes, as the float64 with these 64 bits, by their 16 bits (65536,)."""
    code = np.arange(65536, dtype=np.uint16).view(np.uint8)
    return fmt.values[code].view(np.float64)


def _look_up(table: NDArray[Any], index: Array, out: Array) -> None:
    """out = table[index].  table (V), index (N) int, out (N)"""
    if not isinstance(out, np.ndarray):
        out[...] = np.asarray(table, like=out)[index]
        return
    wide = np.empty(min(_BLOCK, index.size), np.intp)
    for i in range(0, index.size, _BLOCK):  # "wrap" skips a buffer that "raise" needs; every index is in range
        part = out[i : i + _BLOCK]
        wide[: part.size] = index[i : i + _BLOCK]
        table.take(wide[: part.size], out=part, mode="wrap")
