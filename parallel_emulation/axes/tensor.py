"""Tensor parallelism: attention heads and feed-forward channels split over the ranks of `tp`.

V3 was trained without it (R 3.2); its attention is served with it (R 3.4: TP4, with `sequence`). The first
matrix by columns, the second by rows, one all-reduce behind them; each function reads as the serial layer plus its
communication lines. F_tp is my share of F, `partial over tp` a sum that is not yet taken over the ranks. A module to be
run here is my slice of a whole one: `shard_attention`, `shard_mlp`. The vocabulary is in `vocabulary`.

Replicated tensors (x, the latents, weights that are not split) are whole on every rank, and so are their gradients.
Results equal the serial layer's up to the order of sums: over K channels there is one sum of K terms there, and here one
of K / size terms on each rank, then the sum over ranks in rank order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refimpl.autograd import SpecError, nn_ops, ops
from refimpl.layers import common, mla, moe
from refimpl.layers.block import DecoderLayer
from refimpl.layers.mla import KV, Attend, Attention
from refimpl.layers.moe import MLP
from refimpl.parallel_emulation.collectives import copy_to, reduce_from, shares, slices
from refimpl.parallel_emulation.comm import Comm

# ---- What is mine


def part(tp: Comm, total: int, what: str) -> slice:
    """My share of `total` things in a row; sizes differ by at most one. SpecError unless every rank gets one."""
    if total < tp.size:
        raise SpecError(f"{total} {what} for {tp.size} tensor-parallel ranks: each needs one at least")
    return slices(shares(total, tp.size))[tp.rank]


def shard_mlp(tp: Comm, m: MLP) -> MLP:
    """My channels of an MLP: rows of gate and up (F_tp, D), columns of down (D, F_tp)."""
    cut = part(tp, m.gate_proj.weight.shape[0], "feed-forward channels")
    return m.map(lambda name, w: w[:, cut] if name.startswith("down_proj") else w[cut])


def shard_attention(tp: Comm, m: Attention) -> Attention:
    """My heads: their rows of q_b_proj (or q_proj) and kv_b_proj, their columns of o_proj; all else is replicated."""
    c = m.config
    heads = part(tp, c.num_attention_heads, "heads")

    def cut(name: str, w: Any) -> Any:
        def of(width: int) -> slice:
            return slice(heads.start * width, heads.stop * width)

        match name:
            case "q_proj.weight" | "q_b_proj.weight":
                return w[of(c.qk_nope_head_dim + c.qk_rope_head_dim)]
            case "kv_b_proj.weight":
                return w[of(c.qk_nope_head_dim + c.v_head_dim)]
            case "o_proj.weight":
                return w[:, of(c.v_head_dim)]
            case _:
                return w

    mine = m.map(cut)
    mine.config = c.replace(num_attention_heads=heads.stop - heads.start)
    return mine


# ---- Linear layers


def column_linear(tp: Comm, x: Any, w: Any, label: str = "column") -> Any:
    """My columns of x wT.  x (..., D) replicated, w (F_tp, D) -> (..., F_tp)."""
    return nn_ops.linear(copy_to(x, comm=tp, label=label), w)


def row_linear(tp: Comm, x: Any, w: Any, label: str = "row") -> Any:
    """x wT, summed over ranks.  x (..., F_tp), w (D, F_tp) -> (..., D) replicated."""
    return reduce_from(nn_ops.linear(x, w), comm=tp, label=label)


def mlp(tp: Comm, m: MLP, x: Any) -> Any:
    """down(silu(gate x) up x), m my channels.  x (B, S, D) replicated -> (B, S, D) replicated.

    Messages: one all-reduce of B S D numbers forward and one backward.
    """
    y = channels(m, copy_to(x, comm=tp, label="mlp"))  # (B, S, D), partial over tp
    return reduce_from(y, comm=tp, label="mlp")


def channels(m: MLP, x: Any) -> Any:
    """My channels' part of down(silu(gate x) up x).  x (B, S, D) -> (B, S, D) partial over tp."""
    a = moe.mlp_act(moe.mlp_gate(x, m.gate_proj.weight), moe.mlp_up(x, m.up_proj.weight))  # (B, S, F_tp)
    return moe.mlp_down(a, m.down_proj.weight)


# ---- Multi-head latent attention


def heads(m: Attention, query: Any, latent: Any, kr: Any, table: Any, mask: Any, attend: Attend = "auto") -> Any:
    """My heads' part of W^O [o_1; ...; o_H].  query (B, S, Q), latent (B, T, C), kr (B, T, Dr), table (2, B, S, Dr/2), mask
    (B, 1, S, T) -> (B, S, D) partial over tp, without the bias.
    """
    return mla.attn_out(mla.heads(m, query, latent, kr, table, mask, attend), m.o_proj.weight)


def attention(
    tp: Comm, m: Attention, x: Any, table: Any, mask: Any, past: KV | None = None, attend: Attend = "auto"
) -> tuple[Any, KV]:
    """MLA with m my heads.  x (B, S, D) replicated, table (2, B, S, Dr/2), mask (B, 1, S, T) -> y (B, S, D) replicated,
    cache.

    The cache holds the latents whole on every rank: they belong to no head, so tensor parallelism does not divide it.
    Messages: an all-reduce of B S D numbers forward, of B S (Q + C + Dr) backward.
    """
    query, latent, kr = jointly(copy_to, mla.latents(m, x, table), comm=tp, label="attention")
    if past is not None:
        latent, kr = mla.cache_c_kv(past[0], latent), mla.cache_k_rope(past[1], kr)
    y = reduce_from(heads(m, query, latent, kr, table, mask, attend), comm=tp, label="attention")
    return with_bias(y, m.o_proj.bias), (latent, kr)


def jointly(op: Callable[..., Any], parts: Sequence[Any], **how: Any) -> list[Any]:
    """op of each part, in one message: the parts lie side by side on the last axis."""
    ends = np.cumsum([p.shape[-1] for p in parts]).tolist()
    y = op(ops.concat(list(parts)), **how)
    return [y[..., end - p.shape[-1] : end] for p, end in zip(parts, ends, strict=True)]


def with_bias(y: Any, b: Any) -> Any:
    """y + b, added once and not by every rank.  y (B, S, D), b (D,) or None -> (B, S, D)."""
    return y if b is None else ops.add(y, b)


def block(tp: Comm, layer: DecoderLayer, x: Any, table: Any, mask: Any, past: KV | None = None) -> tuple[Any, KV]:
    """A dense decoder layer whose attention and MLP are my slices.  x (B, S, D) replicated -> x (B, S, D), cache."""
    eps = layer.config.rms_norm_eps
    assert isinstance(layer.mlp, MLP)
    n = common.attn_norm(x, layer.input_layernorm.weight, eps=eps)
    a, kv = attention(tp, layer.self_attn, n, table, mask, past)
    x = common.resid_mid(x, a)
    y = mlp(tp, layer.mlp, common.ffn_norm(x, layer.post_attention_layernorm.weight, eps=eps))
    return common.resid(x, y), kv
