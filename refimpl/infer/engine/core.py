"""Attention over latents in blocks of keys, of which one at a time is in memory: the faster form of the three stages scores, probs
and ctx, beside which nothing grows with the text.

The softmax is summed on the way (Milakov and Gimelshein 2018, as FlashAttention does): what came before is scaled down whenever a
larger score comes. Absorbed, a pair of query and key costs 2 H (2 C + Dr) operations; expanded 2 H (Dn + Dr + Dv), and each key
2 H C (Dn + Dv) once a piece to be expanded. So a piece of more than C (Dn + Dv) / (2 C - Dn - Dv) queries (V3: from 171 on) is expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers import Config
from refimpl.layers.mla import Attention, ctx_absorbed, kv_b, q_absorbed

KEYS = 1024
"""Keys of a block."""
SCORES = 2**22
"""Scores that are held at once, at most, but for one query of one head (or of all, absorbed) a block of keys."""
Read = Callable[[int, int], tuple[Array, Array]]
"""Keys a..b of a sequence -> c (1, b-a, C), k (1, b-a, Dr)."""


class Running:
    """softmax(s) v of scores that come in blocks: the largest score so far, and relative to it the sum of the exponentials and the
    weighted sum.  Rows (..., R), values of W numbers.
    """

    def __init__(self, rows: tuple[int, ...], width: int, dtype: np.dtype[np.generic]) -> None:
        self.top = np.full((*rows, 1), -np.inf, dtype)
        self.total, self.sum = np.zeros_like(self.top), np.zeros((*rows, width), dtype)

    def add(self, s: Array, v: Array) -> None:
        """One more block; its first must show a key to every row.  s (..., R, t), which is overwritten, v (..., t, W)."""
        top = np.maximum(self.top, s.max(axis=-1, keepdims=True))
        s -= top
        np.exp(s, out=s)
        fade = np.exp(self.top - top)
        self.top, self.total = top, self.total * fade + s.sum(axis=-1, keepdims=True)
        self.sum *= fade
        self.sum += s @ v

    def value(self) -> Array:
        """softmax(s) v of everything that came.  -> (..., R, W)."""
        return self.sum / self.total


def attend(m: Attention, queries: Array, qr: Array, read: Read, start: int) -> Array:
    """Attention of a piece at positions start, start + 1, ... to all keys up to each.  queries (1, S, H, Dn+Dr), qr (1, S, H, Dr)
    -> (1, S, H, Dv).
    """
    c = m.config
    width = c.qk_nope_head_dim + c.v_head_dim
    gain = queries.shape[1] * (2 * c.kv_lora_rank - width) > c.kv_lora_rank * width
    return (_expanded if gain else _absorbed)(m, queries, qr, read, start)


def _absorbed(m: Attention, queries: Array, qr: Array, read: Read, start: int) -> Array:
    c, w, n = m.config, m.kv_b_proj.weight, queries.shape[1]
    h, out, step = c.num_attention_heads, [], max(1, SCORES // (KEYS * c.num_attention_heads))
    for i in range(0, n, step):  # queries
        q, r = q_absorbed(queries[:, i : i + step], w, nope=c.qk_nope_head_dim), qr[:, i : i + step]
        s = q.shape[1]
        run, rows = Running((s * h,), c.kv_lora_rank, q.dtype), (q.reshape(s * h, -1), r.reshape(s * h, -1))
        for a, b, later in _blocks(start + i, s):
            latent, k = (x[0] for x in read(a, b))
            scores = rows[0] @ latent.T
            scores += rows[1] @ k.T
            run.add(_masked(scores.reshape(s, h, -1), c.softmax_scale, later, 1).reshape(s * h, -1), latent)
        out.append(ctx_absorbed(run.value().reshape(1, s, h, -1), w, v_dim=c.v_head_dim))
    return np.concatenate(out, axis=1)


def _expanded(m: Attention, queries: Array, qr: Array, read: Read, start: int) -> Array:
    c, n, nope = m.config, queries.shape[1], m.config.qk_nope_head_dim
    w = m.kv_b_proj.weight.reshape(c.num_attention_heads, -1, c.kv_lora_rank)  # (H, Dn+Dv, C)
    out = np.empty((1, n, c.num_attention_heads, c.v_head_dim), queries.dtype)
    for heads in _heads(c, n):
        q = np.concatenate([queries[0, :, heads, :nope], qr[0, :, heads]], axis=-1).swapaxes(0, 1)  # (h, S, Dn+Dr)
        run = Running(q.shape[:2], c.v_head_dim, q.dtype)
        for a, b, later in _blocks(start, n):
            latent, k = read(a, b)
            kv = kv_b(latent, w[heads].reshape(-1, c.kv_lora_rank), n_heads=len(q))[0].swapaxes(0, 1)  # (h, t, Dn+Dv)
            scores = q[..., :nope] @ kv[..., :nope].swapaxes(1, 2)
            scores += q[..., nope:] @ k[0].T
            run.add(_masked(scores, c.softmax_scale, later, 0), kv[..., nope:])
        out[0, :, heads] = run.value().swapaxes(0, 1)
    return out


def _heads(c: Config, n: int) -> Iterator[slice]:
    """As many heads at a time as there is room for their scores with n queries."""
    step = max(1, SCORES // (KEYS * n))
    return (slice(i, i + step) for i in range(0, c.num_attention_heads, step))


def _blocks(start: int, n: int) -> Iterator[tuple[int, int, Array | None]]:
    """Blocks a..b of the keys that n queries from position `start` on see, and which of them come later than each query (n, b-a);
    None if none does.
    """
    for a in range(0, start + n, KEYS):
        b = min(a + KEYS, start + n)
        later = None if b <= start + 1 else np.arange(a, b) > np.arange(start, start + n)[:, None]
        yield a, b, later


def _masked(s: Array, scale: float, later: Array | None, axis: int) -> Array:
    """s scale, and -inf for later keys.  s (S, H, t) with `axis` 1, (H, S, t) with `axis` 0; in place."""
    s *= scale
    if later is not None:
        np.copyto(s, -np.inf, where=np.expand_dims(later, axis))
    return s
