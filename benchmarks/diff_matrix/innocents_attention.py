"""Rewrites of attention that a correct port may make: another kernel, another place of a factor, another mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attention import attending, rotate
from entries import innocent, together, with_attention, with_forward, with_function

# ---- Attention kernels: (eager) -> (module, q, k, v, mask, scaling) -> (B, S, H, Dv)


def _scale_in_q(eager: Any) -> Any:
    return lambda a, q, k, v, mask, scaling: eager(a, q * scaling, k, v, mask, 1.0)


def _root_in_both(eager: Any) -> Any:
    return lambda a, q, k, v, mask, scaling: eager(a, q * scaling**0.5, k * scaling**0.5, v, mask, 1.0)


def _scores_float32(eager: Any) -> Any:
    def attend(a: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> Any:
        scores = torch.matmul(q.float(), k.float().transpose(2, 3)) * scaling + mask.float()
        return torch.matmul(torch.softmax(scores, dim=-1).to(q.dtype), v).transpose(1, 2)

    return attend


def _all_float32(eager: Any) -> Any:
    return lambda a, q, k, v, mask, scaling: eager(
        a, q.float(), k.float(), v.float(), mask.float().clamp(min=-1e30), scaling
    ).to(q.dtype)


def _online(eager: Any) -> Any:
    """Keys in blocks of eight, a running maximum and sum, one division at the end."""

    def attend(a: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> Any:
        top = torch.full((*q.shape[:-1], 1), -1e30)
        total, out = torch.zeros_like(top), torch.zeros((*q.shape[:-1], v.shape[-1]))
        for t in range(0, k.shape[2], 8):
            block = slice(t, t + 8)
            scores = torch.matmul(q, k[:, :, block].transpose(2, 3)).float() * scaling + mask[..., block].float()
            new = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
            p, old = (scores - new).exp(), (top - new).exp()
            out = out * old + torch.matmul(p.to(v.dtype), v[:, :, block]).float()
            total, top = total * old + p.sum(dim=-1, keepdim=True), new
        return (out / total).to(q.dtype).transpose(1, 2)

    return attend


def _head_by_head(eager: Any) -> Any:
    def attend(a: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> Any:
        heads = []
        for i in range(q.shape[1]):
            scores = torch.matmul(q[:, i], k[:, i].transpose(1, 2)) * scaling + mask[:, 0]
            heads.append(torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), v[:, i]))
        return torch.stack(heads, dim=2)

    return attend


def _parts_apart(eager: Any) -> Any:
    """The products of the unrotated and of the rotated channels are added."""

    def attend(a: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> Any:
        n = a.qk_nope_head_dim
        nope = torch.matmul(q[..., :n].float(), k[..., :n].float().transpose(2, 3))
        scores = (nope + torch.matmul(q[..., n:].float(), k[..., n:].float().transpose(2, 3))) * scaling
        p = torch.softmax((scores + mask.float()), dim=-1).to(q.dtype)
        return torch.matmul(p, v).transpose(1, 2)

    return attend


def _divided_late(eager: Any) -> Any:
    """exp(scores) v, divided by the sum of the exponentials."""

    def attend(a: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> Any:
        scores = torch.matmul(q, k.transpose(2, 3)).float() * scaling + mask.float()
        p = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        return (torch.matmul(p, v.float()) / p.sum(dim=-1, keepdim=True)).to(q.dtype).transpose(1, 2)

    return attend


def _absorbed(a: Any, x: Any, tables: Any, mask: Any) -> tuple[Any, None]:
    """Attention in latent space: kv_b is applied to queries and to the output, not to the keys."""
    b, s, _ = x.shape
    q = a.q_proj(x) if a.q_lora_rank is None else a.q_b_proj(a.q_a_layernorm(a.q_a_proj(x)))
    q_nope, q_rot = q.view(b, s, -1, a.qk_head_dim).transpose(1, 2).split([a.qk_nope_head_dim, a.qk_rope_head_dim], -1)
    latent, k_rot = a.kv_a_proj_with_mqa(x).split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)
    c = a.kv_a_layernorm(latent)
    q_rot, k_rot = rotate(q_rot, k_rot[:, None], *tables)
    up = a.kv_b_proj.weight.view(a.num_heads, -1, a.kv_lora_rank)
    w_k, w_v = up.split([a.qk_nope_head_dim, a.v_head_dim], dim=1)
    in_latent = torch.einsum("bhsd,hdc->bhsc", q_nope, w_k)
    scores = torch.einsum("bhsc,btc->bhst", in_latent, c) + torch.einsum("bhsr,btr->bhst", q_rot, k_rot[:, 0])
    p = torch.softmax(scores.float() * a.scaling + mask.float(), dim=-1).to(x.dtype)
    out = torch.einsum("bhsc,hdc->bshd", torch.einsum("bhst,btc->bhsc", p, c), w_v)
    return a.o_proj(out.flatten(2)), None


def _in_latent_space(a: Any, _: Any) -> Any:
    return lambda hidden_states, position_embeddings, attention_mask, **_: _absorbed(
        a, hidden_states, position_embeddings, attention_mask
    )


@contextmanager
def _sdpa(model: Any) -> Iterator[None]:
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("eager")


def _masked_with(number: float) -> Callable[[Any], Any]:
    """A patch: the mask holds this number instead of the dtype's lowest."""
    change = lambda mask: mask.clamp(min=number)  # noqa: E731
    return lambda model: with_function("create_causal_mask", lambda make: lambda **kw: change(make(**kw)))


def _neighbours(a: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    """Rotated channels stay in pairs."""
    return tuple([torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2) for x in rotate(q, k, cos, sin)])


def _rotated_float32(rotary: Any, forward: Any) -> Any:
    return lambda x, position_ids: forward(x.float(), position_ids=position_ids)


def _rounded_after(a: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return tuple([x.to(q.dtype) for x in rotate(q.float(), k.float(), cos, sin)])


INNOCENTS = (
    innocent("scale-in-q", "the softmax scale is multiplied into q", lambda m: with_attention(_scale_in_q)),
    innocent("scale-root", "its root is multiplied into q and k", lambda m: with_attention(_root_in_both)),
    innocent("scores-float32", "scores and softmax in float32", lambda m: with_attention(_scores_float32)),
    innocent("attention-float32", "the whole kernel in float32", lambda m: with_attention(_all_float32)),
    innocent("attention-online", "keys in blocks, a running maximum", lambda m: with_attention(_online)),
    innocent("attention-by-head", "a loop over the heads", lambda m: with_attention(_head_by_head)),
    innocent("attention-in-parts", "two products for the two parts of q", lambda m: with_attention(_parts_apart)),
    innocent("attention-late", "divided by the sum at the end", lambda m: with_attention(_divided_late)),
    innocent("attention-absorbed", "in latent space", lambda m: with_forward(m, "self_attn", _in_latent_space)),
    innocent("attention-sdpa", "torch's fused kernel", _sdpa),
    innocent("mask-1e9", "the mask holds -1e9", _masked_with(-1e9)),
    innocent("mask-1e4", "the mask holds -1e4", _masked_with(-1e4)),
    innocent("rope-pairs", "rotated channels stay in pairs, undeclared", attending(rotate=_neighbours)),
    innocent(
        "rope-float32",
        "tables and rotation in float32, rounded after",
        lambda m: together(with_forward(m, "rotary_emb", _rotated_float32), attending(rotate=_rounded_after)(m)),
    ),
)
