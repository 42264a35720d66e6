"""Quantisers: values in tiles to codes and one scale per tile, x = code * scale. 1 x 128 for activations and their
gradients, 128 x 1 for the operands of Wgrad, 128 x 128 for weights (R 3.3.2): groups lie along the axis that a GEMM
sums over.

Public kernels agree on the idea and differ in the last bits. Each way is a `Dialect`; DIALECTS names those of DeepSeek.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.layers.numerics.formats import BF16, E4M3, UE8M0, Format
from refimpl.layers.numerics.formats.codec import Overflow, as_codes, check_values, decode, encode
from refimpl.layers.numerics.formats.rounding import to_bf16, to_fp32

from .by_bits import reaches, times_scales
from .scales import PowerOfTwo, encode_scales, round_up_to_power_of_two
from .tiles import Tile, as_rows, as_tile, check_tiled, chunks, grid, per_tile, refuse_tiles, tile_amax

_SMALLEST = np.float32(2.0**-126)  # a subnormal scale would lose bits, or be 0


@dataclass(frozen=True)
class Dialect:
    """How a tile's scale and codes come about, every operation in float32, rounded to nearest even.

    `clamp`: floor under amax = max |x|, or under the scale if `clamps` says so. Without it a tile of zeros gets scale 1
    (amax / 448 would be 0, and 0 / 0 NaN).
    `scale`: s = amax / max, or amax * (1 / max) with a rounded reciprocal; max is the format's largest value.
    `power_of_two`: s rounded up, before anything is divided by it, and by which rule (`round_up_to_power_of_two`).
    `quotient`: the codes are of x / s, x * (1 / s), or x * (max / amax); all the same for a power of two.
    """

    clamp: float | None = 1e-4
    clamps: Literal["amax", "scale"] = "amax"
    scale: Literal["amax / max", "amax * (1 / max)"] = "amax / max"
    power_of_two: PowerOfTwo | None = None
    quotient: Literal["x / s", "x * (1 / s)", "x * (max / amax)"] = "x / s"


V3 = Dialect()
DIALECTS = {
    "deepseek_v3": V3,  # inference/kernel.py act_quant since 2025-08-27
    "deepseek_v3_unclamped": replace(V3, clamp=None),  # before; ours when a checkpoint is written
    "deepseek_v31": replace(V3, power_of_two="log2"),  # kernel.py with scale_fmt "ue8m0"
    "deepseek_v32": replace(V3, scale="amax * (1 / max)"),  # V3.2-Exp inference/kernel.py
    "deepseek_v32_ue8m0": replace(V3, scale="amax * (1 / max)", power_of_two="bits"),  # also DeepGEMM's mega MoE
    "deepgemm": replace(V3, quotient="x * (1 / s)"),  # DeepGEMM utils/math.py
    "deepgemm_ue8m0": replace(V3, quotient="x * (1 / s)", power_of_two="bits"),
    "tilekernels": replace(V3, quotient="x * (max / amax)"),  # TileKernels get_sf_and_inv; DeepEP likewise
    "tilekernels_ue8m0": replace(V3, quotient="x * (max / amax)", power_of_two="bits"),
    "flashmla": replace(V3, clamps="scale", power_of_two="log2"),  # FlashMLA tests/quant.py
}
"""The dialects of DeepSeek's own code by name. For the sources see `Dialect` and the comments here."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """Codes (M, K) in tiles of r x c, and float32 scales (ceil(M/r), ceil(K/c)) to multiply them with.

    With one row per tile, any leading axes: codes (..., K), scales (..., ceil(K/c)). Raises SpecError naming `name`,
    and the block, for codes of another format, for scales of another shape (the grid transposed, say), and for a scale
    that is not finite and positive or so large that the largest code would overflow.
    """

    codes: Array
    scales: Array
    tile: Tile
    fmt: Format = E4M3
    name: str = "x"

    def __post_init__(self) -> None:
        """Check everything; codes and scales are then uint8 or uint16, and float32."""
        tile, name = as_tile(self.tile), self.name
        codes = as_codes(self.codes, self.fmt, f"{name} codes")
        check_tiled(codes, tile, f"{name} codes")
        wanted, got = grid(codes.shape, tile), self.scales.shape
        if got != wanted:
            tiles = f"{codes.shape} in blocks of {tile[0]} x {tile[1]}"
            raise SpecError(f"{name} scales have shape {got}; expected {wanted} for codes {tiles}")
        if self.scales.dtype.kind != "f" and self.scales.dtype not in (BF16.dtype, UE8M0.dtype):
            says = f"{name} scales have dtype {self.scales.dtype}"
            raise SpecError(f"{says}; expected numbers, or codes whose dtype is float8_e8m0fnu")
        with np.errstate(over="ignore"):  # beyond float32 it is Inf, and refused
            scales = self.scales.astype(np.float32)
        largest = np.finfo(np.float32).max / np.float32(self.fmt.max)
        bad = ~((scales > 0) & (scales <= largest))
        says = f"{name} scale is not finite, positive and at most {largest:.3g} for {{block}}"
        refuse_tiles(bad, codes.shape, tile, says)
        for field, value in (("codes", codes), ("scales", scales), ("tile", tile)):
            object.__setattr__(self, field, value)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        shape: tuple[int, ...] = self.codes.shape
        return shape

    @property
    def T(self) -> Quantized:
        """The transposed matrix without a rounding: codes, scales and tile all turned. How Dgrad reads a weight."""
        require(self.codes.ndim == 2, f"{self.name} has shape {self.shape}; only a matrix is transposed")
        return replace(self, codes=self.codes.T, scales=self.scales.T, tile=self.tile[::-1])

    @property
    def scale_codes(self) -> Array:
        """The scales as UE8M0 codes. SpecError if one is no power of two: the payload was divided by that one."""
        return encode_scales(self.scales, rounding="exact", name=f"{self.name} scales")

    def dequantize(self, *, bf16: bool = False) -> Array:
        """RN_f32(code * scale), then bfloat16 if asked (`weight_dequant` of kernel.py stores that).  -> (M, K)"""
        if reaches(self.codes, self.scales, self.tile, self.fmt):
            y = times_scales(self.codes, self.scales, self.tile)
        else:
            x, s = _matrices(decode(self.codes, self.fmt), self.scales, self.tile)
            y = per_tile(np.multiply, x, s, self.tile, out=x).reshape(self.shape)
        return to_bf16(y) if bf16 else y

    def requantize(self, tile: int | Tile, dialect: str | Dialect = V3, fmt: Format | None = None) -> Quantized:
        """The same values in other tiles or scales: dequantise, then quantise.

        Wgrad's operands go from 1 x 128 to 128 x 1 this way (R 3.3.3), weights to power-of-two scales for kernels that
        take no others. From and to powers of two, only what underflows is rounded a second time.
        """
        return quantize(self.dequantize(), tile, dialect=dialect, fmt=fmt or self.fmt, name=self.name)


def quantize(
    x: Array, tile: int | Tile = (1, 128), *, dialect: str | Dialect = V3, fmt: Format = E4M3, name: str = "x"
) -> Quantized:
    """codes = encode(x / s), s = max(amax, 1e-4) / 448 of each tile; the dialect may change how.  x (M, K)

    With one row per tile, any leading axes: x (..., K). x counts as float32. Raises SpecError naming `name` and the
    block that holds NaN or Inf.
    """
    tile = as_tile(tile)
    codes, scales = np.empty_like(x, dtype=fmt.container, order="C"), _empty_scales(x, tile, name)
    codes_2d, scales_2d = _matrices(codes, scales, tile)
    for rows, tiles, part, (s, op, factor) in _chunks(x, tile, _dialect(dialect), fmt, name):
        scales_2d[tiles] = s
        codes_2d[rows] = encode(per_tile(op, part, factor, tile), fmt, overflow="refuse", name=name)
    return Quantized(codes, scales, tile, fmt, name)


def tile_scales(
    x: Array, tile: int | Tile = (1, 128), *, dialect: str | Dialect = V3, fmt: Format = E4M3, name: str = "x"
) -> Array:
    """The scales of `quantize`, alone.  x (M, K) -> (ceil(M/r), ceil(K/c))"""
    tile = as_tile(tile)
    scales = _empty_scales(x, tile, name)
    for _, tiles, _, (s, *_) in _chunks(x, tile, _dialect(dialect), fmt, name):
        _matrices(x, scales, tile)[1][tiles] = s
    return scales


def quantize_with(
    x: Array, scales: Array, tile: int | Tile = (1, 128), *, overflow: Overflow, fmt: Format = E4M3, name: str = "x"
) -> Quantized:
    """codes = encode(x / s) with scales made elsewhere, which x may overflow.  x (M, K)

    scales have the shape that `tile_scales` gives. `overflow` as in `encode`: V3.2's kernel clamps to the largest value
    ("saturate"), a bare cast gives NaN ("overflow"). Raises SpecError naming `name` for what Quantized refuses, and
    for overflow that is refused.
    """
    tile = as_tile(tile)
    check_values(x, name)
    check_tiled(x, tile, name)
    shell = Quantized(np.zeros_like(x, dtype=fmt.container, order="C"), scales, tile, fmt, name)  # checks the scales
    divided = per_tile(np.divide, *_matrices(to_fp32(x), shell.scales, tile), tile).reshape(x.shape)
    return replace(shell, codes=encode(divided, fmt, overflow=overflow, name=f"{name} / scale"))


_Divisor = tuple[Array, Callable[..., Array], Array]  # s, and (op, f) such that codes are of op(x, f)


def _chunks(
    x: Array, tile: Tile, how: Dialect, fmt: Format, name: str
) -> Iterator[tuple[slice, slice, Array, _Divisor]]:
    """(rows, rows of tiles, their float32 values, their scales), a piece at a time."""
    matrix = as_rows(x) if tile[0] == 1 else x
    for rows, tiles in chunks(matrix, tile):
        part = to_fp32(matrix[rows])
        amax = tile_amax(part, tile)
        if not np.isfinite(amax).all():
            bad = ~np.isfinite(tile_amax(to_fp32(matrix), tile).reshape(grid(x.shape, tile)))
            refuse_tiles(bad, x.shape, tile, f"{name}: {{block}} holds NaN or Inf; expected finite values")
        yield rows, tiles, part, _divisor(amax, how, np.float32(fmt.max))


def _divisor(amax: Array, how: Dialect, largest: np.float32) -> _Divisor:
    """Scales of tiles whose largest magnitudes are amax (R, C)."""
    clamp = np.float32(how.clamp or 0)
    a = np.where(amax == 0, largest, amax) if how.clamp is None else amax
    a = np.maximum(a, clamp if how.clamps == "amax" else 0)
    a = np.maximum(a, largest * _SMALLEST)
    s = a / largest if how.scale == "amax / max" else a * (np.float32(1) / largest)
    s = np.maximum(s, clamp if how.clamps == "scale" else 0)
    if how.power_of_two:
        s = round_up_to_power_of_two(s, how.power_of_two)
    elif how.quotient == "x * (1 / s)":
        return s, np.multiply, np.float32(1) / s
    elif how.quotient == "x * (max / amax)":
        return s, np.multiply, largest / a
    return s, np.divide, s


def _dialect(dialect: str | Dialect) -> Dialect:
    if isinstance(dialect, Dialect):
        return dialect
    require(dialect in DIALECTS, f"dialect {dialect!r}; known: {', '.join(DIALECTS)}")
    return DIALECTS[dialect]


def _empty_scales(x: Array, tile: Tile, name: str) -> Array:
    check_values(x, name)
    check_tiled(x, tile, name)
    return np.empty_like(x, dtype=np.float32, order="C", shape=grid(x.shape, tile))


def _matrices(x: Array, scales: Array, tile: Tile) -> tuple[Array, Array]:
    """x (..., K) and scales (..., ceil(K/c)) as matrices: views."""
    return (as_rows(x), as_rows(scales)) if tile[0] == 1 else (x, scales)
