"""Rewrites that a correct port may make: other orders, other places of a factor, more precision, other kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bugs_router import routed
from entries import after, innocent, together, with_forward
from innocents_attention import INNOCENTS as ATTENTION
from torch.nn.functional import linear, silu

# ---- Experts


def _expert(m: Any, e: int, x: Any, weights: Any | None = None) -> Any:
    """One expert on its rows; with weights they are multiplied into the activation."""
    gate, up = linear(x, m.gate_up_proj[e]).chunk(2, dim=-1)
    act = m.act_fn(gate) * up
    return linear(act if weights is None else (act * weights).to(x.dtype), m.down_proj[e])


def _experts(
    *, falling: bool = False, float32: bool = False, on_activation: bool = False
) -> Callable[[Any, Any], Callable[..., Any]]:
    """The loop over experts, another way."""

    def wrap(m: Any, _: Any) -> Any:
        def forward(x: Any, ids: Any, weights: Any) -> Any:
            out = torch.zeros(x.shape, dtype=torch.float32 if float32 else x.dtype)
            for e in sorted(ids.unique().tolist(), reverse=falling):
                slot, token = (e == ids.T).nonzero(as_tuple=True)
                g = weights[token, slot, None]
                y = _expert(m, e, x[token], g) if on_activation else _expert(m, e, x[token]) * g
                out.index_add_(0, token, y.to(out.dtype))
            return out.to(x.dtype)

        return forward

    return wrap


@contextmanager
def _kernels(model: Any, kind: str) -> Iterator[None]:
    model.set_experts_implementation(kind)
    try:
        yield
    finally:
        model.set_experts_implementation("eager")


def _on_moe(wrap: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    def patch(model: Any) -> Any:
        paths = [path for path, m in model.named_modules() if path.endswith(".mlp") and hasattr(m, "experts")]
        return together(*[with_forward(model, path, wrap) for path in paths])

    return patch


def _shared_first(mlp: Any, _: Any) -> Any:
    def forward(x: Any) -> Any:
        shared = mlp.shared_experts(x)
        _, weights, ids = mlp.gate(x)
        return shared + mlp.experts(x.view(-1, x.shape[-1]), ids, weights).view_as(x)

    return forward


def _scaled_after(model: Any) -> Any:
    """The router does not scale; the experts' sum is scaled instead."""
    scale = model.config.routed_scaling_factor
    unscaled = after(lambda gate, out: (out[0], out[1] / scale, out[2]))
    return together(
        with_forward(model, "mlp.gate", unscaled),
        with_forward(model, "mlp.experts", after(lambda _, y: (y.float() * scale).to(y.dtype))),
    )


# ---- Everything else


def _split_k(module: Any, _: Any) -> Any:
    """The product in two halves of the summed axis, added in float32."""

    def forward(x: Any) -> Any:
        h = x.shape[-1] // 2
        one, two = (linear(x[..., part].float(), module.weight[:, part].float()) for part in (slice(h), slice(h, None)))
        return (one + two).to(x.dtype)

    return forward


