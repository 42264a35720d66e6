"""Matrices that are not in memory: a block of rows is read where it is multiplied by or looked up, and not kept.

To a stage such a matrix is a weight like any other. A block of a quarter of a million numbers is decoded and multiplied by while
it is in the processor's cache, which costs less than decoding the whole first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from refimpl.autograd.nn_ops import product
from refimpl.autograd.tensor import Array
from refimpl.layers.precision import Plan

BLOCK = 1 << 18
"""Numbers a block of rows holds at most, but at least 128 rows: those of a block of FP8 codes."""


class Source(Protocol):
    """Where the rows come from."""

    def read(self, name: str, plan: Plan, start: int, stop: int) -> Array:
        """Rows [start, stop) of a weight as the plan holds them."""


@dataclass(frozen=True, eq=False, slots=True)
class Streamed:
    """A matrix (F, D) that is decoded where it is read: rows that are looked up, blocks of rows in a product with its transpose. Of
    two rows with no more than `near` others between them, these are read as well: that costs less than to ask twice.
    """

    weights: Source
    name: str
    plan: Plan
    shape: tuple[int, ...]  # (F, D)
    near: int = 0
    ndim: ClassVar[int] = 2
    __array_ufunc__: ClassVar[None] = None  # x @ w.T asks the transpose below

    @property
    def dtype(self) -> Any:
        """That of the plan."""
        return np.dtype(self.plan.dtype)

    @property
    def T(self) -> Any:
        """The transpose, to be multiplied by."""
        return _Transposed(self)

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """(which rows, their values), a block after the other."""
        step = rows_of_a_block(self.shape)
        for a in range(0, self.shape[0], step):
            b = min(a + step, self.shape[0])
            yield slice(a, b), self.weights.read(self.name, self.plan, a, b)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = np.empty(self.shape, dtype or self.dtype)
        for rows, values in self.blocks():
            whole[rows] = values
        return whole

    def reshape(self, heads: int, _: int, width: int) -> Any:
        """Its rows by heads, (H, F/H, D), of which `[:, rows]` may be multiplied by."""
        assert width == self.shape[1]
        return _ByHeads(self, heads, slice(None))

    def __getitem__(self, ids: Array) -> Array:
        """Rows by their numbers.  ids (*) -> (*, D)."""
        rows, place = np.unique(ids, return_inverse=True)
        found = np.empty((len(rows), self.shape[1]), self.dtype)
        for a, b in self._runs(rows):
            first, last = int(rows[a]), int(rows[b - 1])
            found[a:b] = self.weights.read(self.name, self.plan, first, last + 1)[rows[a:b] - first]
        return found[place.reshape(np.shape(ids))]

    def _runs(self, rows: Array) -> Iterator[tuple[int, int]]:
        """[start, stop) of rows, rising, that are read at once, never more than a block."""
        start = 0
        for i in range(1, len(rows) + 1):
            if (
                i == len(rows)
                or rows[i] - rows[i - 1] > self.near + 1
                or rows[i] - rows[start] >= rows_of_a_block(self.shape)
            ):
                yield start, i
                start = i


def rows_of_a_block(shape: tuple[int, ...]) -> int:
    """How many rows of a matrix (F, D) are decoded at a time."""
    return max(BLOCK // shape[1] // 128, 1) * 128


@dataclass(frozen=True, eq=False)
class _ByHeads:
    """Some rows of every head, (H, R, D), or turned, (H, D, R): decoded where they are multiplied by, a few heads at a time."""

    of: Streamed
    heads: int
    rows: slice
    turned: bool = False

    def __getitem__(self, part: tuple[slice, slice]) -> _ByHeads:
        every, rows = part
        assert every == self.rows == slice(None)
        return replace(self, rows=rows)

    def swapaxes(self, _: int, __: int) -> _ByHeads:
        """The last two axes exchanged."""
        return replace(self, turned=not self.turned)

    @property
    def shape(self) -> tuple[int, int, int]:
        rows, width = len(range(self.of.shape[0] // self.heads)[self.rows]), self.of.shape[1]
        return (self.heads, width, rows) if self.turned else (self.heads, rows, width)

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """(which heads, their values), a block after the other."""
        w, each = self.of, self.of.shape[0] // self.heads
        step = max(BLOCK // (each * w.shape[1]), 1)
        for a in range(0, self.heads, step):
            b = min(a + step, self.heads)
            values = w.weights.read(w.name, w.plan, a * each, b * each).reshape(b - a, each, -1)[:, self.rows]
            yield slice(a, b), values.swapaxes(1, 2) if self.turned else values

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, out: tuple[Array, ...] = (), **more: Any) -> Any:
        """x @ w, head by head.  x (H, N, R), or (H, N, D) if turned -> (H, N, *)."""
        if ufunc is not np.matmul or method != "__call__" or args[1] is not self or out or more:
            return NotImplemented
        x = args[0]
        y = np.empty((*x.shape[:2], self.shape[2]), np.result_type(x, self.of.dtype))
        for heads, values in self.blocks():
            np.matmul(x[heads], values, out=y[heads])
        return y


@dataclass(frozen=True, eq=False)
class _Transposed:
    of: Streamed

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape[::-1]

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, out: tuple[Array, ...] = (), **more: Any) -> Any:
        """x @ wT, a block of rows of w at a time.  x (..., D) -> (..., F)."""
        if ufunc is not np.matmul or method != "__call__" or args[1] is not self or more:
            return NotImplemented
        x = args[0]
        y = out[0] if out else np.empty((*x.shape[:-1], self.of.shape[0]), np.result_type(x, self.of.dtype))
        for rows, values in self.of.blocks():
            y[..., rows] = product(x.reshape(-1, x.shape[-1]), values).reshape(*x.shape[:-1], -1)
        return y
