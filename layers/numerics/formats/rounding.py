"""Roundings by name: searching for these names lists every rounding point of the specification. Bits in, bits out."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.tensor import Array


def to_bf16(x: Array) -> Array:
    """Round to the nearest bfloat16, ties to even; the result is a float32 array of bfloat16 values. NaN stays NaN.

    One rounding, also from float64.
    """
    if isinstance(x, np.ndarray):
        return bf16_array(x).astype(np.float32)
    return (bf16_bits(to_odd_fp32(x).view(np.uint32)) & np.uint32(0xFFFF0000)).view(np.float32)


def bf16_array(x: NDArray[Any]) -> NDArray[Any]:
    """The same rounding by ml_dtypes, to its bfloat16: compiled, so faster than `bf16_bits`. NumPy arrays only."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        rounded: NDArray[Any] = to_odd_fp32(x).astype(ml_dtypes.bfloat16)
    return rounded


def bf16_bits(u: Array) -> Array:
    """float32 patterns, rounded so that the upper half is the nearest bfloat16; the lower half means nothing.

    Adding 0x7fff plus the last kept bit carries into it exactly when the dropped half is above, or at, one half with
    an odd last bit; a NaN becomes the quiet one instead, since the carry could make it an infinity.
    """
    rounded = u + (((u >> 16) & 1) + np.uint32(0x7FFF))
    is_nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, (u & np.uint32(0x80000000)) | np.uint32(0x7FC00000), rounded)


def to_fp32(x: Array) -> Array:
    """The nearest float32, ties to even; beyond it infinity, silently."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float32, copy=False)


def to_odd_fp32(x: Array) -> Array:
    """Values as float32, ready to be rounded once more: exact from narrower types, rounded to odd from float64.

    Rounding float64 to float32 and then to a narrow format rounds twice: 1.0625 + 2^-40 becomes the tie 1.0625 and
    then 1.0 in E4M3, where 1.125 is nearest. Rounding to odd in between (toward zero, and the last bit set if that is
    inexact) keeps what is above a tie above it, so that the second rounding is right.
    """
    nearest = to_fp32(x)
    if x.dtype != np.float64:
        return nearest
    with np.errstate(invalid="ignore"):
        wide = nearest.astype(np.float64)
        inexact = np.isfinite(x) & (wide != x)
        outward = inexact & (np.abs(wide) > np.abs(x))  # one step back toward zero, from infinity too
    bits = nearest.view(np.uint32) - outward.astype(np.uint32)
    return (bits | inexact.astype(np.uint32)).view(np.float32)
