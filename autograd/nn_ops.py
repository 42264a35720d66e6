"""The primitives whose gradients are worth reading: what a transformer with experts is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .errors import SpecError
from .ops import Result, unbroadcast
from .tensor import Array, Vjp, primitive


def once(fn: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """Remember fn's last result for the same cotangent: work that the vjps of one op share."""
    memo: list[Any] = [None, None]

    def call(dy: Array) -> Any:
        if memo[0] is not dy:
            memo[:] = [dy, fn(dy)]
        return memo[1]

    return call


FEW, SOME = 4, 96
"""Rows up to which `product` makes dot products, and up to which it turns its operands around (measured with OpenBLAS)."""

NEAR = 1 << 20
"""Bytes of a matrix that is read once in order before BLAS does (measured with matrices that come from memory)."""


def product(rows: Array, w: Array) -> Array:
    """rows wT, as few rows are multiplied fastest: what is read then is w, and BLAS reads it best as dot products, then as w rowsT.
    rows (N, D), w (F, D) -> (N, F).
    """
    plain = isinstance(rows, np.ndarray) and isinstance(
        w, np.ndarray
    )  # a matrix that is read from disk knows its transpose only
    if not plain or len(rows) > SOME:
        return rows @ w.T
    if len(rows) <= FEW:
        return np.asarray(np.vecdot(rows[:, None], w))
    if w.nbytes <= NEAR:
        w.max(initial=0)  # reads w in order, which BLAS does not, and leaves it in the processor's cache
    return np.ascontiguousarray((w @ rows.T).T)


@primitive
def linear(x: Array, w: Array, b: Array | None = None, *, again: Callable[[], Array] | None = None) -> Result:
    """y = x wT + b.  x (..., D), w (F, D) as a checkpoint stores it, b (F,) or None -> y (..., F).

    `again`: makes x once more for wgrad, so that it need not be kept.
    """
    if x.shape[-1] != w.shape[-1]:
        raise SpecError(f"linear: x {x.shape} does not fit w {w.shape}")
    before = x.shape
    rows = x.reshape(-1, before[-1])  # (N, D)
    y = product(rows, w)  # Fprop
    if b is not None:
        y += b

    def dgrad(dy: Array) -> Array:  # (N, F) (F, D) -> (N, D)
        return (dy.reshape(-1, w.shape[0]) @ w).reshape(before)

    def wgrad_of(kept: Callable[[], Array]) -> Vjp:
        return lambda dy: dy.reshape(-1, w.shape[0]).T @ kept().reshape(-1, before[-1])  # (F, N) (N, D)

    def vjp_b(dy: Array) -> Array:
        return dy.reshape(-1, w.shape[0]).sum(axis=0)

    return y.reshape(*before[:-1], w.shape[0]), (dgrad, wgrad_of(again or partial(_same, rows)), vjp_b)


def _same(x: Array) -> Array:
    return x


@primitive
def rms_norm(x: Array, w: Array, *, eps: float) -> Result:
    """y = w x / sqrt(mean(x^2) + eps).  x (..., D), w (D,) -> y (..., D)."""
    n = x.shape[-1]
    rstd = np.einsum("...i,...i->...", x, x)[..., None]  # (..., 1)
    rstd = 1 / np.sqrt(rstd / n + eps)
    xhat = x * rstd

    def vjp_x(dy: Array) -> Array:
        dxhat = dy * w
        dot = np.einsum("...i,...i->...", dxhat, xhat)[..., None]
        dxhat -= xhat * (dot / n)
        dxhat *= rstd
        return dxhat

    def vjp_w(dy: Array) -> Array:
        return unbroadcast(dy * xhat, w.shape)

    return xhat * w, (vjp_x, vjp_w)


def _sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x) without overflow: e^-|x| never exceeds 1."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


@primitive
def sigmoid(x: Array) -> Result:
    """y = 1 / (1 + e^-x).  x (*) -> y (*)."""
    y = _sigmoid(x)

    def vjp_x(dy: Array) -> Array:
        return dy * y * (1 - y)

    return y, (vjp_x,)


