"""Number formats as data. A format is five numbers; every value, limit and special code follows from them.

A code is [sign | exponent field f | fraction m], and for a floating format its value is

    (-1)^sign * (1 + m / 2^M) * 2^(f - bias)      f > 0
    (-1)^sign * (    m / 2^M) * 2^(1 - bias)      f = 0, the subnormals: the same spacing, no hidden bit

What the largest exponent field means is `top`: "ieee" keeps it for infinity and NaN, "fn" gives up only the one code
with all bits set, "finite" nothing. An integer format has no exponent field and counts in two's complement.

>>> E4M3.max, E4M3.tiny == 2**-9, float(E4M3.values[0x38]), E5M6.max
(448.0, True, 1.0, 65024.0)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Format:
    """One number format: `exponent` and `mantissa` in bits; `bias` of the exponent field.

    `top`: what the largest exponent field holds (see the module). `signed` and `subnormal` are False for UE8M0 only,
    whose field 0 is 2^-127 and which therefore has no zero. `dtype`: NumPy's type of the same codes, if there is one.
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    top: Literal["ieee", "fn", "finite"]
    signed: bool = True
    subnormal: bool = True
    dtype: np.dtype[np.generic] | None = None

    @cached_property
    def bits(self) -> int:
        """Width of a code."""
        return self.signed + self.exponent + self.mantissa

    @cached_property
    def container(self) -> np.dtype[np.generic]:
        """The unsigned type that codes travel in, one code per element: uint8 or uint16."""
        return np.dtype(np.uint8 if self.bits <= 8 else np.uint16)

    @cached_property
    def values(self) -> NDArray[np.float32]:
        """The value of every code, code by code (2^bits,): the definition at the top of this file. Exact in float32."""
        code = np.arange(2**self.bits)
        if not self.exponent:
            return _constant(np.where(code <= self.max_code, code, code - 2**self.bits))
        magnitude = code % 2 ** (self.exponent + self.mantissa)
        field, fraction = np.divmod(magnitude, 2**self.mantissa)
        hidden = (field > 0) | (not self.subnormal)
        scale = np.maximum(field, self.subnormal) - self.bias - self.mantissa
        size = np.ldexp(fraction + hidden * 2.0**self.mantissa, scale)
        size[magnitude > self.max_code] = np.nan
        if self.top == "ieee":
            size[magnitude == self.max_code + 1] = np.inf
        return _constant(np.where(code > magnitude, -size, size))

    @cached_property
    def max_code(self) -> int:
        """Code of the largest finite value."""
        infinite = {"ieee": 1 << self.mantissa, "fn": 1, "finite": 0}[self.top]  # codes of infinity and NaN
        return (1 << (self.exponent + self.mantissa)) - 1 - infinite

    @cached_property
    def max(self) -> float:
        """The largest finite value."""
        return float(self.values[self.max_code])

    @cached_property
    def tiny(self) -> float:
        """The smallest positive value, a subnormal where the format has them."""
        return float(self.values[1 if self.subnormal else 0])

    @cached_property
    def nan(self) -> int | None:
        """The code that stands for NaN (quiet, positive), or None if the format has none."""
        quiet = {"ieee": self.max_code + 1 + 2 ** max(self.mantissa - 1, 0), "fn": self.max_code + 1}
        return quiet.get(self.top)

    @cached_property
    def overflow(self) -> int | None:
        """The code just above the largest finite one: infinity, or NaN in a format without it, or None."""
        return None if self.top == "finite" else self.max_code + 1

    @cached_property
    def min_exponent(self) -> int:
        """The exponent of the smallest normal number, which the subnormals share."""
        return int(self.subnormal) - self.bias


def _constant(values: NDArray[np.number]) -> NDArray[np.float32]:
    table = values.astype(np.float32)
    table.flags.writeable = False
    return table


E4M3 = Format("e4m3fn", 4, 3, 7, "fn", dtype=np.dtype(ml_dtypes.float8_e4m3fn))
"""The format of all FP8 tensors of V3, gradients included (R 3.3.2). Largest 448; no infinity."""
E5M2 = Format("e5m2", 5, 2, 15, "ieee", dtype=np.dtype(ml_dtypes.float8_e5m2))
"""The other FP8 format, which earlier recipes used for gradients (R 3.3.2). Largest 57344."""
E5M6 = Format("e5m6", 5, 6, 15, "ieee")
"""FP16 with four fraction bits fewer: 12 bits for the input of the linear after attention (R 3.3.3). Largest 65024."""
E2M1 = Format("e2m1fn", 2, 1, 1, "finite", dtype=np.dtype(ml_dtypes.float4_e2m1fn))
"""FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; no infinity, no NaN. The elements of MXFP4 and NVFP4."""
UE8M0 = Format("ue8m0", 8, 0, 127, "fn", signed=False, subnormal=False, dtype=np.dtype(ml_dtypes.float8_e8m0fnu))
"""A power of two, 2^(code - 127); 255 is NaN. The scales of DeepSeek-V3.1 and of the MX formats."""
BF16 = Format("bf16", 8, 7, 127, "ieee", dtype=np.dtype(ml_dtypes.bfloat16))
"""The upper half of a float32."""
FP16 = Format("fp16", 5, 10, 15, "ieee", dtype=np.dtype(np.float16))
"""IEEE half precision."""
INT8 = Format("int8", 0, 7, 0, "finite", dtype=np.dtype(np.int8))
"""-128 to 127 in two's complement."""

FORMATS = {f.name: f for f in (E4M3, E5M2, E5M6, E2M1, UE8M0, BF16, FP16, INT8)}
"""Format by name."""
