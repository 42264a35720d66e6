"""Attention, its mask and its rotations, as loops over single numbers."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from refimpl.autograd.tensor import Array

from .loops import Numbers, dot, rows_of
from .loops import softmax as softmax_of


def mask(
    positions: Array, valid: Array | None, documents: Array | None, key_documents: Array | None, *, past: int
) -> Array:
    """0 where a query may see a key: no later one, no padding, none of another document."""
    b, s = positions.shape
    seen = np.full((b, 1, s, past + s), -np.inf)
    for i, q, k in product(range(b), range(s), range(past + s)):
        other = documents is not None and key_documents is not None and documents[i, q] != key_documents[i, k]
        if k <= past + q and (valid is None or valid[i, k]) and not other:
            seen[i, 0, q, k] = 0
    return seen


def rope_tables(positions: Array, *, dim: int, theta: float, yarn: dict[str, float] | None) -> Array:
    """cos and sin of position / theta^(2i/dim), YaRN's frequencies and factor where it is configured (R 4.3, arXiv 2309.00071)."""
    angles, factor = [float(theta) ** (-2 * i / dim) for i in range(dim // 2)], 1.0
    if yarn and yarn["factor"] > 1:
        angles, factor = _yarn(angles, dim, theta, yarn)
    turned = [[[p * a for a in angles] for p in row] for row in positions.tolist()]
    found = [[[[f(v) * factor for v in at] for at in row] for row in turned] for f in (math.cos, math.sin)]
    return np.array(found)


def _yarn(angles: Numbers, dim: int, theta: float, yarn: dict[str, float]) -> tuple[list[float], float]:
    length, by = yarn["original_max_position_embeddings"], yarn["factor"]

    def channel(turns: float) -> float:
        """The channel that turns so often over the original length."""
        return dim / 2 * math.log(length / (2 * math.pi * turns), theta)

    first, last = max(math.floor(channel(yarn["beta_fast"])), 0), min(math.ceil(channel(yarn["beta_slow"])), dim - 1)
    found = []
    for i, a in enumerate(angles):
        slow = min(max((i - first) / ((last - first) or 0.001), 0.0), 1.0)
        found.append(a / by * slow + a * (1 - slow))
    scale = [1 + 0.1 * yarn[m] * math.log(by) if by > 1 else 1.0 for m in ("mscale", "mscale_all_dim")]
    return found, scale[0] / scale[1]


def rotated(x: Array, table: Array, *, interleaved: bool) -> Array:
    """The last channels as complex numbers, times cos + i sin."""
    n = table.shape[-1]
    tail = np.asarray(x, np.float64)[..., -2 * n :]
    y = np.empty(tail.shape)
    for at in np.ndindex(tail.shape[:-1]):
        for i in range(n):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + n)
            z = complex(tail[at][a], tail[at][b]) * complex(*[float(t[at[0], at[1], i]) for t in table])
            y[at][a], y[at][b] = z.real, z.imag
    return y


def scores(q: Array, q_rope: Array, kv: Array, k_rope: Array, mask: Array, *, scale: float) -> Array:
    """Of every query with every key: both parts in one sum."""
    b, s, h, width = q.shape
    nope, t = width - q_rope.shape[-1], k_rope.shape[1]
    y = np.empty((b, h, s, t))
    for i, j, m, k in np.ndindex(b, h, s, t):
        left, right = [*q[i, m, j, :nope], *q_rope[i, m, j]], [*kv[i, k, j, :nope], *k_rope[i, k]]
        y[i, j, m, k] = dot(left, right) * scale + mask[i, 0, m, k]
    return y


def scores_absorbed(q: Array, q_rope: Array, c: Array, k_rope: Array, mask: Array, *, scale: float) -> Array:
    """The same with the latent as every head's key."""
    b, s, h, _ = q.shape
    y = np.empty((b, h, s, c.shape[1]))
    for i, j, m, k in np.ndindex(*y.shape):
        y[i, j, m, k] = dot([*q[i, m, j], *q_rope[i, m, j]], [*c[i, k], *k_rope[i, k]]) * scale + mask[i, 0, m, k]
    return y


def softmax(s: Array) -> Array:
    """Every row by itself."""
    return np.array([softmax_of(row) for row in rows_of(s)]).reshape(s.shape)


def ctx(p: Array, kv: Array, *, v_dim: int) -> Array:
    """Every channel of every head's values, weighted by the keys' weights."""
    b, h, s, _ = p.shape
    y = np.empty((b, s, h, v_dim))
    for i, m, j, d in np.ndindex(*y.shape):
        y[i, m, j, d] = dot(p[i, j, m].tolist(), kv[i, :, j, kv.shape[-1] - v_dim + d].tolist())
    return y


def q_absorbed(q: Array, w: Array, *, nope: int) -> Array:
    """sum_d q_d W_UK[h, d, c]."""
    b, s, h, _ = q.shape
    per = len(w) // h
    y = np.empty((b, s, h, w.shape[1]))
    for i, m, j, c in np.ndindex(*y.shape):
        y[i, m, j, c] = dot(q[i, m, j, :nope].tolist(), w[j * per : j * per + nope, c].tolist())
    return y


def ctx_latent(p: Array, c: Array) -> Array:
    """The latents, weighted by the keys' weights."""
    return ctx(p, np.repeat(c[:, :, None], p.shape[1], axis=2), v_dim=c.shape[-1])


def ctx_absorbed(o: Array, w: Array, *, v_dim: int) -> Array:
    """sum_c W_UV[h, d, c] o_c."""
    b, s, h, _ = o.shape
    per = len(w) // h
    y = np.empty((b, s, h, v_dim))
    for i, m, j, d in np.ndindex(*y.shape):
        y[i, m, j, d] = dot(o[i, m, j].tolist(), w[(j + 1) * per - v_dim + d].tolist())
    return y
