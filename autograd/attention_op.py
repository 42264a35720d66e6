"""Attention in one pass: the fused, faster form of three stages (scores, softmax, weighted sum)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .nn_ops import once, softmax_in_place, softmax_vjp
from .ops import Result, broadcast, concat
from .tensor import Array, primitive

QUERY_BLOCK = 64
"""Queries that `attention` handles at a time."""


def attend(q: Any, q_rope: Any, kv: Any, k_rope: Any, mask: Array, *, scale: float) -> Any:
    """softmax((q_nope k_nope + q_rope k_rope) scale + mask) v.  q (B, S, H, Dn+Dr), q_rope (B, S, H, Dr), kv (B, T,
    H, Dn+Dv), k_rope (B, T, Dr), mask (B, 1, S, T) -> y (B, S, H, Dv).
    """
    nope, shape = q.shape[-1] - q_rope.shape[-1], (*kv.shape[:3], k_rope.shape[-1])
    queries = concat([q[..., :nope], q_rope])
    keys = concat([kv[..., :nope], broadcast(k_rope[:, :, None], shape=shape)])
    return attention(queries, keys, kv[..., nope:], mask, scale=scale)


@primitive
def attention(q: Array, k: Array, v: Array, mask: Array, *, scale: float) -> Result:
    """y = softmax(q k scale + mask) v per head, in blocks of queries that see only the keys up to the last visible one.
    q (B, S, H, Dk), k (B, T, H, Dk), v (B, T, H, Dv), mask (B, 1, S, T) -> y (B, S, H, Dv).
    """
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))  # (B, H, S or T, .)
    q = q * scale
    blocks, kept = _visible(mask), []
    y = np.empty_like(v, shape=(*q.shape[:3], v.shape[-1]))
    for rows, cols in blocks:
        p = q[:, :, rows] @ k[:, :, cols].swapaxes(-1, -2)
        p += mask[:, :, rows, cols]
        kept.append(softmax_in_place(p))
        np.matmul(p, v[:, :, cols], out=y[:, :, rows])

    @once
    def gradients(dy: Array) -> tuple[Array, Array, Array]:
        dy, dq, dk, dv = dy.swapaxes(1, 2), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for (rows, cols), p in zip(blocks, kept, strict=True):
            dv[:, :, cols] += p.swapaxes(-1, -2) @ dy[:, :, rows]
            ds = softmax_vjp(dy[:, :, rows] @ v[:, :, cols].swapaxes(-1, -2), p)
            dq[:, :, rows] = ds @ k[:, :, cols]
            dk[:, :, cols] += ds.swapaxes(-1, -2) @ q[:, :, rows]
        return dq * scale, dk, dv

    def vjp_q(dy: Array) -> Array:
        return gradients(dy)[0].swapaxes(1, 2)

    def vjp_k(dy: Array) -> Array:
        return gradients(dy)[1].swapaxes(1, 2)

    def vjp_v(dy: Array) -> Array:
        return gradients(dy)[2].swapaxes(1, 2)

    return y.swapaxes(1, 2), (vjp_q, vjp_k, vjp_v, None)


def _visible(mask: Array) -> list[tuple[slice, slice]]:
    """(queries, keys up to the last one that any of them sees) per block of queries."""
    s, t = mask.shape[-2:]
    seen = (mask == 0).any(axis=(0, 1))  # (S, T)
    last = np.where(seen.any(axis=-1), t - np.argmax(seen[:, ::-1], axis=-1), 1)
    ends = [min(i + QUERY_BLOCK, s) for i in range(0, s, QUERY_BLOCK)]
    return [(slice(i, e), slice(0, int(last[i:e].max()))) for i, e in zip(range(0, s, QUERY_BLOCK), ends, strict=True)]
