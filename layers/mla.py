"""Multi-head latent attention (R 2.1.1, eqs 1-11), expanded and absorbed, with its latent cache.

Expanded: every head's keys and values are formed from the latent (kv_b_proj). Absorbed: the key half of kv_b_proj moves
to the query and the value half to the output, so that attention runs on the C + Dr cached numbers themselves. Equal in
exact arithmetic: (q W) c = q (W c).
"""

from __future__ import annotations

from typing import Any, Literal

from refimpl.autograd import attention_op, nn_ops, ops
from refimpl.autograd.tensor import Array

from . import gemm
from .common import linear
from .config import Config
from .module import Linear, Module, RMSNorm
from .stage import observed, stage

Attend = Literal["auto", "expanded", "absorbed"]
KV = tuple[Any, Any]
"""One layer's latent cache: c_kv (B, T, C) after its norm, k_rope (B, T, Dr) after rotation."""


q_a = stage("mla.q_a", what="query latent c^Q before its norm", eq="R eq 6", shape="B S Q")(linear)
kv_a = stage(
    "mla.kv_a",
    what="key-value latent and shared rotary key, before norm and rotation",
    eq="R eqs 1, 3",
    shape="B S C+Dr",
)(linear)


@stage("mla.q_a_norm", what="query latent c^Q", eq="R 4.2 (RMSNorm after the latent)", shape="B S Q")
def q_a_norm(x: Any, w: Any, *, eps: float) -> Any:
    """c^Q normalised.  x (B, S, Q), w (Q,) -> (B, S, Q)."""
    return nn_ops.rms_norm(x, w, eps=eps)


@stage(
    "mla.c_kv",
    what="key-value latent c^KV, which is cached",
    eq="R eq 1; 4.2 (RMSNorm after the latent)",
    shape="B S C",
)
def c_kv(kv: Any, w: Any, *, eps: float) -> Any:
    """c^KV normalised; the rope channels are not part of it.  kv (B, S, C+Dr), w (C,) -> (B, S, C)."""
    return nn_ops.rms_norm(kv[..., : w.shape[0]], w, eps=eps)


@stage(
    "mla.q", what="queries q^C and q^R of every head, before rotation", eq="R eqs 7, 8 before RoPE", shape="B S H Dn+Dr"
)
def q(x: Any, w: Any, *, n_heads: int) -> Any:
    """Queries of all heads, nope channels first.  x (B, S, Q), w (H (Dn+Dr), Q) -> (B, S, H, Dn+Dr)."""
    return gemm.linear(x, w).reshape(*x.shape[:-1], n_heads, -1)


@stage("mla.q_rope", what="rotated part of the queries, q^R", eq="R eq 8", shape="B S H Dr", compare="gauge")
def q_rope(q: Any, table: Any, *, interleaved: bool) -> Any:
    """The last Dr channels of each head, rotated.  q (B, S, H, Dn+Dr), table (2, B, S, Dr/2) -> (B, S, H, Dr)."""
    return nn_ops.rotate(q[..., -2 * table.shape[-1] :], table[..., None, :], interleaved=interleaved)


@stage(
    "mla.k_rope",
    what="rotated key k^R, shared by all heads, which is cached",
    eq="R eq 3",
    shape="B S Dr",
    compare="gauge",
)
def k_rope(kv: Any, table: Any, *, interleaved: bool) -> Any:
    """The key channels that all heads share, rotated, not normalised.  kv (B, S, C+Dr), table (2, B, S, Dr/2) -> (B,
    S, Dr).
    """
    return nn_ops.rotate(kv[..., -2 * table.shape[-1] :], table, interleaved=interleaved)


def _append(past: Any, new: Any) -> Any:
    """The cache with the new entries behind the old.  past (B, P, *), new (B, S, *) -> (B, P+S, *)."""
    return ops.concat([past, new], axis=1)


cache_c_kv = stage(
    "cache.c_kv", what="cached latents with the new ones", eq="R 2.1.1 (the boxed vectors)", shape="B T C"
)(_append)
cache_k_rope = stage(
    "cache.k_rope",
    what="cached rotary keys with the new ones",
    eq="R 2.1.1 (the boxed vectors)",
    shape="B T Dr",
    compare="gauge",
)(_append)
cache_positions = stage(
    "cache.positions",
    what="positions of all keys",
    eq="R 2.1.1 (which keys the boxed vectors are)",
    shape="B T",
    compare="exact",
)(_append)
cache_documents = stage(
    "cache.documents", what="documents of all keys", eq="R 5.1 (sample masking)", shape="B T", compare="exact"
)(_append)


@stage(
    "cache.valid",
    what="which keys are tokens, not padding",
    eq="R 2.1.1 eq 10 (padding is no token)",
    shape="B T",
    compare="exact",
)
def cache_valid(before: Array | None, new: Array, *, past: int) -> Array:
    """0 for padding, 1 for tokens.  before (B, P), or None if all `past` were tokens, new (B, S) -> (B, P+S)."""
    if before is None:
        before = (new[:, :1] * 0 + 1).repeat(past, axis=1)
    return ops.concat([before, new], axis=1)


