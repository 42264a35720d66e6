"""Tensor cores as data: the bit fields of a code, and four numbers per machine. The rule is in text.py.

Sources: MMA-Sim (arXiv 2511.10909); Khattak and Mikaitis, arXiv 2512.07004; measured H100, L40S, Ada and B200 outputs
(docs/tensor_core.md says which row was held against which hardware).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics.formats import BF16, E2M1, E4M3, E5M2, Format, formats

F16 = formats.FP16
E3M2 = Format("e3m2fn", 3, 2, 3, "finite", dtype=np.dtype(ml_dtypes.float6_e3m2fn))
E2M3 = Format("e2m3fn", 2, 3, 1, "finite", dtype=np.dtype(ml_dtypes.float6_e2m3fn))
TF32 = Format("tf32", 8, 10, 127, "ieee", dtype=np.dtype(np.float32))
"""The upper 19 bits of a float32: the tensor core cuts the 13 others off, it does not round."""
F32 = Format("fp32", 8, 23, 127, "ieee", dtype=np.dtype(np.float32))

INPUTS = {
    "e4m3": E4M3,
    "e5m2": E5M2,
    "e3m2": E3M2,
    "e2m3": E2M3,
    "e2m1": E2M1,
    "bf16": BF16,
    "f16": F16,
    "tf32": TF32,
}
"""Input formats by the name that `fmt` arguments use."""


def carrier(f: Format) -> np.dtype[Any]:
    """The unsigned dtype in which codes travel: uint8, uint16 or uint32."""
    return np.dtype(np.uint8 if f.bits <= 8 else np.uint16 if f.bits <= 16 else np.uint32)


def magnitude_mask(f: Format) -> int:
    """All bits of a code but the sign."""
    return (1 << (f.bits - 1)) - 1


def sign_bit(f: Format) -> int:
    """The code of -0."""
    return 1 << (f.bits - 1)


def infinity(f: Format) -> int:
    """The code of +infinity in a format that has one."""
    assert f.top == "ieee", f
    return ((1 << f.exponent) - 1) << f.mantissa


@dataclass(frozen=True)
class Out:
    """How a sum is written: into `format`, keeping `kept` fraction bits, toward zero or to nearest even."""

    format: Format
    kept: int
    nearest: bool
    nan: int


TO_E8M13 = Out(F32, 13, False, 0x7FFFFFFF)
"""Float32 whose low 10 bits are zero: the 14 significant bits that the V3 report measured (R 3.3.2)."""
TO_FP32 = Out(F32, 23, False, 0x7FFFFFFF)
"""Float32, rounded toward zero."""
TO_FP16 = Out(F16, 10, True, 0x7FFF)
"""Float16, rounded to nearest even."""


@dataclass(frozen=True)
class Machine:
    """Truncated fused dot-add: `L` products and the accumulator per step, `F` fraction bits below the exponent E.

    `floor` is the least E, seen only where every addend is tiny.
    """

    format: Format
    F: int
    L: int
    floor: int
    out: Out


def _rows(arch: str, formats: str, F: int, L: int, floor: int, out: Out = TO_FP32) -> dict[tuple[str, str], Machine]:
    return {(arch, f): Machine(INPUTS[f], F, L, floor, out) for f in formats.split()}


MACHINES = {
    **_rows("volta", "f16", 23, 4, -131),
    **_rows("turing", "f16", 24, 8, -132),
    **_rows("ampere", "bf16 f16", 24, 8, -132),
    **_rows("ampere", "tf32", 24, 4, -132),
    **_rows("ada", "e4m3 e5m2", 13, 16, -132, TO_E8M13),
    **_rows("ada", "bf16 f16", 24, 8, -132),
    **_rows("ada", "tf32", 24, 4, -132),
    **_rows("hopper", "e4m3 e5m2", 13, 32, -133, TO_E8M13),  # wgmma; mma.sync converts FP8 to f16: use the f16 row
    **_rows("hopper", "bf16 f16", 25, 16, -133),
    **_rows("hopper", "tf32", 25, 8, -133),
    **_rows("blackwell", "e4m3 e5m2 e3m2 e2m3 e2m1", 25, 32, -133),  # tcgen05; RTX Blackwell's mma.sync likewise
    **_rows("blackwell", "bf16 f16", 25, 16, -133),
    **_rows("blackwell", "tf32", 25, 8, -133),
}
"""(arch, fmt) -> machine with float32 accumulators."""
_HALF_INPUTS = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "f16")  # bf16 and tf32 accumulate in float32 only


def machine(arch: str, fmt: str, accumulator: Any = np.float32) -> Machine:
    """The machine for this architecture, input format and accumulator dtype (float32, or float16 where it exists).

    With float16 accumulators F and L stay, the result is rounded to nearest even, and the floor keeps its distance
    from the smallest exponent of the accumulator: -133 + 126 = -21 + 14. Raises SpecError with what is known.
    """
    if (arch, fmt) not in MACHINES:
        known = ", ".join(f"{a} {f}" for a, f in MACHINES)
        raise SpecError(f"arch {arch!r} with fmt {fmt!r}; expected one of: {known}")
    found = MACHINES[arch, fmt]
    if np.dtype(accumulator) == np.float32:
        return found
    if np.dtype(accumulator) == np.float16 and fmt in _HALF_INPUTS:
        return replace(found, floor=found.floor + F16.min_exponent - F32.min_exponent, out=TO_FP16)
    raise SpecError(
        f"accumulator dtype {np.dtype(accumulator)} with fmt {fmt}; expected float32 (or float16 where the \
inputs are FP16 or narrower)"
    )
