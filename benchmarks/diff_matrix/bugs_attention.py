"""Bugs of rotary embedding, YaRN and latent attention. Ids with an A are those of the projects where they happened."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from attention import attending, rotate
from entries import after, bug, together, with_attention, with_forward, with_function, with_setting
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from refimpl.autograd.errors import require
from refimpl.layers.rope import mscale

_ROTATED = "mla.q_rope mla.k_rope"


def _yarn(model: Any) -> dict[str, Any]:
    """The YaRN parameters. SpecError for a model without."""
    rope = model.config.rope_parameters
    require(rope.get("rope_type") == "yarn", "no YaRN in this model")
    return dict(rope)


def _scaling(factor: Callable[[Any, Any], float]) -> Callable[[Any], Any]:
    """A patch: the softmax scale is factor(attention, YaRN's parameters)."""

    def patch(model: Any) -> Any:
        rope = model.config.rope_parameters
        return with_setting(model, "self_attn", "scaling", lambda a: factor(a, rope))

    return patch


def _mscale(rope: Any, which: str) -> float:
    return mscale(rope.get("factor", 1.0), rope.get(which) or 0.0) if rope.get(which) else 1.0


def _other_mscale(model: Any) -> Any:
    rope = _yarn(model)
    return _scaling(lambda a, _: a.qk_head_dim**-0.5 * _mscale(rope, "mscale") ** 2)(model)


def _frequencies(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A patch: other rotary frequencies, change(rotary module)."""
    return lambda model: with_setting(model, "rotary_emb", "inv_freq", change)


def _wrong_length(model: Any) -> Any:
    _yarn(model)

    def change(rotary: Any) -> Any:
        config = deepcopy(rotary.config)
        config.rope_parameters["original_max_position_embeddings"] = config.max_position_embeddings
        return ROPE_INIT_FUNCTIONS["yarn"](config)[0]

    return _frequencies(change)(model)


def _no_yarn(model: Any) -> Any:
    _yarn(model)
    n = model.config.qk_rope_head_dim
    theta = model.config.rope_parameters["rope_theta"]
    return _frequencies(lambda rotary: theta ** -(torch.arange(0, n, 2) / n).float())(model)


def _positions(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A patch: the rotary tables are those of change(positions)."""
    wrap = lambda rotary, forward: lambda x, position_ids: forward(x, position_ids=change(position_ids))  # noqa: E731
    return lambda model: with_forward(model, "rotary_emb", wrap)


def _rotating(q_side: Callable[..., Any], k_side: Callable[..., Any]) -> Callable[[Any], Any]:
    """A patch: q is rotated by one function, k by another; each takes (x, cos, sin)."""
    return attending(rotate=lambda a, q, k, cos, sin: (q_side(q, cos, sin), k_side(k, cos, sin)))


def _right(x: Any, cos: Any, sin: Any) -> Any:
    return rotate(x, x, cos, sin)[0]


def _halves(x: Any, cos: Any, sin: Any) -> Any:
    """The halves are rotated against each other, where the weights are made for neighbours."""
    one, two = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-two, one), dim=-1) * sin[:, None]


def _half_frequencies(x: Any, cos: Any, sin: Any) -> Any:
    """Neighbours are rotated, by tables that are laid out for halves."""
    one, two = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((-two, one), dim=-1).flatten(-2)
    y = x * cos[:, None] + turned * sin[:, None]
    return torch.cat((y[..., 0::2], y[..., 1::2]), dim=-1)


def _backwards(x: Any, cos: Any, sin: Any) -> Any:
    return _right(x, cos, -sin)


def _late(x: Any, cos: Any, sin: Any) -> Any:
    """As if the token stood one place further on: the tables' last row is used twice."""
    return _right(x, *(torch.cat((t[:, 1:], t[:, -1:]), dim=1) for t in (cos, sin)))


def _as_is(x: Any, cos: Any, sin: Any) -> Any:
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def _seen_from(diagonal: int) -> Callable[[Any], Any]:
    """A patch: query s sees the keys up to s + diagonal."""

    def change(mask: Any) -> Any:
        seen = torch.ones(mask.shape[-2:]).tril(diagonal).bool()
        return torch.zeros_like(mask).masked_fill(~seen, torch.finfo(mask.dtype).min)

    return lambda model: with_function("create_causal_mask", lambda make: lambda **kw: change(make(**kw)))