@primitive
def swiglu(gate: Array, up: Array) -> Result:
    """y = gate sigmoid(gate) up.  gate (*), up (*) -> y (*)."""
    s = np.negative(gate, out=np.empty_like(gate))  # an array also where gate is 0-d
    with np.errstate(over="ignore"):  # e^-gate = inf for very negative gates gives sigmoid 0, as it should
        np.exp(s, out=s)
    s += 1
    np.divide(1, s, out=s)  # sigmoid(gate)
    silu = gate * s

    def vjp_gate(dy: Array) -> Array:
        d = silu * (1 - s)
        d += s  # d silu / d gate
        d *= up
        d *= dy
        return d

    def vjp_up(dy: Array) -> Array:
        return dy * silu

    return silu * up, (vjp_gate, vjp_up)


def softmax_in_place(x: Array) -> Array:
    """Softmax over the last axis in place; a row of -inf gives zeros (a query that sees no key attends to nothing)."""
    top = x.max(axis=-1, keepdims=True)
    x -= np.where(np.isfinite(top), top, 0)
    np.exp(x, out=x)
    total = x.sum(axis=-1, keepdims=True)
    x *= 1 / np.where(total == 0, 1, total)
    return x


@primitive
def softmax(x: Array) -> Result:
    """y = e^x / sum(e^x) over the last axis; a row of -inf gives zeros.  x (..., T) -> y (..., T)."""
    y = softmax_in_place(x.copy())

    def vjp_x(dy: Array) -> Array:
        return softmax_vjp(dy, y)

    return y, (vjp_x,)


def softmax_vjp(dy: Array, y: Array) -> Array:
    """dx = y (dy - <dy, y>), rows apart.  dy (..., T), y (..., T) -> (..., T)."""
    dx = dy - np.einsum("...i,...i->...", dy, y)[..., None]
    dx *= y
    return dx


@primitive
def rotate(x: Array, table: Array, *, interleaved: bool) -> Result:
    """(a, b) -> (a cos - b sin, a sin + b cos) per pair.  x (..., Dr), table (2, ..., Dr/2), broadcast -> y (..., Dr).

    A pair is channels (2i, 2i+1) if interleaved, else (i, i + Dr/2); the output keeps the input's layout.
    """
    cos, sin = table[0], table[1]

    def turn(v: Array, sin: Array) -> Array:
        h = v.shape[-1] // 2
        first, second = (np.s_[..., 0::2], np.s_[..., 1::2]) if interleaved else (np.s_[..., :h], np.s_[..., h:])
        a, b = v[first], v[second]
        y = np.empty_like(v)
        y[first] = a * cos - b * sin
        y[second] = a * sin + b * cos
        return y

    def vjp_x(dy: Array) -> Array:
        return turn(dy, -sin)

    return turn(x, sin), (vjp_x, None)


@primitive
def nll(logits: Array, labels: Array, *, denominator: float | None = None) -> Result:
    """y = -sum_n log softmax(logits[n])[labels[n]] / n_valid; label -100 is ignored.  logits (N, V), labels (N,) ->
    y ().

    `denominator` replaces the number of valid labels. Without any valid label the loss is 0.
    """
    valid = np.nonzero(labels != -100)[0]
    count = denominator if denominator is not None else max(len(valid), 1)
    rows = logits if len(valid) == len(labels) else logits[valid]
    target = labels[valid][:, None]
    top = rows.max(axis=-1, keepdims=True) if len(valid) else rows[:, :1]
    e = rows - top
    picked = np.take_along_axis(e, target, axis=-1)
    np.exp(e, out=e)
    total = e.sum(axis=-1, keepdims=True)  # (N', 1)
    shape = logits.shape

    def vjp_logits(dy: Array) -> Array:
        scale = dy / count
        d = (np.zeros_like if len(valid) < len(labels) else np.empty_like)(e, shape=shape)
        part = e * (scale / total)
        np.put_along_axis(part, target, np.take_along_axis(part, target, axis=-1) - scale, axis=-1)
        d[valid] = part
        return d

    return (np.log(total) - picked).sum() / count, (vjp_logits, None)
