"""Block-scaled FP8 weights as checkpoints store them: one float32 scale per 128 x 128 block (R 3.3.2;
README_WEIGHTS.md of DeepSeek-V3).

`weight_scale_inv` is, its name notwithstanding, the number to multiply the codes with. The block size is a setting of
the checkpoint, see `tiles`. These are the quantisers of `quantise` for matrices that travel with ml_dtypes' dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.errors import require
from refimpl.layers.numerics.formats import E4M3, E5M2

from .quantise import DIALECTS, Dialect, Quantized, quantize, tile_scales
from .tiles import as_tile

Block = int | tuple[int, int]
ScaleFormat = Literal["ue8m0"] | None
F32 = NDArray[np.float32]


def dequantize_blocks(codes: NDArray[Any], scale_inv: NDArray[Any], block: Block = 128, *, name: str = "weight") -> F32:
    """w[o, i] = codes[o, i] * scale_inv[o // b, i // b].  codes (O, I), scale_inv -> w (O, I).

    scale_inv has shape (ceil(O/b), ceil(I/b)). codes: float8_e4m3fn or float8_e5m2; scale_inv: any float dtype; one
    float32 multiplication per element, as in the `weight_dequant` kernel of DeepSeek-V3's inference/kernel.py. Raises
    SpecError naming `name` for another shape of scale_inv, and for a scale that is not finite, not positive, or so
    large that the largest code would overflow.
    """
    fmt = {E4M3.dtype: E4M3, E5M2.dtype: E5M2}.get(codes.dtype)
    require(fmt, f"{name} codes have dtype {codes.dtype}; expected float8_e4m3fn or float8_e5m2")
    require(codes.ndim == 2, f"{name} has shape {codes.shape}; blocks tile a matrix")
    assert fmt is not None
    w: F32 = Quantized(codes, scale_inv, as_tile(block), fmt, name).dequantize()
    return w


def quantize_blocks(
    w: NDArray[Any], block: Block = 128, *, scale_fmt: ScaleFormat = None, name: str = "weight"
) -> tuple[NDArray[Any], F32]:
    """codes = e4m3(w / s), s = amax / 448 per block.  w (O, I) -> codes (O, I), s.

    s has shape (ceil(O/b), ceil(I/b)). w is taken as float32 and codes round to nearest even; `dequantize_blocks(codes,
    s)` gives w back up to that rounding. An all-zero block gets the scale 1 (amax / 448 would be 0, and 0 / 0 NaN).
    scale_fmt "ue8m0": s rounded up to a power of two *before* the division (DeepSeek-V3.1). Raises SpecError naming
    `name` and the block that holds NaN or Inf.
    """
    require(w.ndim == 2, f"{name} has shape {w.shape}; blocks tile a matrix")
    q = quantize(w, block, dialect=_dialect(scale_fmt), name=name)
    assert E4M3.dtype is not None
    return q.codes.view(E4M3.dtype), q.scales


def block_scales(w: NDArray[Any], block: Block = 128, *, scale_fmt: ScaleFormat = None, name: str = "weight") -> F32:
    """s = max |w| / 448 over each block: the scales of `quantize_blocks`.

    w (O, I) -> s (ceil(O/b), ceil(I/b))
    """
    require(w.ndim == 2, f"{name} has shape {w.shape}; blocks tile a matrix")
    s: F32 = tile_scales(w, block, dialect=_dialect(scale_fmt), name=name)
    return s


def _dialect(scale_fmt: ScaleFormat) -> Dialect:
    return replace(DIALECTS["deepseek_v3_unclamped"], power_of_two="bits" if scale_fmt == "ue8m0" else None)


def quantization_settings(config: Mapping[str, Any]) -> tuple[tuple[int, int], ScaleFormat]:
    """weight_block_size and scale_fmt of a config's quantization_config; 128 x 128 and None if
    unsaid.

    Raises SpecError for block sizes that are not two positive integers and for unknown formats.
    """
    quantization = config.get("quantization_config") or {}
    ok = isinstance(quantization, Mapping)
    require(ok, f"quantization_config is {quantization!r}; expected an object")
    block = quantization.get("weight_block_size") or [128, 128]
    ok = isinstance(block, list | tuple) and len(block) == 2
    ok = ok and all(type(b) is int and b > 0 for b in block)
    require(ok, f"weight_block_size is {block!r}; expected two positive integers")
    scale_fmt = quantization.get("scale_fmt")
    require(scale_fmt in (None, "ue8m0"), f"scale_fmt is {scale_fmt!r}; expected 'ue8m0' or null")
    return (block[0], block[1]), scale_fmt
