"""Array primitives: forward first, then one vjp per differentiable argument. Cotangents are `d<name>`."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import numpy as np

from .errors import require
from .tensor import Array, Vjp, primitive

Result = tuple[Array, tuple[Vjp | None, ...]]


def unbroadcast(g: Array, shape: tuple[int, ...]) -> Array:
    """Sum g over the axes along which an array of that shape was broadcast (g is returned as it is if none)."""
    if g.shape == shape:
        return g
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    spread = tuple([i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1])
    return g.sum(axis=spread, keepdims=True) if spread else g


@primitive
def add(a: Array, b: Array) -> Result:
    """y = a + b.  a (*), b (*) -> y (*), broadcast."""
    shape_a, shape_b = np.shape(a), np.shape(b)  # a vjp that needs a shape must not hold the array

    def vjp_a(dy: Array) -> Array:
        return unbroadcast(dy, shape_a)

    def vjp_b(dy: Array) -> Array:
        return unbroadcast(dy, shape_b)

    return a + b, (vjp_a, vjp_b)


@primitive
def sub(a: Array, b: Array) -> Result:
    """y = a - b.  a (*), b (*) -> y (*), broadcast."""
    shape_a, shape_b = np.shape(a), np.shape(b)

    def vjp_a(dy: Array) -> Array:
        return unbroadcast(dy, shape_a)

    def vjp_b(dy: Array) -> Array:
        return unbroadcast(-dy, shape_b)

    return a - b, (vjp_a, vjp_b)


@primitive
def mul(a: Array, b: Array) -> Result:
    """y = a b, elementwise.  a (*), b (*) -> y (*), broadcast."""

    def vjp_a(dy: Array) -> Array:
        return unbroadcast(dy * b, np.shape(a))

    def vjp_b(dy: Array) -> Array:
        return unbroadcast(dy * a, np.shape(b))

    return a * b, (vjp_a, vjp_b)


@primitive
def div(a: Array, b: Array) -> Result:
    """y = a / b, elementwise.  a (*), b (*) -> y (*), broadcast."""
    y = a / b

    def vjp_a(dy: Array) -> Array:
        return unbroadcast(dy / b, np.shape(a))

    def vjp_b(dy: Array) -> Array:
        return unbroadcast(-dy * y / b, np.shape(b))

    return y, (vjp_a, vjp_b)


@primitive
def neg(x: Array) -> Result:
    """y = -x.  x (*) -> y (*)."""

    def vjp_x(dy: Array) -> Array:
        return -dy

    return -x, (vjp_x,)


@primitive
def power(x: Array, *, p: float) -> Result:
    """y = x^p for a fixed p.  x (*) -> y (*)."""

    def vjp_x(dy: Array) -> Array:
        return dy * (p * x ** (p - 1)) if p else np.zeros_like(dy)

    return x**p, (vjp_x,)


@primitive
def exp(x: Array) -> Result:
    """y = e^x.  x (*) -> y (*)."""
    y = np.exp(x)

    def vjp_x(dy: Array) -> Array:
        return dy * y

    return y, (vjp_x,)


@primitive
def log(x: Array) -> Result:
    """y = ln x.  x (*) -> y (*)."""

    def vjp_x(dy: Array) -> Array:
        return dy / x

    return np.log(x), (vjp_x,)


@primitive
def maximum(a: Array, b: Array) -> Result:
    """y = max(a, b), elementwise; where equal, a gets the gradient.  a (*), b (*) -> y (*), broadcast."""

    def vjp_a(dy: Array) -> Array:
        return unbroadcast(dy * (a >= b), np.shape(a))

    def vjp_b(dy: Array) -> Array:
        return unbroadcast(dy * (a < b), np.shape(b))

    return np.maximum(a, b), (vjp_a, vjp_b)


@primitive
def matmul(a: Array, b: Array) -> Result:
    """y = a b.  a (..., M, K), b (..., K, N) -> y (..., M, N), leading axes broadcast."""
    require(a.ndim >= 2 and b.ndim >= 2, f"matmul takes matrices, not shapes {a.shape} and {b.shape}")

    def vjp_a(dy: Array) -> Array:
        return unbroadcast(dy @ b.swapaxes(-1, -2), np.shape(a))

    def vjp_b(dy: Array) -> Array:
        return unbroadcast(a.swapaxes(-1, -2) @ dy, np.shape(b))

    return a @ b, (vjp_a, vjp_b)


@primitive
def sum(x: Array, *, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Result:
    """y = sum of x over `axis` (all axes by default).  x (*) -> y."""
    axes, before = tuple(range(x.ndim)) if axis is None else axis, x.shape

    def vjp_x(dy: Array) -> Array:
        dy = dy if keepdims else np.expand_dims(dy, axes)
        return np.broadcast_to(dy, before)

    return x.sum(axis=axes, keepdims=keepdims), (vjp_x,)


def mean(x: Any, *, axis: int | None = None, keepdims: bool = False) -> Any:
    """y = mean of x over `axis` (all axes by default)."""
    n = math.prod(x.shape) if axis is None else x.shape[axis]
    return mul(sum(x, axis=axis, keepdims=keepdims), 1.0 / n)


@primitive
def reshape(x: Array, *, shape: tuple[int, ...]) -> Result:
    """y = x with another shape (one entry may be -1)."""
    before = x.shape

    def vjp_x(dy: Array) -> Array:
        return dy.reshape(before)

    return x.reshape(shape), (vjp_x,)


@primitive
def transpose(x: Array, *, axes: tuple[int, ...] | None = None) -> Result:
    """y = x with permuted axes (reversed by default)."""
    axes = tuple(reversed(range(x.ndim))) if axes is None else axes
    back = tuple([axes.index(i) for i in range(x.ndim)])

    def vjp_x(dy: Array) -> Array:
        return dy.transpose(back)

    return x.transpose(axes), (vjp_x,)


def swapaxes(x: Any, a: int, b: int) -> Any:
    """y = x with axes a and b exchanged."""
    axes = list(range(x.ndim))
    axes[a], axes[b] = axes[b], axes[a]
    return transpose(x, axes=tuple(axes))


@primitive
def broadcast(x: Array, *, shape: tuple[int, ...]) -> Result:
    """y = x repeated along axes of size 1 or in front."""
    before = x.shape

    def vjp_x(dy: Array) -> Array:
        return unbroadcast(dy, before)

    return np.broadcast_to(x, shape), (vjp_x,)


@primitive
def getitem(x: Array, *, index: Any) -> Result:
    """y = x[index]; index may repeat elements (their gradients add)."""
    parts = index if isinstance(index, tuple) else (index,)
    basic = all(p is None or p is Ellipsis or isinstance(p, int | slice) for p in parts)

    before = x.shape

    def vjp_x(dy: Array) -> Array:
        dx = np.zeros_like(dy, shape=before)
        if basic:
            dx[index] = dy
        else:
            np.add.at(dx, index, dy)  # `dx[index] += dy` would drop repeated elements
        return dx

    return x[index], (vjp_x,)


def concat(parts: list[Any] | tuple[Any, ...], *, axis: int = -1) -> Any:
    """y = the parts side by side along `axis`."""
    return _concat(*parts, axis=axis)


@primitive
def _concat(*parts: Array, axis: int) -> Result:
    """y = [x_1; x_2; ...]."""
    ends = [0, *accumulate(p.shape[axis] for p in parts)]

    def part(i: int) -> Vjp:
        span = slice(ends[i], ends[i + 1])

        def vjp(dy: Array) -> Array:
            where: list[Any] = [slice(None)] * dy.ndim
            where[axis] = span
            return dy[tuple(where)]

        return vjp

    return np.concatenate(parts, axis=axis), tuple([part(i) for i in range(len(parts))])


@primitive
def take_rows(w: Array, ids: Array) -> Result:
    """y[n] = w[ids[n]], an embedding.  w (V, D), ids (*) -> y (*, D)."""

    def vjp_w(dy: Array) -> Array:
        dw = np.zeros_like(w)
        np.add.at(dw, ids, dy)
        return dw

    return w[ids], (vjp_w, None)


@primitive
def take_along(x: Array, ids: Array) -> Result:
    """y[..., k] = x[..., ids[..., k]].  x (*, E), ids (*, K) -> y (*, K)."""
    rows, before = math.prod(ids.shape[:-1]), x.shape

    def vjp_x(dy: Array) -> Array:
        dx = np.zeros_like(dy, shape=(rows, before[-1]))
        at = (np.arange(rows, like=ids)[:, None], ids.reshape(rows, ids.shape[-1]))
        np.add.at(dx, at, dy.reshape(rows, ids.shape[-1]))
        return dx.reshape(before)

    return np.take_along_axis(x, ids, axis=-1), (vjp_x, None)


@primitive
def cast(x: Array, *, dtype: Any) -> Result:
    """y = x in another floating dtype; the gradient is cast back.  x (*) -> y (*)."""

    before = x.dtype
    return x.astype(dtype), (lambda dy: dy.astype(before),)


@primitive
def round_through(x: Array, *, to: Any) -> Result:
    """y = to(x), a rounding or quantiser; straight-through: dx = dy.  x (*) -> y (*)."""

    def vjp_x(dy: Array) -> Array:
        return dy

    return to(x), (vjp_x,)


@primitive
def stop(x: Array) -> Result:
    """y = x, a constant from here on (torch's detach).  x (*) -> y (*)."""
    return x, (None,)
