"""A matrix cut into tiles: where they are, the largest magnitude of each, and arithmetic with one number per tile.

Tiles are counted from row 0 and column 0; the last ones may be ragged (kv_a_proj_with_mqa has 576 = 4.5 * 128 rows).
Their size is always given, never inferred: ceil(576 / 5) = 116 has as many tiles as 128, and is a silently wrong
matrix (TensorRT-LLM #14793).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array

Tile = tuple[int, int]
_CHUNK = 65536  # elements that are worked on at a time


def as_tile(tile: int | Tile) -> Tile:
    """(rows, columns) of a tile; one number is both. SpecError unless both are positive integers."""
    both = (tile, tile) if isinstance(tile, int) else tuple(tile)
    ok = len(both) == 2 and all(isinstance(b, int | np.integer) and b >= 1 for b in both)
    require(ok, f"block size {tile} must be positive: one or two integers")
    return both[0], both[1]


def grid(shape: tuple[int, ...], tile: Tile) -> tuple[int, ...]:
    """How many tiles: (M, K) -> (ceil(M/r), ceil(K/c)); with one row per tile, (..., K) -> (..., ceil(K/c))."""
    r, c = tile
    if r == 1:
        return (*shape[:-1], -(-shape[-1] // c))
    return (-(-shape[0] // r), -(-shape[1] // c))


def check_tiled(x: Array, tile: Tile, name: str) -> None:
    """SpecError unless tiles can cut x: any number of axes for rows of 1, a matrix otherwise."""
    ok = x.ndim >= 1 if tile[0] == 1 else x.ndim == 2
    require(ok, f"{name} has shape {x.shape}; blocks tile a matrix")


def as_rows(x: Array) -> Array:
    """x (..., K) as a matrix of rows (M, K): a view if x is contiguous."""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def chunks(x: Array, tile: Tile) -> Iterator[tuple[slice, slice]]:
    """Slices of rows, and of rows of tiles, that fit the cache.  x (M, K)"""
    r, many = tile[0], _CHUNK if isinstance(x, np.ndarray) else max(x.size, 1)
    height = max(1, many // max(1, r * x.shape[1]))
    for i in range(0, -(-x.shape[0] // r), height):
        yield slice(i * r, (i + height) * r), slice(i, i + height)


def tile_amax(x: Array, tile: Tile) -> Array:
    """max |x| of each tile; NaN if it holds one.  x (M, K) -> (ceil(M/r), ceil(K/c))"""
    size = np.abs(x)
    amax = np.empty_like(size, shape=grid((*x.shape,), tile))
    for whole, per_tile, cut in _regions(x, tile):
        amax[per_tile] = size[whole].reshape(cut).max(axis=(1, 3))
    return amax


def per_tile(op: Callable[..., Array], x: Array, s: Array, tile: Tile, out: Array | None = None) -> Array:
    """op(x, s of its tile).  x (M, K), s (ceil(M/r), ceil(K/c)) -> (M, K)"""
    out = np.empty_like(x) if out is None else out
    for whole, at, cut in _regions(x, tile):  # reshaping only splits axes here: views
        op(x[whole].reshape(cut), s[at][:, None, :, None], out=out[whole].reshape(cut))
    return out


def name_tile(at: tuple[int, ...], shape: tuple[int, ...], tile: Tile) -> str:
    """`block (3, 0) = rows 384:512, columns 0:128`"""
    *rows, j = at
    (r, c), stop = tile, shape[-1]
    columns = f"columns {j * c}:{min((j + 1) * c, stop)}"
    where = (
        f"row {', '.join(map(str, rows))}, " if r == 1 else f"rows {rows[0] * r}:{min((rows[0] + 1) * r, shape[0])}, "
    )
    return f"block ({', '.join(map(str, at))}) = {where if rows else ''}{columns}"


def refuse_tiles(bad: Array, shape: tuple[int, ...], tile: Tile, message: str) -> None:
    """SpecError with the message, {block} filled in for the first bad tile, if there is one."""
    if bad.any():
        at = tuple(int(k) for k in np.unravel_index(int(np.argmax(bad)), bad.shape))
        count = int(bad.sum())
        more = f" (and {count - 1} more)" if count > 1 else ""
        raise SpecError(message.format(block=name_tile(at, shape, tile)) + more)


def _regions(
    x: Array, tile: Tile
) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice], tuple[int, int, int, int]]]:
    """At most four parts with tiles of one size each: the whole tiles, the ragged edges, the corner."""
    for rows, tile_rows, r in _cuts(x.shape[0], tile[0]):
        for columns, tile_columns, c in _cuts(x.shape[1], tile[1]):
            down, across = tile_rows.stop - tile_rows.start, tile_columns.stop - tile_columns.start
            yield (rows, columns), (tile_rows, tile_columns), (down, r, across, c)


def _cuts(n: int, size: int) -> Iterator[tuple[slice, slice, int]]:
    """(elements, tiles, size of those tiles) for the whole tiles and for the ragged one."""
    count, rest = divmod(n, size)
    if count:
        yield slice(0, count * size), slice(0, count), size
    if rest:
        yield slice(count * size, n), slice(count, count + 1), rest
