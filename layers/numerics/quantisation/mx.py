"""Block formats of Blackwell tensor cores. MX: blocks of 32 along the last axis and a power-of-two scale, so they are
`Quantized` with tiles of 1 x 32, their scale codes `scale_codes`. NVFP4: blocks of 16, E4M3 scales, and one float32
scale for the tensor. `packing` puts two 4-bit codes in a byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers.numerics.formats import E2M1, E4M3, Format
from refimpl.layers.numerics.formats.codec import as_codes, check_values, decode, encode
from refimpl.layers.numerics.formats.rounding import to_fp32

from .quantise import Dialect, Quantized, quantize, quantize_with
from .scales import refuse
from .tiles import as_rows, check_tiled, grid, per_tile, refuse_tiles, tile_amax

MX_TILE, NV_TILE = (1, 32), (1, 16)
_LEAST = np.float32(2.0**-118)
"""The least tensor scale: times the smallest E4M3 scale, 2^-9, it still has a reciprocal in float32."""


def quantize_mx(x: Array, fmt: Format = E4M3, *, scale: Literal["down", "up"] = "up", name: str = "x") -> Quantized:
    """MXFP8 (E4M3, E5M2) or MXFP4 (E2M1): codes of x / s, s a power of two per 32.  x (..., K)

    scale "up": s = 2^ceil(log2(amax / max)), and nothing saturates (DeepGEMM, cuBLAS). "down": s = 2^(floor(log2 amax)
    - emax), emax the exponent of the largest code: the conversion of the OCP MX specification 1.0, section 6.3, in
    which what lies above max * s saturates. A block of zeros has s = 1. Raises SpecError naming `name` and the block
    that holds NaN or Inf.
    """
    require(scale in ("up", "down"), f"scale={scale!r}; expected 'up' or 'down'")
    if scale == "up":
        return quantize(x, MX_TILE, dialect=Dialect(clamp=None, power_of_two="bits"), fmt=fmt, name=name)
    amax = _block_amax(x, MX_TILE, name)
    exponent = np.frexp(amax)[1] - np.frexp(np.float32(fmt.max))[1]  # floor(log2 amax) - emax
    s = np.where(amax == 0, np.float32(1), np.ldexp(np.float32(1), np.maximum(exponent, -127)))
    return quantize_with(x, s, MX_TILE, overflow="saturate", fmt=fmt, name=name)


@dataclass(frozen=True, eq=False)
class NVFP4:
    """x = code * scale * tensor_scale: E2M1 codes (..., K), E4M3 scale codes (..., ceil(K/16)), a float32.

    A scale may be zero, its block is then zero. Raises SpecError naming `name` for other shapes, codes out of E2M1,
    scales that are NaN or negative, and a tensor scale that is not finite and positive.
    """

    codes: Array
    scales: Array
    tensor_scale: np.float32
    name: str = "x"

    def __post_init__(self) -> None:
        """Check everything; codes and scales are then uint8."""
        codes = as_codes(self.codes, E2M1, f"{self.name} codes")
        scales = as_codes(self.scales, E4M3, f"{self.name} scales")
        check_tiled(codes, NV_TILE, f"{self.name} codes")
        wanted = grid(codes.shape, NV_TILE)
        require(scales.shape == wanted, f"{self.name} scales have shape {scales.shape}; expected {wanted}")
        refuse(scales > E4M3.max_code, scales, f"{self.name} scale code{{at}} is {{value}}: NaN or negative")
        fine = 0 < self.tensor_scale <= np.finfo(np.float32).max / (E2M1.max * E4M3.max)
        require(fine, f"{self.name} tensor scale is {self.tensor_scale}; expected finite and positive")
        object.__setattr__(self, "codes", codes)
        object.__setattr__(self, "scales", scales)

    def dequantize(self) -> Array:
        """RN(code * scale * tensor_scale); the first product is exact.  -> (..., K)"""
        x, s = as_rows(decode(self.codes, E2M1)), as_rows(decode(self.scales, E4M3))
        return per_tile(np.multiply, x, s, NV_TILE, out=x).reshape(self.codes.shape) * self.tensor_scale


def quantize_nvfp4(x: Array, *, tensor_scale: float | None = None, name: str = "x") -> NVFP4:
    """s = e4m3(amax_16 / 6 / g), codes = e2m1(x * (1 / (s g))), g = amax / (448 * 6).  x (..., K)

    NVIDIA's recipe (arXiv 2509.25149): divisions by g are multiplications with 2688 / amax in float32. A given
    tensor_scale replaces g; scales and codes then saturate. g is at least 2^-118. Raises SpecError naming `name` and the
    block that holds NaN or Inf.
    """
    amax = _block_amax(x, NV_TILE, name)
    whole = amax.max() if amax.size else np.float32(0)
    largest = np.float32(E4M3.max * E2M1.max)
    encoding = largest / np.maximum(whole, largest * _LEAST) if whole else np.float32(1)
    if tensor_scale is not None:
        fine = _LEAST <= tensor_scale < np.inf
        require(fine, f"{name} tensor_scale={tensor_scale}; expected finite and positive, at least 2^-118")
        encoding = np.float32(1) / np.float32(tensor_scale)
    g = np.float32(1) / encoding
    scales = encode(amax / np.float32(E2M1.max) * encoding, E4M3, overflow="saturate", name=f"{name} scales")
    s = decode(scales, E4M3) * g
    factor = np.where(s > 0, np.float32(1) / np.where(s > 0, s, np.float32(1)), np.float32(0))
    scaled = per_tile(np.multiply, as_rows(to_fp32(x)), as_rows(factor), NV_TILE).reshape(x.shape)
    return NVFP4(encode(scaled, E2M1, overflow="saturate", name=name), scales, g, name)


def encode_e2m1_ties_down(x: Array) -> Array:
    """E2M1 codes with ties toward zero and no -0: DeepGEMM's FP4 helper (utils/math.py).  x (...) -> codes (...) int

    Its boundaries are strict: 0.75 becomes 0.5 and 1.75 becomes 1.5, where `encode`, like cvt.rn, takes the even code.
    """
    midpoints = (E2M1.values[:7] + E2M1.values[1:8]) / 2
    size = (np.abs(to_fp32(x))[..., None] > np.asarray(midpoints, like=x)).sum(axis=-1).astype(np.uint8)
    return size | np.where((x < 0) & (size > 0), 8, 0).astype(np.uint8)


def _block_amax(x: Array, tile: tuple[int, int], name: str) -> Array:
    """max |x| of blocks along the last axis; SpecError for NaN or Inf.  x (..., K) -> (..., ceil(K/c))"""
    check_values(x, name)
    check_tiled(x, tile, name)
    amax = tile_amax(as_rows(to_fp32(x)), tile).reshape(grid(x.shape, tile))
    refuse_tiles(~np.isfinite(amax), x.shape, tile, f"{name}: {{block}} holds NaN or Inf; expected finite values")
    return amax
