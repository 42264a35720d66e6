"""Sequence parallelism: between the tensor-parallel parts each rank of `tp` keeps its own tokens (Megatron's g-bar).

The residual stream and the norms are split along the sequence, S_tp tokens a rank. The all-reduce behind a row product
becomes a reduce-scatter, the nothing in front of a column product an all-gather: the same bytes, 1/size of the
activations. MLA can gather less: its low-rank projections act on single tokens, so they are applied first and the
latents are gathered, Q + C + Dr = 2112 numbers a token in V3 instead of the 7168 of the hidden.

Weights that are not split meet only my tokens, so their gradient is a partial sum, which is then all-reduced over tp.
S need not divide by the number of ranks: shares differ by at most one token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from refimpl.autograd import Array, SpecError, require
from refimpl.layers import common, mla
from refimpl.layers.block import DecoderLayer
from refimpl.layers.mla import Attention
from refimpl.layers.module import Module
from refimpl.layers.moe import MLP
from refimpl.parallel_emulation.collectives import shares, slices
from refimpl.parallel_emulation.collectives.duals import all_gather, copy_to, reduce_scatter
from refimpl.parallel_emulation.comm import Comm

from . import vocabulary
from .tensor import channels, heads, jointly, with_bias

M = TypeVar("M", bound=Module)
Gather = Literal["latents", "hidden"]
HEADS = ("q_proj", "q_b_proj", "kv_b_proj", "o_proj.weight")
"""What of an attention is split by heads; the rest is replicated."""


def tokens_of(tp: Comm, length: int) -> slice:
    """The tokens of a sequence that are mine.  SpecError if there are fewer than ranks."""
    require(length >= tp.size, f"{length} tokens for {tp.size} sequence-parallel ranks: each needs one at least")
    return slices(shares(length, tp.size))[tp.rank]


def replicated(tp: Comm, m: M, split: tuple[str, ...] = ()) -> M:
    """The same module, its gradients all-reduced over tp, one message per weight; not those whose names start as `split`.

    For weights that are whole on every rank but have met my tokens only, such as a router and a shared expert.
    """
    return m.map(lambda name, w: w if name.startswith(split) else copy_to(w, comm=tp, label=f"grad.{name}"))


def mlp(tp: Comm, m: MLP, x: Any, *, length: int) -> Any:
    """down(silu(gate x) up x), m my channels.  x (B, S_tp, D) -> (B, S_tp, D).

    All-gather and reduce-scatter of B S D numbers, forward and backward.
    """
    _check_mine(tp, x, length)
    sizes = shares(length, tp.size)
    x = all_gather(x, comm=tp, axis=1, sizes=sizes, label="mlp.gather")
    y = channels(m, x)  # (B, S, D), partial over tp
    return reduce_scatter(y, comm=tp, axis=1, sizes=sizes, label="mlp.scatter")


def attention(tp: Comm, m: Attention, x: Any, table: Any, mask: Any, *, gather: Gather = "latents") -> Any:
    """MLA, m my heads.  x (B, S_tp, D), table (2, B, S, Dr/2), mask (B, 1, S, S) -> (B, S_tp, D).

    Gathers the latents, B S (Q + C + Dr) numbers, or the hidden, B S D, from which every rank then computes all latents;
    reduce-scatters B S D. Backward the same with gather and scatter exchanged, and the weights that are not split.
    """
    require(gather in ("latents", "hidden"), f"gather is 'latents' or 'hidden', not {gather!r}")
    m, length = replicated(tp, m, HEADS), int(mask.shape[-1])
    how: dict[str, Any] = {"comm": tp, "axis": 1, "sizes": shares(length, tp.size)}
    if gather == "hidden":
        x = all_gather(x, label="attention.gather", **how)
        query, latent, kr = mla.latents(m, x, table)
    else:
        mine = mla.latents(m, x, table[:, :, tokens_of(tp, length)])
        query, latent, kr = jointly(all_gather, mine, label="attention.gather", **how)
    y = heads(m, query, latent, kr, table, mask, "expanded")  # (B, S, D), partial over tp
    y = reduce_scatter(y, label="attention.scatter", **how)
    return with_bias(y, m.o_proj.bias)


def block(
    tp: Comm,
    layer: DecoderLayer,
    x: Any,
    table: Any,
    mask: Any,
    *,
    gather: Gather = "latents",
    ffn: Callable[[Any], Any] | None = None,
) -> Any:
    """A decoder layer on my tokens, its attention and MLP my slices.  x (B, S_tp, D) -> (B, S_tp, D).

    `ffn` takes the place of the split MLP: an expert-parallel MoE dispatches my tokens only, so nothing is sent twice.
    """
    eps, length = layer.config.rms_norm_eps, int(mask.shape[-1])
    _check_mine(tp, x, length)
    norms = [
        copy_to(n.weight, comm=tp, label="grad.norm") for n in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    n = common.attn_norm(x, norms[0], eps=eps)
    x = common.resid_mid(x, attention(tp, layer.self_attn, n, table, mask, gather=gather))
    n = common.ffn_norm(x, norms[1], eps=eps)
    if ffn is not None:
        return common.resid(x, ffn(n))
    if not isinstance(layer.mlp, MLP):
        raise SpecError("a layer with experts needs ffn, its expert-parallel form")
    return common.resid(x, mlp(tp, layer.mlp, n, length=length))


def embed(tp: Comm, tokens: Array, w: Any, *, vocab: int) -> Any:
    """My tokens' embedding; every rank looks up all tokens in its rows.  tokens (B, S), w (V_tp, D) -> (B, S_tp, D)."""
    tokens_of(tp, tokens.shape[1])  # a share for everyone
    y = vocabulary.embed_partial(tp, tokens, w, vocab=vocab)
    return reduce_scatter(y, comm=tp, axis=1, sizes=shares(tokens.shape[1], tp.size), label="embed.scatter")


def logits(tp: Comm, x: Any, w: Any, *, length: int) -> Any:
    """All tokens' logits of my vocabulary rows.  x (B, S_tp, D), w (V_tp, D) -> (B, S, V_tp)."""
    _check_mine(tp, x, length)
    x = all_gather(x, comm=tp, axis=1, sizes=shares(length, tp.size), label="head.gather")
    return common.logits(x, w)


def _check_mine(tp: Comm, x: Any, length: int) -> None:
    mine = tokens_of(tp, length)
    if x.shape[1] != mine.stop - mine.start:
        raise SpecError(f"{x.shape[1]} tokens on rank {tp.rank}; of {length} its share is {mine.start}:{mine.stop}")
