"""Scales: from the largest magnitude of a tile to the number its codes are multiplied with, and to UE8M0 codes."""

from __future__ import annotations

from typing import Literal

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.layers.numerics.formats import UE8M0, decode

PowerOfTwo = Literal["bits", "log2"]
ScaleRounding = Literal["exact", "up", "down", "nearest"]


def round_up_to_power_of_two(s: Array, by: PowerOfTwo = "bits") -> Array:
    """2^ceil(log2 s), float32.  s (...) -> (...)

    "bits" is exact: one more than the exponent field unless the fraction is zero (V3.2, DeepGEMM, TileKernels, DeepEP).
    "log2" is DeepSeek-V3's kernel.py: log2 is rounded to float32 before the ceiling, so that a scale a few units above
    a power of two is taken for the power; beyond 2^4 or below 2^-3 that always happens one unit above. (On a GPU log2
    is an approximation besides; here it is the correctly rounded one.)
    """
    if by == "log2":
        return np.exp2(np.ceil(np.log2(s.astype(np.float64)).astype(np.float32))).astype(np.float32)
    return np.ldexp(np.float32(1), _ceil_log2(s))


def encode_scales(
    s: Array, *, rounding: ScaleRounding, overflow: Literal["saturate", "refuse"] = "refuse", name: str = "scales"
) -> Array:
    """UE8M0 codes of positive scales, code = log2(s) + 127.  s (...) -> codes (...) int

    rounding: "exact" refuses what is no power of two: the codes then stand for the scales that the payload was
    divided by. "up" is DeepSeek's when a scale is made, "down" that of the MX formats, "nearest" (ties up) that of a
    cast in ml_dtypes and torch, which is wrong for making scales. Beyond 2^127 and 2^-127: refused, or saturated.
    Raises SpecError naming `name` and the first bad scale: zero, negative, NaN, infinite, or refused.
    """
    check_scales(s, name)
    mantissa, exponent = np.frexp(s)  # s = mantissa 2^exponent, mantissa in [0.5, 1)
    upward = {"exact": mantissa != 0.5, "up": mantissa != 0.5, "down": mantissa < 0, "nearest": mantissa >= 0.75}
    require(rounding in upward, f"rounding={rounding!r}; expected one of {', '.join(upward)}")
    if rounding == "exact":
        refuse(upward["exact"], s, f"{name}{{at}} is {{value}}; expected a power of two")
    log2 = exponent - 1 + upward[rounding]
    if overflow == "refuse":
        refuse((log2 > 127) | (log2 < -127), s, f"{name}{{at}} is {{value}}; expected 2^-127 to 2^127")
    return (np.clip(log2, -127, 127) + 127).astype(np.uint8)


def decode_scales(codes: Array, *, name: str = "scales") -> Array:
    """s = 2^(code - 127), float32.  codes (...) int -> s (...). Raises SpecError for code 255, which is NaN."""
    s = decode(codes, UE8M0, name=name)
    check_scales(s, name)
    return s


def check_scales(s: Array, name: str = "scales") -> None:
    """SpecError naming the first scale that is not a finite positive number.  s (...)"""
    require(s.dtype.kind == "f", f"{name} has dtype {s.dtype}; expected floating-point scales")
    refuse(~((s > 0) & np.isfinite(s)), s, f"{name}{{at}} is {{value}}; expected finite and positive")


def refuse(bad: Array, values: Array, message: str) -> None:
    """SpecError with the message, {at} and {value} filled in for the first bad element, if there is one."""
    if bad.any():
        index = np.unravel_index(int(np.argmax(bad)), bad.shape)
        at = tuple(int(k) for k in index)
        count = int(bad.sum())
        more = f" (and {count - 1} more)" if count > 1 else ""
        shown = f"[{', '.join(map(str, at))}]" if at else ""
        raise SpecError(message.format(at=shown, value=float(values[at])) + more)


def _ceil_log2(s: Array) -> Array:
    mantissa, exponent = np.frexp(s)
    return exponent - (mantissa == 0.5)
