"""Block-scaled FP8 weights: one float32 scale per 128 x 128 block (R 3.3.2; README_WEIGHTS.md of
DeepSeek-V3).

`weight_scale_inv` is, its name notwithstanding, the number to multiply the codes with. Blocks are
counted from row 0 and column 0; the last ones may be ragged (kv_a_proj_with_mqa has 576 = 4.5 * 128
rows). The block size is a setting: inferring it as ceil(rows / scale rows) gives 116 for those 576
rows, and a silently wrong matrix (TensorRT-LLM #14793). Everything works one row of blocks at a
time, so that the memory beside the result stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.errors import SpecError, require

Block = int | tuple[int, int]
ScaleFormat = Literal["ue8m0"] | None
F32 = NDArray[np.float32]

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = np.float32(448)
_LARGEST_CODE = {E4M3: E4M3_MAX, np.dtype(ml_dtypes.float8_e5m2): np.float32(57344)}
_SMALLEST_SCALE = np.float32(2.0**-126)  # a subnormal amax / 448 would lose bits, or be 0


def dequantize_blocks(codes: NDArray[Any], scale_inv: NDArray[Any], block: Block = 128) -> F32:
    """w[o, i] = codes[o, i] * scale_inv[o // b, i // b].  codes (O, I), scale_inv -> w (O, I).

    scale_inv has shape (ceil(O/b), ceil(I/b)). codes: float8_e4m3fn or float8_e5m2; scale_inv: any
    float dtype; one float32 multiplication per element, as in the `weight_dequant` kernel of
    DeepSeek-V3's inference/kernel.py. Raises SpecError for another shape of scale_inv, and for a
    scale that is not finite, not positive, or so large that the largest code would overflow.
    """
    known = codes.dtype in _LARGEST_CODE
    require(known, f"codes have dtype {codes.dtype}; expected float8_e4m3fn or float8_e5m2")
    b_rows, b_cols = _check_block(codes, block)
    scales = _float32(scale_inv)  # (ceil(O/b), ceil(I/b))
    _check_scales(scales, codes, (b_rows, b_cols))
    value_of = np.arange(256, dtype=np.uint8).view(codes.dtype).astype(np.float32)  # (256,), exact
    w = np.empty(codes.shape, np.float32)
    for i, rows in _row_blocks(codes.shape[0], b_rows):
        w[rows] = value_of[codes[rows].view(np.uint8)]
        w[rows] *= _spread(scales[i], b_cols, codes.shape[1])
    return w


def quantize_blocks(w: NDArray[Any], block: Block = 128, *, scale_fmt: ScaleFormat = None) -> tuple[NDArray[Any], F32]:
    """codes = e4m3(w / s), s = amax / 448 per block.  w (O, I) -> codes (O, I), s.

    s has shape (ceil(O/b), ceil(I/b)). w is taken as float32 and codes round to nearest even;
    `dequantize_blocks(codes, s)` gives w back up to that rounding. An all-zero block gets the scale
    1 (amax / 448 would be 0, and 0 / 0 NaN). scale_fmt "ue8m0": s rounded up to a power of two
    *before* the division (DeepSeek-V3.1). Raises SpecError naming the block that holds NaN or Inf.
    """
    b_rows, b_cols = _check_block(w, block)
    scales = block_scales(w, block, scale_fmt=scale_fmt)
    codes = np.empty(w.shape, E4M3)
    for i, rows in _row_blocks(w.shape[0], b_rows):
        scaled = _float32(w[rows]) / _spread(scales[i], b_cols, w.shape[1])  # within +-448
        codes[rows] = scaled.astype(E4M3)
    return codes, scales


def block_scales(w: NDArray[Any], block: Block = 128, *, scale_fmt: ScaleFormat = None) -> F32:
    """s = max |w| / 448 over each block: the scales of `quantize_blocks`.

    w (O, I) -> s (ceil(O/b), ceil(I/b))
    """
    b_rows, b_cols = _check_block(w, block)
    scales = np.empty((-(-w.shape[0] // b_rows), -(-w.shape[1] // b_cols)), np.float32)
    for i, rows in _row_blocks(w.shape[0], b_rows):
        column_max = np.abs(_float32(w[rows])).max(axis=0)  # (I,)
        scales[i] = np.maximum.reduceat(column_max, np.arange(0, w.shape[1], b_cols))
    bad = np.argwhere(~np.isfinite(scales))
    if bad.size:
        at = _name_block(bad, w, (b_rows, b_cols))
        raise SpecError(f"{at} holds NaN or Inf; expected finite weights")
    scales = np.where(scales == 0, np.float32(1), np.maximum(scales / E4M3_MAX, _SMALLEST_SCALE))
    return _round_up_to_power_of_two(scales) if scale_fmt == "ue8m0" else scales


def _round_up_to_power_of_two(s: F32) -> F32:
    """2^ceil(log2 s), exact: s = m 2^e, m in [0.5, 1); m = 0.5 is a power of two already."""
    mantissa, exponent = np.frexp(s)
    power: F32 = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    return power


def _float32(a: NDArray[Any]) -> F32:
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes Inf, which the checks name
        return np.asarray(a).astype(np.float32)


def _spread(scales: F32, b_cols: int, width: int) -> F32:
    """One scale per column.  scales (ceil(I/b),) -> (I,)."""
    spread: F32 = np.repeat(scales, b_cols)[:width]
    return spread


def _row_blocks(height: int, b_rows: int) -> Iterator[tuple[int, slice]]:
    return ((i, slice(start, start + b_rows)) for i, start in enumerate(range(0, height, b_rows)))


def _check_block(w: NDArray[Any], block: Block) -> tuple[int, int]:
    require(w.ndim == 2, f"blocks tile a matrix; got shape {w.shape}")
    b_rows, b_cols = (block, block) if isinstance(block, int) else block
    require(b_rows >= 1 and b_cols >= 1, f"block size {block} must be positive")
    return b_rows, b_cols


def _check_scales(scales: F32, codes: NDArray[Any], block: tuple[int, int]) -> None:
    grid = tuple(-(-n // b) for n, b in zip(codes.shape, block, strict=True))
    if scales.shape != grid:
        tiles = f"{codes.shape} in blocks of {block[0]} x {block[1]}"
        raise SpecError(f"scale_inv has shape {scales.shape}; expected {grid} for codes {tiles}")
    largest = np.finfo(np.float32).max / _LARGEST_CODE[codes.dtype]
    bad = np.argwhere(~((scales > 0) & (scales <= largest)))
    if bad.size:
        value, at = scales[tuple(bad[0])], _name_block(bad, codes, block)
        raise SpecError(f"scale_inv is {value} for {at}; expected finite, positive, at most {largest:.3g}")


def _name_block(bad: NDArray[Any], w: NDArray[Any], block: tuple[int, int]) -> str:
    """`block (3, 0) = rows 384:512, columns 0:128` for the first of the bad blocks."""
    (i, j), (r, c) = bad[0], block
    stop_row, stop_col = min((i + 1) * r, w.shape[0]), min((j + 1) * c, w.shape[1])
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return f"block ({i}, {j}) = rows {i * r}:{stop_row}, columns {j * c}:{stop_col}{more}"
