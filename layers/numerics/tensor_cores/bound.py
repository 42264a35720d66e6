"""How wrong a scaled GEMM can be, before seeing a number: from format, tile, accumulation and K alone.

    |computed - x wᵀ| <= relative * (|x| |w|ᵀ) + absolute * sum over groups g of n_g A_g B_g        elementwise

A_g and B_g are the largest magnitudes of the two tiles of group g (not below the quantiser's clamp), n_g its length. The
first term carries every rounding that is relative to a number, the second what is lost below the smallest normal code
of a tile. Nothing statistical: errors of random data add up like sqrt(K) and stay far below; constructed data come
within a factor of two (spec_tests/r3_3_fp8/test_error_bound.py has both).

Where the coefficients come from, with u = r / (1 + r), r = 2^-(fraction bits + 1) of the format, and v = 2^-24:

* quantising changes a code's value by at most u |x| + A eta / max, eta being half the smallest subnormal; twice the
  second part when scales are rounded up to powers of two; a few v for the quotient.
* a step of a tensor core cuts as many addends as it has products by less than a quantum 2^(E - F) each (the largest
  addend loses nothing), and the sum by less than 2^-kept of itself. 2^E is at most the largest addend, or, where that
  has a subnormal operand, at most min normal / max of the tiles' largest product. Truncation never makes a partial sum
  larger than the sum of magnitudes, so the steps of an interval add up.
* a promotion rounds once or twice and adds to a sum of up to K / interval terms; a float32 chain of n terms is off by at
  most n v / (1 - n v). Results below 2^-126 are not covered: float32 loses them absolutely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.errors import require
from refimpl.layers.numerics.formats import E4M3, Format
from refimpl.layers.numerics.quantisation.tiles import Tile, as_tile, tile_amax

from .gemm import FMT, MODES, Mode
from .machines import machine

V = 2.0**-24  # unit roundoff of float32
QUOTIENT = (
    4 * V
)  # rounding the scale, its reciprocal and the product or quotient, and the format's own rounding of that


@dataclass(frozen=True)
class Bound:
    """The two coefficients of the bound in the module's first formula."""

    relative: float
    absolute: float

    def elementwise(
        self, x: NDArray[Any], w: NDArray[Any], tile_x: int | Tile, tile_w: int | Tile, clamp: float = 1e-4
    ) -> NDArray[np.float64]:
        """The bound for these values.  x (M, K), w (N, K) -> (M, N).  Tiles and clamp as the quantiser had them."""
        size_x, size_w = (np.abs(np.asarray(t, np.float64)) for t in (x, w))
        group = min(as_tile(tile_x)[1], x.shape[1])
        length = np.minimum(group, x.shape[1] - np.arange(0, x.shape[1], group))  # n_g
        a, b = (_amax(t, as_tile(tile), clamp) for t, tile in ((size_x, tile_x), (size_w, tile_w)))
        bound: NDArray[np.float64] = self.relative * (size_x @ size_w.T) + self.absolute * ((a * length) @ b.T)
        return bound

    def after(self, u: float, eta: float) -> Bound:
        """This accumulation bound of quantised values as one of the values before, which change by u |x| + eta A."""
        relative = 2 * u + u * u + self.relative * (1 + u) ** 2
        return Bound(relative, (2 * (1 + u) * eta + eta * eta) * (1 + self.relative) + self.absolute * (1 + eta) ** 2)


def scaled_gemm_bound(
    depth: int,
    *,
    mode: str = "deepgemm_sm90",
    fmt: Format = E4M3,
    tile: int = 128,
    interval: int | None = None,
    power_of_two: bool = False,
) -> Bound:
    """Quantisation and accumulation together: the distance of `scaled_gemm(quantize(x), quantize(w))` from x wᵀ.

    `depth` is K, `tile` the tile's length along k; `power_of_two` says that scales were rounded up to powers of two.
    Raises SpecError for what is not a mode, a format of it, or a positive size.
    """
    half_subnormal = fmt.tiny / 2
    eta = half_subnormal / fmt.max * (2 if power_of_two else 1) * (1 + QUOTIENT)
    u = 1 / (2.0 ** (fmt.mantissa + 1) + 1) + QUOTIENT
    return accumulation_bound(depth, mode=mode, fmt=fmt, tile=tile, interval=interval).after(u, eta)


def accumulation_bound(
    depth: int, *, mode: str = "deepgemm_sm90", fmt: Format = E4M3, tile: int = 128, interval: int | None = None
) -> Bound:
    """The distance of `scaled_gemm(a, b)` from the exact product of the quantised values, in terms of those."""
    require(mode in MODES, f"mode {mode!r}; known: {', '.join(MODES)}")
    require(fmt.name in FMT, f"format {fmt.name}; expected {' or '.join(FMT)}")
    require(
        depth > 0 and tile > 0 and (interval or 1) > 0, f"K {depth}, tile {tile}, interval {interval}; all positive"
    )
    how, group = MODES[mode], min(tile, depth)
    length = depth if how.interval is None else min(interval or how.interval, group)
    inner = _interval_bound(length, how, fmt)
    promotions = sum(-(-min(group, depth - g) // length) for g in range(0, depth, group))
    outer = _promotion(promotions, how)
    return Bound(inner.relative * (1 + outer) + outer, inner.absolute * (1 + outer))


def _interval_bound(length: int, how: Mode, fmt: Format) -> Bound:
    """One sum D over an interval, before promotion."""
    if how.scales == "exact":
        return Bound(0.0, 0.0)
    if how.arch is None:
        return Bound(length * V / (1 - length * V), 0.0)
    m = machine(how.arch, how.fmt or FMT[fmt.name])
    steps = -(-length // m.L)
    subnormal = 2 * 2.0**fmt.min_exponent / fmt.max  # an operand below 2^emin, beside the tile's largest
    return Bound(length * 2.0**-m.F + steps * 2.0**-m.out.kept, 2.0**-m.F * subnormal)


def _promotion(count: int, how: Mode) -> float:
    """Relative error of scaling and adding `count` terms."""
    if how.scales == "inside":
        return 0.0
    unit = 2.0**-53 if how.scales == "exact" else V
    roundings = count + (1 if how.fma else 2)
    return roundings * unit / (1 - roundings * unit)


def _amax(size: NDArray[np.float64], tile: Tile, clamp: float) -> NDArray[np.float64]:
    """The largest magnitude of each row's tile in each group.  |x| (M, K) -> (M, groups)"""
    a = np.maximum(tile_amax(size, tile), clamp)
    return np.repeat(a, tile[0], axis=0)[: len(size)]
