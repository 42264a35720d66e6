"""Attention over latents in blocks of keys, of which one at a time is in memory: the faster form of the three stages scores, probs
and ctx, beside which nothing grows with the text.

The softmax is summed on the way (Milakov and Gimelshein 2018, as FlashAttention does): what came before is scaled down whenever a
larger score comes. Absorbed, a pair of query and key costs 2 H (2 C + Dr) operations; expanded 2 H (Dn + Dr + Dv), and each key
2 H C (Dn + Dv) once a piece to be expanded. So a piece of more than C (Dn + Dv) / (2 C - Dn - Dv) queries is expanded, in V3 from
171 on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Part:
    """A piece of one sequence: its columns among all tokens, its first position, its keys."""

    columns: slice
    start: int
    read: Read

    @property
    def queries(self) -> int:
        """How many they are."""
        return int(self.columns.stop - self.columns.start)


def attend(m: Attention, queries: Array, qr: Array, parts: Sequence[Part]) -> Array:
    """Every query attends to all keys up to its own.  queries (1, N, H, Dn+Dr), qr (1, N, H, Dr) -> (1, N, H, Dv)."""
    c, w, width = m.config, m.kv_b_proj.weight, m.config.qk_nope_head_dim + m.config.v_head_dim
    out = np.empty((1, queries.shape[1], c.num_attention_heads, c.v_head_dim), queries.dtype)
    short = []
    for p in parts:
        if p.queries * (2 * c.kv_lora_rank - width) > c.kv_lora_rank * width:
            out[:, p.columns] = _expanded(m, queries[:, p.columns], qr[:, p.columns], p.read, p.start)
        else:
            short.append(p)
    if short:  # the weights are read once for all of them
        columns = np.concatenate([np.arange(p.columns.start, p.columns.stop) for p in short])
        ends = np.cumsum([p.queries for p in short])
        q = q_absorbed(queries[:, columns], w, nope=c.qk_nope_head_dim)
        o = [_absorbed(c, q[:, e - p.queries : e], qr[:, p.columns], p) for p, e in zip(short, ends, strict=True)]
        out[:, columns] = ctx_absorbed(np.concatenate(o, axis=1), w, v_dim=c.v_head_dim)
    return out


def _absorbed(c: Config, queries: Array, qr: Array, part: Part) -> Array:
    """sum_t softmax(...) c_t of every query of a part.  queries (1, S, H, C), qr (1, S, H, Dr) -> (1, S, H, C)."""
    h, out, step = c.num_attention_heads, [], max(1, SCORES // (KEYS * c.num_attention_heads))
    for i in range(0, part.queries, step):
        q, r = queries[0, i : i + step], qr[0, i : i + step]
        s = len(q)
        run, rows = Running((s * h,), c.kv_lora_rank, q.dtype), (q.reshape(s * h, -1), r.reshape(s * h, -1))
        for a, b, later in _blocks(part.start + i, s):
            latent, k = (x[0] for x in part.read(a, b))
            scores = rows[0] @ latent.T
            scores += rows[1] @ k.T
            run.add(_masked(scores.reshape(s, h, -1), c.softmax_scale, later, 1).reshape(s * h, -1), latent)
        out.append(run.value().reshape(1, s, h, -1))
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