def _window(eager: Any) -> Any:
    """Keys further back than seven are not seen."""

    def attend(a: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> Any:
        far = torch.ones(mask.shape[-2:]).tril(-8).bool()
        return eager(a, q, k, v, mask.masked_fill(far, torch.finfo(mask.dtype).min), scaling)

    return attend


def _softmax(dim: int) -> Callable[[Any], Any]:
    def wrap(eager: Any) -> Any:
        def attend(a: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> Any:
            scores = torch.matmul(q, k.transpose(2, 3)) * scaling + mask
            p = torch.softmax(scores, dim=dim, dtype=torch.float32).to(q.dtype)
            return torch.matmul(p, v).transpose(1, 2)

        return attend

    return lambda model: with_attention(wrap)


def _rms(x: Any) -> Any:
    return x * (x.float().pow(2).mean(dim=-1, keepdim=True) + 1e-6).rsqrt().to(x.dtype)


def _q_normed_late(model: Any) -> Any:
    ending = "q_proj" if model.config.q_lora_rank is None else "q_b_proj"
    change = after(lambda _, y: _rms(y.unflatten(-1, (model.config.num_attention_heads, -1))).flatten(-2))
    return with_forward(model, ending, change)


def _joint_norm(a: Any, x: Any) -> Any:
    """One norm over the latent and the rotated key together."""
    y = _rms(x)
    return y[..., : a.kv_lora_rank] * a.kv_a_layernorm.weight, y[..., a.kv_lora_rank :]


def _latent_eps(model: Any) -> Any:
    edits = [with_setting(model, "kv_a_layernorm", "variance_epsilon", lambda norm: 1e-5)]
    if model.config.q_lora_rank is not None:
        edits.append(with_setting(model, "q_a_layernorm", "variance_epsilon", lambda norm: 1e-5))
    return together(*edits)


BUGS = (
    bug("A01-q", "q rotates halves, k neighbours", "mla.q_rope", _rotating(_halves, _right)),
    bug("A01-k", "k rotates halves, q neighbours", "mla.k_rope", _rotating(_right, _halves)),
    bug("A01-both", "both rotate halves of weights made for neighbours", _ROTATED, _rotating(_halves, _halves)),
    bug(
        "A02",
        "neighbours rotated by tables laid out for halves",
        _ROTATED,
        _rotating(_half_frequencies, _half_frequencies),
    ),
    bug("A05", "mscale stands where mscale_all_dim belongs", "mla.scores", _other_mscale),
    bug(
        "A09",
        "the softmax scale is inverted",
        "mla.scores",
        _scaling(lambda a, rope: 1 / a.scaling),
    ),
    bug("A10", "max_position_embeddings taken for YaRN's original length", "mla.rope_tables", _wrong_length),
    bug("A11", "no YaRN", "mla.rope_tables", _no_yarn),
    bug("A12", "eps of the latent norms is 1e-5", "mla.q_a_norm mla.c_kv", _latent_eps),
    bug("A13-late", "the query is normalised after the up-projection", "mla.q", _q_normed_late),
    bug(
        "A14",
        "rotary frequencies in bfloat16",
        "mla.rope_tables",
        _frequencies(lambda rotary: rotary.inv_freq.bfloat16().float()),
    ),
    bug(
        "A14-positions",
        "positions in bfloat16",
        "mla.rope_tables",
        _positions(lambda positions: positions.bfloat16().float()),
    ),
    bug("A17-next", "a query sees the key after its own", "mask", lambda m: _seen_from(1)(m)),
    bug("A17-window", "keys further back than seven are masked", "mla.scores", lambda m: with_attention(_window)),
    bug("Y01", "rotary positions count from 1", "mla.rope_tables", _positions(lambda positions: positions + 1)),
    bug("Y02", "the key is rotated one position too far", "mla.k_rope", _rotating(_right, _late)),
    bug("Y03", "the key is not rotated", "mla.k_rope", _rotating(_right, _as_is)),
    bug("Y04", "both are rotated backwards", _ROTATED, _rotating(_backwards, _backwards)),
    bug(
        "Y05",
        "the rotated channels of q are taken from its front",
        "mla.q_rope mla.scores",
        attending(split_q=lambda a, q: (q[..., a.qk_rope_head_dim :], q[..., : a.qk_rope_head_dim])),
    ),
    bug(
        "Y06",
        "v stands before k_nope in kv_b's output",
        "mla.scores mla.ctx",
        attending(split_kv=lambda a, kv: kv.split([a.v_head_dim, a.qk_nope_head_dim], dim=-1)[::-1]),
    ),
    bug(
        "Y07",
        "the key-value latent is not normalised",
        "mla.c_kv",
        lambda m: with_forward(m, "kv_a_layernorm", lambda norm, _: lambda x: x),
    ),
    bug(
        "Y08",
        "one norm over latent and rotated key together",
        "mla.c_kv mla.k_rope",
        attending(split_a=_joint_norm),
        also="mla.kv_b",  # the norm's module is not called, so its tap is not there to be blamed
    ),
    bug("Y09", "the softmax runs over the queries", "mla.probs", _softmax(-2)),
    bug("Y10", "no softmax scale", "mla.scores", _scaling(lambda a, rope: 1.0)),
    bug(
        "Y11",
        "the softmax scale counts the unrotated channels only",
        "mla.scores",
        _scaling(lambda a, rope: a.scaling * math.sqrt(a.qk_head_dim / a.qk_nope_head_dim)),
    ),
    bug(
        "Y12",
        "the softmax scale counts the latent's channels",
        "mla.scores",
        _scaling(lambda a, rope: a.scaling * math.sqrt(a.qk_head_dim / (a.kv_lora_rank + a.qk_rope_head_dim))),
    ),
    bug(
        "Y13",
        "heads and tokens are not exchanged back before the output",
        "mla.ctx",
        attending(join=lambda a, out: out.transpose(1, 2).reshape(*out.shape[:2], -1)),
    ),
    bug(
        "Y14",
        "the next head's values are averaged",
        "mla.ctx",
        attending(split_kv=lambda a, kv: (kv[..., : a.qk_nope_head_dim], kv[..., a.qk_nope_head_dim :].roll(1, 1))),
    ),
)
