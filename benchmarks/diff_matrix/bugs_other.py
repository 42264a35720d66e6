"""Bugs of norms, activations, the residual stream and both ends of the model; and weights that are not the case's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from entries import after, bug, together, with_forward, with_setting, with_weight
from torch.nn.functional import gelu, linear

from refimpl.autograd.errors import require

_ACT = "mlp.act shared.act moe.act"
_NORMS = "attn_norm ffn_norm final_norm mla.q_a_norm mla.c_kv"
_HIDDEN = ("input_layernorm", "post_attention_layernorm", "model.norm")


def _all_eps(model: Any) -> Any:
    eps = lambda norm: 1e-5  # noqa: E731
    endings = [*_HIDDEN, "kv_a_layernorm", *(["q_a_layernorm"] if model.config.q_lora_rank else [])]
    return together(*[with_setting(model, e, "variance_epsilon", eps) for e in endings])


def _each(endings: tuple[str, ...], wrap: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """A patch of all modules with one of these endings."""
    return lambda model: together(*[with_forward(model, e, wrap) for e in endings])


def _same(module: Any, forward: Any) -> Any:
    return lambda x: x


def _layer_norm(norm: Any, forward: Any) -> Any:
    return lambda x: forward(x - x.float().mean(dim=-1, keepdim=True).to(x.dtype))


def _one_more(norm: Any, forward: Any) -> Any:
    return lambda x: (forward(x).float() * (1 + 1 / norm.weight.float())).to(x.dtype)


def _l2(norm: Any, forward: Any) -> Any:
    return lambda x: forward(x) / x.shape[-1] ** 0.5


class _Act(torch.nn.Module):
    def __init__(self, act: Callable[[Any], Any]) -> None:
        super().__init__()
        self.forward = act


def _activation(act: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A patch: another activation, in dense, shared and routed experts alike."""

    def patch(model: Any) -> Any:
        paths = [path for path, m in model.named_modules() if hasattr(m, "act_fn")]
        return together(*[with_setting(model, path, "act_fn", lambda m: _Act(act)) for path in paths])

    return patch


def _swapped(mlp: Any, forward: Any) -> Any:
    return lambda x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x))


def _swap_gate_and_up(model: Any) -> Any:
    paths = [path for path, m in model.named_modules() if hasattr(m, "up_proj")]
    return together(*[with_forward(model, path, _swapped) for path in paths])


