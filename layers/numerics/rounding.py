"""Roundings by name: searching for these names lists every rounding point of the specification. Bits in, bits out."""

from __future__ import annotations

import numpy as np

from refimpl.autograd.tensor import Array


def to_bf16(x: Array) -> Array:
    """Round float32 to the nearest bfloat16, ties to even; the result is a float32 array of bfloat16 values. NaN
    stays NaN.

    Adding 0x7fff plus the last kept bit to the pattern carries into it exactly when the dropped half is above, or at,
    one half with an odd last bit; a NaN is given its quiet bit instead, since the carry could make it an infinity.
    """
    x = x.astype(np.float32)
    u = x.view(np.uint32)
    rounded = (u + (((u >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), (u | np.uint32(0x00400000)) & np.uint32(0xFFFF0000), rounded).view(np.float32)