@stage("mla.kv_b", what="keys k^C and values v^C of every head", eq="R eqs 2, 5", shape="B T H Dn+Dv")
def kv_b(c: Any, w: Any, *, n_heads: int) -> Any:
    """Each head's k_nope and v, in this order.  c (B, T, C), w (H (Dn+Dv), C) -> (B, T, H, Dn+Dv)."""
    return gemm.linear(c, w).reshape(*c.shape[:-1], n_heads, -1)


@stage("mla.scores", what="attention scores, scaled and masked", eq="R eq 10, inside the softmax", shape="B H S T")
def scores(q: Any, q_rope: Any, kv: Any, k_rope: Any, mask: Any, *, scale: float) -> Any:
    """(q_nope k_nope + q_rope k_rope) scale + mask.  q (B, S, H, Dn+Dr), q_rope (B, S, H, Dr), kv (B, T, H, Dn+Dv),
    k_rope (B, T, Dr), mask (B, 1, S, T) -> (B, H, S, T).
    """
    nope = q.shape[-1] - q_rope.shape[-1]
    s = q[..., :nope].transpose(0, 2, 1, 3) @ kv[..., :nope].transpose(0, 2, 3, 1)  # (B, H, S, T)
    s = s + q_rope.transpose(0, 2, 1, 3) @ k_rope.swapaxes(1, 2)[:, None]
    return s * scale + mask


@stage("mla.probs", what="attention weights", eq="R eq 10", shape="B H S T")
def probs(s: Any) -> Any:
    """softmax over the keys; a query that sees no key gets zeros.  s (B, H, S, T) -> (B, H, S, T)."""
    return nn_ops.softmax(s)


@stage("mla.ctx", what="attention output of every head", eq="R eq 10", shape="B S H Dv")
def ctx(p: Any, kv: Any, *, v_dim: int) -> Any:
    """sum_t p v_t per head.  p (B, H, S, T), kv (B, T, H, Dn+Dv) -> (B, S, H, Dv)."""
    return (p @ kv[..., -v_dim:].transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


@stage("mla.q_absorbed", what="queries moved into latent space", eq="R eqs 2, 10 regrouped", shape="B S H C")
def q_absorbed(q: Any, w: Any, *, nope: int) -> Any:
    """q_nope W_UK per head.  q (B, S, H, Dn+Dr), w (H (Dn+Dv), C) -> (B, S, H, C)."""
    b, s, h, _ = q.shape
    w_uk = w.reshape(h, -1, w.shape[-1])[:, :nope]  # (H, Dn, C)
    rows = q[..., :nope].reshape(b * s, h, nope).swapaxes(0, 1)  # (H, B S, Dn)
    return (rows @ w_uk).swapaxes(0, 1).reshape(b, s, h, -1)


@stage(
    "mla.scores_absorbed",
    what="attention scores, scaled and masked",
    eq="R eq 10, inside the softmax",
    shape="B H S T",
    tap="mla.scores",
)
def scores_absorbed(q: Any, q_rope: Any, c: Any, k_rope: Any, mask: Any, *, scale: float) -> Any:
    """(q_absorbed c + q_rope k_rope) scale + mask.  q (B, S, H, C), q_rope (B, S, H, Dr), c (B, T, C), k_rope (B, T,
    Dr), mask (B, 1, S, T) -> (B, H, S, T).
    """
    b, s, h, _ = q.shape
    y = _against(q.reshape(b, s * h, -1), c) + _against(q_rope.reshape(b, s * h, -1), k_rope)  # (B, S H, T)
    return y.reshape(b, s, h, -1).swapaxes(1, 2) * scale + mask


def _against(rows: Any, keys: Any) -> Any:
    """rows keysT; as (keys rowsT)T where the rows are few, which a BLAS makes in half the time.  rows (B, N, C), keys (B, T, C) ->
    (B, N, T).
    """
    few = rows.shape[1] <= nn_ops.SOME
    return (keys @ rows.swapaxes(1, 2)).swapaxes(1, 2) if few else rows @ keys.swapaxes(1, 2)


@stage("mla.ctx_latent", what="attention output in latent space", eq="R eqs 5, 10 regrouped", shape="B S H C")
def ctx_latent(p: Any, c: Any) -> Any:
    """sum_t p c_t per head.  p (B, H, S, T), c (B, T, C) -> (B, S, H, C)."""
    b, h, s, t = p.shape
    return (p.reshape(b, h * s, t) @ c).reshape(b, h, s, -1).swapaxes(1, 2)


@stage(
    "mla.ctx_absorbed",
    what="attention output of every head",
    eq="R eqs 5, 10 regrouped",
    shape="B S H Dv",
    tap="mla.ctx",
)
def ctx_absorbed(o: Any, w: Any, *, v_dim: int) -> Any:
    """W_UV o per head.  o (B, S, H, C), w (H (Dn+Dv), C) -> (B, S, H, Dv)."""
    b, s, h, c = o.shape
    w_uv = w.reshape(h, -1, c)[:, -v_dim:].swapaxes(1, 2)  # (H, C, Dv)
    return (o.reshape(b * s, h, c).swapaxes(0, 1) @ w_uv).swapaxes(0, 1).reshape(b, s, h, -1)


@stage("attn_out", what="output of attention, u", eq="R eq 11", shape="B S D")
def attn_out(o: Any, w: Any, b: Any = None) -> Any:
    """W^O [o_1; ...; o_H] (+ b).  o (B, S, H, Dv), w (D, H Dv), b (D,) or None -> (B, S, D)."""
    return gemm.linear(o.reshape(*o.shape[:2], -1), w, b)


class Attention(Module):
    """Multi-head latent attention. Attributes are the checkpoint's names."""

    def __init__(self, c: Config) -> None:
        self.config = c
        heads, qk = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, heads * qk)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, bias=c.attention_bias)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank)
            self.q_b_proj = Linear(c.q_lora_rank, heads * qk)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=c.attention_bias)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank)
        self.kv_b_proj = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size, bias=c.attention_bias)

    def __call__(
        self, x: Any, table: Any, mask: Any, past: KV | None = None, attend: Attend = "auto"
    ) -> tuple[Any, KV]:
        """x (B, S, D), table (2, B, S, Dr/2), mask (B, 1, S, T), past of T - S tokens -> y (B, S, D), cache of T
        tokens.

        attend "auto": absorbed for one token at a time (as DeepSeek's engines decode), else expanded.
        """
        query, latent, kr = latents(self, x, table)
        if past is not None:
            latent, kr = cache_c_kv(past[0], latent), cache_k_rope(past[1], kr)
        o = heads(self, query, latent, kr, table, mask, attend)
        return attn_out(o, self.o_proj.weight, self.o_proj.bias), (latent, kr)