def _layers(step: Callable[..., Any]) -> Callable[[Any], Any]:
    """A patch: every decoder layer computes step(layer, x, attend), attend being its attention of a normed x."""

    def wrap(layer: Any, _: Any) -> Any:
        def forward(x: Any, **kwargs: Any) -> Any:
            return step(layer, x, lambda h: layer.self_attn(hidden_states=h, **kwargs)[0])

        return forward

    def patch(model: Any) -> Any:
        paths = [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
        return together(*[with_forward(model, path, wrap) for path in paths])

    return patch


def _after_norm(layer: Any, x: Any, attend: Any) -> Any:
    x = layer.input_layernorm(x)
    x = x + attend(x)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def _after_second_norm(layer: Any, x: Any, attend: Any) -> Any:
    x = x + attend(layer.input_layernorm(x))
    x = layer.post_attention_layernorm(x)
    return x + layer.mlp(x)


def _parallel(layer: Any, x: Any, attend: Any) -> Any:
    """The feed-forward adds to what came before attention."""
    mid = x + attend(layer.input_layernorm(x))
    return x + layer.mlp(layer.post_attention_layernorm(mid))


def _skip_last(model: Any) -> Any:
    last = f"model.layers.{model.config.num_hidden_layers - 1}"
    return with_forward(model, last, lambda layer, _: lambda x, **kwargs: x)


def _tied(head: Any, embedding: Any) -> Any:
    return lambda x: linear(x, embedding.weight)


def _tie(model: Any) -> Any:
    return with_forward(model, "lm_head", lambda head, _: _tied(head, model.model.embed_tokens))


def _shifted(embedding: Any, forward: Any) -> Any:
    return lambda ids: forward(ids.roll(1, dims=-1))


# ---- Weights


def _turned(w: Any) -> Any:
    """Read as if stored the other way round."""
    return w.T.reshape(w.shape)


def _deinterleaved(heads: int, rope: int) -> Callable[[Any], Any]:
    """The rotated rows of every head in the order of halves, as a converter for another layout writes them."""

    def change(w: Any) -> Any:
        h = w.view(heads, -1, w.shape[-1])
        last = h[:, -rope:]
        return torch.cat((h[:, :-rope], last[:, 0::2], last[:, 1::2]), dim=1).reshape(w.shape)

    return change


def _q_rows(model: Any) -> Any:
    ending = "q_proj.weight" if model.config.q_lora_rank is None else "q_b_proj.weight"
    return with_weight(model, ending, _deinterleaved(model.config.num_attention_heads, model.config.qk_rope_head_dim))


def _experts(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A patch of both fused tensors of every layer's experts, (E, ...)."""
    return lambda model: together(
        *[with_weight(model, f"mlp.experts.{name}", change) for name in ("gate_up_proj", "down_proj")]
    )


def _exchange(w: Any) -> Any:
    order = list(range(len(w)))
    order[2], order[5] = order[5], order[2]
    return w[order]


def _without_last(w: Any) -> Any:
    w[-1] = 0
    return w


def _kv_rows(model: Any) -> Any:
    """All keys before all values, where the checkpoint has them head by head."""
    heads, nope = model.config.num_attention_heads, model.config.qk_nope_head_dim

    def change(w: Any) -> Any:
        h = w.view(heads, -1, w.shape[-1])
        return torch.cat((h[:, :nope].flatten(0, 1), h[:, nope:].flatten(0, 1)))

    require(heads > 1, "one head only")
    return with_weight(model, "kv_b_proj.weight", change)


BUGS = (
    bug("N01", "eps of all norms is 1e-5", _NORMS, _all_eps),
    bug("N02", "no final norm", "final_norm", _each(("model.norm",), _same)),
    bug("N03", "norms subtract the mean", "attn_norm ffn_norm final_norm", _each(_HIDDEN, _layer_norm)),
    bug("N04", "norms multiply by 1 + weight", "attn_norm ffn_norm final_norm", _each(_HIDDEN, _one_more)),
    bug(
        "N05",
        "norms divide by the length, not the root mean square",
        "attn_norm ffn_norm final_norm",
        _each(_HIDDEN, _l2),
    ),
    bug("F01", "gelu instead of silu", _ACT, _activation(gelu)),
    bug("F02", "gelu's approximation of silu", _ACT, _activation(lambda x: x * (1.702 * x).sigmoid())),
    bug("F03", "gate and up are swapped", "mlp.act shared.act", _swap_gate_and_up),
    bug("S01", "the residual is taken after the first norm", "resid_mid", _layers(_after_norm)),
    bug("S02", "the residual is taken after the second norm", "resid", _layers(_after_second_norm)),
    bug("S03", "the feed-forward's residual is that of attention", "resid", _layers(_parallel)),
    bug("S04", "the last layer is left out", "final_norm resid resid_mid", _skip_last),
    bug(
        "E01",
        "the embedding is scaled by the root of the width",
        "embed",
        lambda m: with_forward(m, "embed_tokens", after(lambda e, y: y * e.embedding_dim**0.5)),
    ),
    bug(
        "E02", "the embedding is that of the token before", "embed", lambda m: with_forward(m, "embed_tokens", _shifted)
    ),
    bug("H01", "the head is tied to the embedding", "logits", _tie),
    bug(
        "H02",
        "logits are capped at 5",
        "logits",
        lambda m: with_forward(m, "lm_head", after(lambda _, y: 5 * (y / 5).tanh())),
    ),
    bug(
        "W01", "q's rotated rows are in the order of halves", "mla.q", _q_rows, weights="q_b_proj.weight q_proj.weight"
    ),
    bug("W02", "kv_b has all keys before all values", "mla.kv_b", _kv_rows, weights="kv_b_proj.weight"),
    bug(
        "W03",
        "o_proj is read transposed",
        "attn_out",
        lambda m: with_weight(m, "o_proj.weight", _turned),
        weights="o_proj.weight",
    ),
    bug(
        "W04",
        "experts 2 and 5 are exchanged",
        "moe.gate moe.up moe.down",
        _experts(_exchange),
        weights="gate_proj.weight up_proj.weight down_proj.weight",
    ),
    bug(
        "W05",
        "the last expert is not loaded",
        "moe.gate moe.up moe.down",
        _experts(_without_last),
        weights="gate_proj.weight up_proj.weight down_proj.weight",
    ),
    bug(
        "W06",
        "the experts' gate and up are exchanged",
        "moe.gate moe.up",
        lambda m: with_weight(m, "mlp.experts.gate_up_proj", lambda w: torch.cat(w.chunk(2, dim=1)[::-1], dim=1)),
        weights="gate_proj.weight up_proj.weight",
    ),
    bug(
        "W07",
        "norm weights are not loaded and stay 1",
        "attn_norm",
        lambda m: with_weight(m, "input_layernorm.weight", torch.ones_like),
        weights="input_layernorm.weight",
    ),
    bug(
        "W08",
        "embeddings are shifted by a row",
        "embed",
        lambda m: with_weight(m, "embed_tokens.weight", lambda w: w.roll(1, 0)),
        weights="embed_tokens.weight",
    ),
)
