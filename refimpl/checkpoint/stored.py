"""A tensor as it will be stored: cast to float32 or bfloat16, or as FP8 codes with scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import require, where
from refimpl.layers.numerics.formats.rounding import to_odd_fp32
from refimpl.layers.numerics.quantisation.blocks import ScaleFormat, block_scales, quantize_blocks

from .header import DTYPES, NAMES
from .names import BIAS, SCALE, is_fp8
from .safetensors import Array, Pending

Dtype = Literal["bfloat16", "float32", "fp8"]
STORED = {"bfloat16": "BF16", "float32": "F32", "fp8": "BF16"}


Make = Callable[[], Array]


@runtime_checkable
class _Stored(Protocol):
    """What a Checkpoint offers beyond a dict: shapes for free, and FP8 codes as they are."""

    block: tuple[int, int]
    scale_fmt: ScaleFormat

    def shape(self, name: str) -> tuple[int, ...]: ...

    def raw(self, name: str) -> tuple[Array, Array | None]: ...

    def dtype(self, name: str) -> str: ...


@dataclass(frozen=True)
class Plan:
    """How tensors become stored ones: target dtype, block size and scale format of FP8."""

    tensors: Mapping[str, Array]
    dtype: Dtype
    block: tuple[int, int]
    scale_fmt: ScaleFormat

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it where the source can tell."""
        t = self.tensors
        return t.shape(name) if isinstance(t, _Stored) else tuple(np.shape(t[name]))

    def pending(self, name: str, part: tuple[slice, ...] = ()) -> dict[str, Pending]:
        """The tensor, or a part of it, under its canonical name; an FP8 one with its scales."""
        shape = _shape_of_part(self.shape(name), part)
        if self.dtype == "fp8" and is_fp8(name) and len(shape) == 2:
            return self._fp8(name, shape, part)
        stored = "F32" if name.endswith(BIAS) else STORED[self.dtype]
        return {name: Pending(stored, shape, lambda: _cast(name, self._read(name, part), stored))}

    def _fp8(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...]) -> dict[str, Pending]:
        grid = tuple(-(-n // b) for n, b in zip(shape, self.block, strict=True))
        codes, scales = self._passed_on(name, part) or self._quantised(name, part)
        return {name: Pending("F8_E4M3", shape, codes), name + SCALE: Pending("F32", grid, scales)}

    def _quantised(self, name: str, part: tuple[slice, ...]) -> tuple[Make, Make]:
        def codes() -> Array:
            with where(f"while quantising {name}"):
                return quantize_blocks(self._read(name, part), self.block, scale_fmt=self.scale_fmt)[0]

        def scales() -> Array:
            with where(f"while quantising {name}"):
                return block_scales(self._read(name, part), self.block, scale_fmt=self.scale_fmt)

        return codes, scales

    def _passed_on(self, name: str, part: tuple[slice, ...]) -> tuple[Make, Make] | None:
        """Codes and scales as they are, if the source is a checkpoint of the same FP8 format."""
        t = self.tensors
        if not isinstance(t, _Stored) or t.dtype(name) != "F8_E4M3":
            return None
        if (t.block, t.scale_fmt) != (self.block, self.scale_fmt):
            return None
        blocks = tuple(_in_blocks(s, b) for s, b in zip(part, self.block, strict=False))
        return (
            lambda: t.raw(name)[0][part],
            lambda: np.asarray(t.raw(name)[1])[blocks].astype(np.float32),
        )

    def _read(self, name: str, part: tuple[slice, ...]) -> Array:
        whole = np.asarray(self.tensors[name])
        ok = NAMES.get(whole.dtype) in ("F64", "F32", "F16", "BF16")
        require(ok, f"tensor {name!r}: dtype {whole.dtype}; expected a float of 16 bits or more")
        return whole[part] if part else whole


def _shape_of_part(shape: tuple[int, ...], part: tuple[slice, ...]) -> tuple[int, ...]:
    cut = tuple(len(range(n)[s]) for n, s in zip(shape, part, strict=False))
    return cut + shape[len(part) :]


def _in_blocks(s: slice, block: int) -> slice:
    """A slice of elements, aligned to blocks, as a slice of blocks."""
    return s if s.start is None else slice(s.start // block, s.stop // block)


# ------------------------------------------------------------------------------------------ values


def _cast(name: str, a: Array, stored: str) -> Array:
    """One rounding, to nearest even. Raises SpecError where a finite value becomes infinite."""
    target = DTYPES[stored]
    if a.dtype == target:
        return a
    with np.errstate(over="ignore"):
        to = to_odd_fp32(a) if a.dtype == np.float64 and target == ml_dtypes.bfloat16 else a
        cast = to.astype(target)
    lost = int(np.count_nonzero(np.isfinite(a))) - int(np.count_nonzero(np.isfinite(cast)))
    require(lost == 0, f"tensor {name!r}: {lost} finite values overflow {stored}")
    return cast
