"""The primitives whose gradients are worth reading: what a transformer with experts is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import require
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


@primitive
def linear(x: Array, w: Array, b: Array | None = None) -> Result:
    """y = x wT + b.  x (..., D), w (F, D) as a checkpoint stores it, b (F,) or None -> y (..., F)."""
    require(x.shape[-1] == w.shape[-1], f"linear: x {x.shape} does not fit w {w.shape}")
    rows = x.reshape(-1, x.shape[-1])  # (N, D)
    y = rows @ w.T  # Fprop
    if b is not None:
        y += b

    def dgrad(dy: Array) -> Array:  # (N, F) (F, D) -> (N, D)
        return (dy.reshape(-1, w.shape[0]) @ w).reshape(x.shape)

    def wgrad(dy: Array) -> Array:  # (F, N) (N, D) -> (F, D)
        return dy.reshape(-1, w.shape[0]).T @ rows

    def vjp_b(dy: Array) -> Array:
        return dy.reshape(-1, w.shape[0]).sum(axis=0)

    return y.reshape(*x.shape[:-1], w.shape[0]), (dgrad, wgrad, vjp_b)


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
        return unbroadcast(dy * xhat, w)

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


def _softmax_(x: Array) -> Array:
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
    y = _softmax_(x.copy())

    def vjp_x(dy: Array) -> Array:
        return _softmax_vjp(dy, y)

    return y, (vjp_x,)


def _softmax_vjp(dy: Array, y: Array) -> Array:
    dx = dy - np.einsum("...i,...i->...", dy, y)[..., None]
    dx *= y
    return dx


QUERY_BLOCK = 64
"""Queries that `attend` handles at a time."""


@primitive
def attend(q: Array, q_rope: Array, kv: Array, k_rope: Array, mask: Array, *, scale: float) -> Result:
    """softmax((q_nope k_nope + q_rope k_rope) scale + mask) v, the fused form of three stages, in blocks of queries that
    see only the keys up to the last visible one.  q (B, S, H, Dn+Dr), q_rope (B, S, H, Dr), kv (B, T, H, Dn+Dv), k_rope
    (B, T, Dr), mask (B, 1, S, T) -> y (B, S, H, Dv).
    """
    nope, (b, s, h, _) = q.shape[-1] - q_rope.shape[-1], q.shape
    keys = np.concatenate([kv[..., :nope], np.broadcast_to(k_rope[:, :, None], (*kv.shape[:3], k_rope.shape[-1]))], -1)
    queries = np.concatenate([q[..., :nope], q_rope], -1)
    queries *= scale
    queries, keys, v = queries.swapaxes(1, 2), keys.swapaxes(1, 2), kv[..., nope:].swapaxes(1, 2)  # (B, H, S|T, .)
    blocks = [(slice(i, min(i + QUERY_BLOCK, s)), slice(0, n)) for i, n in _visible(mask)]
    y, kept = np.empty_like(v, shape=(b, h, s, v.shape[-1])), []
    for rows, cols in blocks:
        p = queries[:, :, rows] @ keys[:, :, cols].swapaxes(-1, -2)
        p += mask[:, :, rows, cols]
        kept.append(_softmax_(p))
        np.matmul(p, v[:, :, cols], out=y[:, :, rows])

    @once
    def gradients(dy: Array) -> tuple[Array, Array, Array]:
        dy = dy.swapaxes(1, 2)
        dq, dk, dv = np.zeros_like(queries), np.zeros_like(keys), np.zeros_like(v)
        for (rows, cols), p in zip(blocks, kept, strict=True):
            dv[:, :, cols] += p.swapaxes(-1, -2) @ dy[:, :, rows]
            ds = _softmax_vjp(dy[:, :, rows] @ v[:, :, cols].swapaxes(-1, -2), p)
            dq[:, :, rows] = ds @ keys[:, :, cols]
            dk[:, :, cols] += ds.swapaxes(-1, -2) @ queries[:, :, rows]
        return dq.swapaxes(1, 2) * scale, dk.swapaxes(1, 2), dv.swapaxes(1, 2)

    def vjp_q(dy: Array) -> Array:
        dq = np.zeros_like(q)
        dq[..., :nope] = gradients(dy)[0][..., :nope]
        return dq

    def vjp_kv(dy: Array) -> Array:
        return np.concatenate([gradients(dy)[1][..., :nope], gradients(dy)[2]], -1)

    return y.swapaxes(1, 2), (
        vjp_q,
        lambda dy: gradients(dy)[0][..., nope:],
        vjp_kv,
        lambda dy: gradients(dy)[1][..., nope:].sum(axis=2),
        None,
    )


def _visible(mask: Array) -> list[tuple[int, int]]:
    """(first query, number of keys up to the last one that any of the block's queries sees) per block of queries."""
    s, t = mask.shape[-2:]
    seen = (mask == 0).any(axis=(0, 1))  # (S, T)
    last = np.where(seen.any(axis=-1), t - np.argmax(seen[:, ::-1], axis=-1), 0)
    return [(i, max(int(last[i : i + QUERY_BLOCK].max()), 1)) for i in range(0, s, QUERY_BLOCK)]


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
    """y = -sum_n log softmax(logits[n])[labels[n]] / n_valid; label -100 is ignored.  logits (N, V), labels (N,) -> y ().

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

    def vjp_logits(dy: Array) -> Array:
        scale = dy / count
        d = np.zeros_like(logits) if len(valid) < len(labels) else np.empty_like(logits)
        part = e * (scale / total)
        np.put_along_axis(part, target, np.take_along_axis(part, target, axis=-1) - scale, axis=-1)
        d[valid] = part
        return d

    return (np.log(total) - picked).sum() / count, (vjp_logits, None)


def by_expert(ids: Array, n_experts: int) -> tuple[Array, Array, Array]:
    """Dispatch order of ids (N, K): rows sorted by expert, then by token and slot.

    -> order (N K,): row -> flat slot; inverse (N, K): slot -> row; ends (E,): where each expert's rows end.
    """
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order), like=order)
    ends = np.cumsum(np.bincount(flat, minlength=n_experts))
    return order, inverse.reshape(-1, ids.shape[-1]), ends


@primitive
def dispatch(x: Array, ids: Array, *, n_experts: int) -> Result:
    """rows[m] = x[token of m], sorted by expert.  x (..., D), ids (..., K) -> rows (M, D), M = N K."""
    k = ids.shape[-1]
    order, inverse, _ = by_expert(ids, n_experts)

    def vjp_x(drows: Array) -> Array:
        dx = drows[inverse[:, 0]]
        for slot in range(1, k):
            dx += drows[inverse[:, slot]]
        return dx.reshape(x.shape)

    return x.reshape(-1, x.shape[-1])[order // k], (vjp_x, None)


@primitive
def grouped_linear(rows: Array, ids: Array, *ws: Array) -> Result:
    """y[m] = rows[m] w_e(m)T, one matrix per expert.  rows (M, D), ids (..., K), E times w (F, D) -> y (M, F).

    Experts without rows are not touched, so a lazily read matrix of theirs is never read.
    """
    ends = np.cumsum(np.bincount(ids.reshape(-1), minlength=len(ws)))
    spans = [slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    busy = [e for e, s in enumerate(spans) if s.start < s.stop]
    y = np.empty_like(rows, shape=(len(rows), ws[0].shape[0]))
    for e in busy:
        np.matmul(rows[spans[e]], ws[e].T, out=y[spans[e]])  # Fprop

    def dgrad(dy: Array) -> Array:
        drows = np.empty_like(rows)
        for e in busy:
            np.matmul(dy[spans[e]], ws[e], out=drows[spans[e]])
        return drows

    def wgrad(e: int) -> Vjp:
        return lambda dy: dy[spans[e]].T @ rows[spans[e]]

    return y, (dgrad, None, *[wgrad(e) for e in range(len(ws))])


@primitive
def combine(rows: Array, ids: Array, weights: Array) -> Result:
    """y[t] = sum_k weights[t, k] rows[row of (t, k)], ascending expert id.  rows (M, D), ids (..., K), weights (..., K) -> y (..., D)."""
    n_slots = ids.shape[-1]
    order, inverse, _ = by_expert(ids, int(ids.max(initial=-1)) + 1)
    slot = np.argsort(ids.reshape(-1, n_slots), axis=-1, kind="stable")  # the stated order of the sum
    where, w = np.take_along_axis(inverse, slot, -1), np.take_along_axis(weights.reshape(-1, n_slots), slot, -1)
    y = rows[where[:, 0]] * w[:, :1]
    for k in range(1, n_slots):
        y += rows[where[:, k]] * w[:, k : k + 1]
    dispatched = once(lambda dy: dy.reshape(-1, rows.shape[-1])[order // n_slots])

    def vjp_rows(dy: Array) -> Array:
        return dispatched(dy) * weights.reshape(-1)[order][:, None]

    def vjp_weights(dy: Array) -> Array:
        dw = np.empty_like(weights).reshape(-1)
        dw[order] = np.einsum("md,md->m", dispatched(dy), rows)
        return dw.reshape(weights.shape)

    return y.reshape(*ids.shape[:-1], rows.shape[-1]), (vjp_rows, None, vjp_weights)