def _split_all(model: Any) -> Any:
    paths = [path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    return together(*[with_forward(model, path, _split_k) for path in paths])


def _two_ranks(module: Any, _: Any) -> Any:
    """The same, each half rounded to the model's dtype before they are added, as an all-reduce does."""

    def forward(x: Any) -> Any:
        h = x.shape[-1] // 2
        return linear(x[..., :h], module.weight[:, :h]) + linear(x[..., h:], module.weight[:, h:])

    return forward


def _tensor_parallel(model: Any) -> Any:
    paths = [p for p, m in model.named_modules() if p.endswith(("o_proj", "down_proj")) and hasattr(m, "weight")]
    return together(*[with_forward(model, path, _two_ranks) for path in paths])


def _norms(norm: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """A patch: norm(weight, x) in float32 for every norm, with its eps."""

    def wrap(m: Any, _: Any) -> Any:
        return lambda x: norm(m, x.float()).to(x.dtype)

    def patch(model: Any) -> Any:
        paths = [path for path, m in model.named_modules() if hasattr(m, "variance_epsilon")]
        return together(*[with_forward(model, path, wrap) for path in paths])

    return patch


def _weight_first(m: Any, x: Any) -> Any:
    return m.weight.float() * (x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + m.variance_epsilon))


def _divided(m: Any, x: Any) -> Any:
    return x / torch.sqrt(x.square().sum(dim=-1, keepdim=True) / x.shape[-1] + m.variance_epsilon) * m.weight.float()


def _mlps(forward: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """A patch of the dense feed-forward and the shared experts: forward(module, x)."""

    def patch(model: Any) -> Any:
        paths = [path for path, m in model.named_modules() if hasattr(m, "gate_proj")]
        return together(*[with_forward(model, path, lambda m, _: lambda x: forward(m, x)) for path in paths])

    return patch


def _silu_float32(m: Any, x: Any) -> Any:
    return m.down_proj((silu(m.gate_proj(x).float()) * m.up_proj(x).float()).to(x.dtype))


def _fused(m: Any, x: Any) -> Any:
    gate, up = linear(x, torch.cat((m.gate_proj.weight, m.up_proj.weight))).chunk(2, dim=-1)
    return m.down_proj(m.act_fn(gate) * up)


def _sums_float32(layer: Any, _: Any) -> Any:
    def forward(hidden_states: Any, **kwargs: Any) -> Any:
        x = hidden_states.float()
        x = x + layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0].float()
        return x + layer.mlp(layer.post_attention_layernorm(x)).float()

    return forward


def _stream_float32(model: Any) -> Any:
    """The residual stream is float32 throughout; norms give what the products take."""
    narrow = lambda norm, forward: lambda x: forward(x).to(model.dtype)  # noqa: E731
    paths = [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
    layers = [with_forward(model, path, _sums_float32) for path in paths]
    norms = [with_forward(model, e, narrow) for e in ("input_layernorm", "post_attention_layernorm", "model.norm")]
    return together(*layers, *norms)


def _head_float32(head: Any, _: Any) -> Any:
    return lambda x: linear(x.float(), head.weight.float())


def _sorted_ids(gate: Any, out: Any) -> Any:
    ids, order = out[2].sort(dim=-1)
    return out[0], out[1].gather(1, order), ids


def _in_storage(gate: Any, out: Any) -> Any:
    return out[0], out[1].to(gate.weight.dtype), out[2]


def _logits_float64(gate: Any, x: Any) -> Any:
    return linear(x.double(), gate.weight.double()).float()


INNOCENTS = (
    *ATTENTION,
    innocent(
        "weight-on-activation",
        "the routing weight multiplies the activation",
        lambda m: with_forward(m, "mlp.experts", _experts(on_activation=True)),
    ),
    innocent("experts-falling", "last expert first", lambda m: with_forward(m, "mlp.experts", _experts(falling=True))),
    innocent("experts-float32", "summed in float32", lambda m: with_forward(m, "mlp.experts", _experts(float32=True))),
    innocent("experts-batched", "transformers' batched_mm", lambda m: _kernels(m, "batched_mm")),
    innocent("experts-grouped", "transformers' grouped_mm", lambda m: _kernels(m, "grouped_mm")),
    innocent("experts-scaled-after", "the scaling factor multiplies the experts' sum", _scaled_after),
    innocent("shared-first", "routed experts are added to the shared one", _on_moe(_shared_first)),
    innocent("split-k", "products in two halves of the summed axis", _split_all),
    innocent("tensor-parallel", "output projections summed over two ranks", _tensor_parallel),
    innocent("norm-weight-first", "norm weights in float32, rounded after", _norms(_weight_first)),
    innocent("norm-sqrt", "x / sqrt, not x * rsqrt", _norms(_divided)),
    innocent("silu-float32", "activations in float32", _mlps(_silu_float32)),
    innocent("gate-up-fused", "one product for gate and up", _mlps(_fused)),
    innocent("stream-float32", "the residual stream in float32", _stream_float32),
    innocent("logits-float32", "the head in float32", lambda m: with_forward(m, "lm_head", _head_float32)),
    innocent("router-float64", "the router's product in float64", routed(logits=_logits_float64)),
    innocent(
        "ids-sorted",
        "experts of a token by id, weights with them",
        lambda m: with_forward(m, "mlp.gate", after(_sorted_ids)),
    ),
    innocent(
        "weights-in-storage",
        "routing weights in the dtype of the activations",
        lambda m: with_forward(m, "mlp.gate", after(_in_storage)),
    ),
)
