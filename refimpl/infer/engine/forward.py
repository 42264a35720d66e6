"""One run of the model over pieces of many sequences: tokens side by side, the latents in pages, attention piece by piece.

Whatever looks at one token at a time sees all tokens as one long row; only attention knows which belong together. Observed, as in
the batch-invariant mode and under a precision plan that rounds, it is the absorbed form in stages for prompts as for single
tokens: a token's numbers must not tell in which piece it came. Else it is `core`, whose memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.common import embed, final_norm, logits, mask
from refimpl.layers.mla import (
    Attention,
    attn_out,
    ctx_absorbed,
    ctx_latent,
    latents,
    probs,
    q_absorbed,
    queries_of,
    scores_absorbed,
)
from refimpl.layers.rope import rope_tables
from refimpl.layers.stage import observed, phase, unit
from refimpl.model import ForCausalLM

from .core import Part, attend
from .pages import Pages


@dataclass(frozen=True)
class Piece:
    """Tokens start..stop of a sequence (`tokens` are those alone) and the blocks of its cache up to `stop`. `every`: logits are
    wanted behind each token, not only the last.
    """

    tokens: Sequence[int]
    start: int
    table: Sequence[int]
    every: bool = False

    @property
    def stop(self) -> int:
        """Where the piece ends; it sees all keys before."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class _Side:
    """Where a piece lies: its columns among all tokens, the blocks of its keys (T / size,), how many keys they are."""

    columns: slice
    table: Array
    stop: int


def forward(model: ForCausalLM, pieces: Sequence[Piece], pages: Pages, *, singly: bool = False) -> Array:
    """Logits behind each piece, or behind each token of it; the pages get the latents of all.  R pieces -> (R, V), or more rows.

    `singly`: every query is multiplied with its own keys by itself, so that nobody's shape depends on the piece it came in.
    """
    c = model.config
    tokens = np.concatenate([np.asarray(p.tokens, np.int64) for p in pieces])[None]  # (1, N)
    positions = np.concatenate([np.arange(p.start, p.stop) for p in pieces])[None]
    ends = np.cumsum([len(p.tokens) for p in pieces])
    sides = [
        _Side(slice(e - len(p.tokens), e), np.asarray(p.table, np.int64), p.stop)
        for p, e in zip(pieces, ends, strict=True)
    ]
    new = np.concatenate([pages.slots(s.table, p.start, p.stop) for p, s in zip(pieces, sides, strict=True)])  # (N,)
    with phase("engine"):
        x = embed(tokens, model.model.embed_tokens.weight)  # (1, N, D)
        table = rope_tables(positions, dim=c.qk_rope_head_dim, theta=c.rope_theta, yarn=c.yarn, dtype=model.dtype)
        for i in range(c.num_hidden_layers):
            with unit(f"L{i}"):
                layer = model.model.layers[i]
                attention = partial(_attention, layer.self_attn, table, new, sides, pages, i, singly)
                x, _, _ = layer.around(x, attention)
        asked = [np.arange(e - len(p.tokens) if p.every else e - 1, e) for p, e in zip(pieces, ends, strict=True)]
        h = final_norm(x[:, np.concatenate(asked)], model.model.norm.weight, eps=c.rms_norm_eps)
        return np.asarray(logits(h, model.head)[0])


def _attention(
    m: Attention, table: Array, new: Array, sides: Sequence[_Side], pages: Pages, i: int, singly: bool, x: Array
) -> tuple[Array, None]:
    """As `mla.Attention`, with the cache elsewhere.  x (1, N, D), table (2, 1, N, Dr/2) -> (1, N, D)."""
    query, latent, kr = latents(m, x, table)
    pages.write(i, new, latent[0], kr[0])
    heads = (_stages if observed() else _blockwise)(m, *queries_of(m, query, table), sides, pages, i, singly)
    return np.asarray(attn_out(heads, m.o_proj.weight, m.o_proj.bias)), None


def _blockwise(
    m: Attention, queries: Array, qr: Array, sides: Sequence[_Side], pages: Pages, i: int, singly: bool
) -> Array:
    """What the heads give, by `core`: nothing but the pages grows with the text.  queries (1, N, H, Dn+Dr), qr (1, N, H, Dr) -> (1,
    N, H, Dv).
    """
    parts = []
    for side in sides:

        def read(a: int, b: int, table: Array = side.table) -> tuple[Array, Array]:
            return pages.read(i, pages.slots(table, a, b))

        parts += [Part(s, t - (s.stop - s.start), read) for s, t in _queries(side, singly)]
    return attend(m, queries, qr, parts)


def _stages(
    m: Attention, queries: Array, qr: Array, sides: Sequence[_Side], pages: Pages, i: int, singly: bool
) -> Array:
    """The same as stages, for who observes them.  queries (1, N, H, Dn+Dr), qr (1, N, H, Dr) -> (1, N, H, Dv)."""
    c, w, o = m.config, m.kv_b_proj.weight, []
    qa = q_absorbed(queries, w, nope=c.qk_nope_head_dim)  # (1, N, H, C)
    for side in sides:
        kv = pages.read(i, pages.slots(side.table, 0, side.stop))
        o += [_core(qa[:, s], qr[:, s], kv, t, c.softmax_scale) for s, t in _queries(side, singly)]
    return np.asarray(ctx_absorbed(np.concatenate(o, axis=1), w, v_dim=c.v_head_dim))


def _queries(side: _Side, singly: bool) -> list[tuple[slice, int]]:
    """(columns, keys they see up to the last of them): all at once, or each alone."""
    s, t = side.columns, side.stop
    return [(slice(j, j + 1), t - (s.stop - 1 - j)) for j in range(s.start, s.stop)] if singly else [(s, t)]


def _core(qa: Array, qr: Array, kv: tuple[Array, Array], t: int, scale: float) -> Array:
    """sum_t softmax(...) c_t.  qa (1, S, H, C), qr (1, S, H, Dr), kv c (1, T, C) and k (1, T, Dr) -> (1, S, H, C)."""
    c, k = kv[0][:, :t], kv[1][:, :t]
    s = qa.shape[1]
    seen = mask(np.arange(t - s, t)[None], None, None, None, past=t - s, dtype=c.dtype)
    return np.asarray(ctx_latent(probs(scores_absorbed(qa, qr, c, k, seen, scale=scale)), c))