def latents(m: Attention, x: Any, table: Any) -> tuple[Any, Any, Any]:
    """What belongs to no head.  x (B, S, D), table (2, B, S, Dr/2) -> query latent (B, S, Q) (x itself where queries
    have full rank), c_kv (B, S, C), rotated key (B, S, Dr).
    """
    c, query = m.config, x
    if c.q_lora_rank is not None:
        query = q_a(x, m.q_a_proj.weight, m.q_a_proj.bias)
        query = q_a_norm(query, m.q_a_layernorm.weight, eps=c.latent_norm_eps)
    return query, *entries(m, x, table)


def entries(m: Attention, x: Any, table: Any) -> KV:
    """What the cache holds of tokens.  x (B, S, D), table (2, B, S, Dr/2) -> c_kv (B, S, C), rotated key (B, S, Dr)."""
    c = m.config
    kv = kv_a(x, m.kv_a_proj_with_mqa.weight, m.kv_a_proj_with_mqa.bias)
    latent = c_kv(kv, m.kv_a_layernorm.weight, eps=c.latent_norm_eps)
    return latent, k_rope(kv, table, interleaved=c.rope_interleave)


def heads(m: Attention, query: Any, latent: Any, kr: Any, table: Any, mask: Any, attend: Attend = "auto") -> Any:
    """What every head does by itself, so also a part of them.  query (B, S, Q), latent (B, T, C), kr (B, T, Dr), table
    (2, B, S, Dr/2), mask (B, 1, S, T) -> o (B, S, H, Dv).
    """
    absorbed = attend == "absorbed" or (attend == "auto" and query.shape[1] == 1)
    core = _absorbed if absorbed else _expanded
    return core(m, *queries_of(m, query, table), latent, kr, mask)


def queries_of(m: Attention, query: Any, table: Any) -> tuple[Any, Any]:
    """What every head asks.  query (B, S, Q), table (2, B, S, Dr/2) -> queries (B, S, H, Dn+Dr), rotated part (B, S, H, Dr)."""
    c = m.config
    w = m.q_proj.weight if c.q_lora_rank is None else m.q_b_proj.weight
    asked = q(query, w, n_heads=c.num_attention_heads)
    return asked, q_rope(asked, table, interleaved=c.rope_interleave)


FUSED = ("mla.scores", "mla.probs", "mla.ctx")
"""Stages that are one operation where nobody observes them."""


def _expanded(m: Attention, queries: Any, qr: Any, latent: Any, kr: Any, mask: Any) -> Any:
    c = m.config
    kv = kv_b(latent, m.kv_b_proj.weight, n_heads=c.num_attention_heads)
    if not observed(*FUSED):
        return attention_op.attend(queries, qr, kv, kr, mask, scale=c.softmax_scale)
    s = scores(queries, qr, kv, kr, mask, scale=c.softmax_scale)
    return ctx(probs(s), kv, v_dim=c.v_head_dim)


def _absorbed(m: Attention, queries: Any, qr: Any, latent: Any, kr: Any, mask: Any) -> Any:
    c, w = m.config, m.kv_b_proj.weight
    qa = q_absorbed(queries, w, nope=c.qk_nope_head_dim)
    p = probs(scores_absorbed(qa, qr, latent, kr, mask, scale=c.softmax_scale))
    return ctx_absorbed(ctx_latent(p, latent), w, v_dim=c.v_head_dim)
