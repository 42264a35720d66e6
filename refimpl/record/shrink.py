"""A real model's config made small with every mechanism kept: what can differ in a port differs in the small model too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refimpl.autograd.errors import require
from refimpl.layers.config import Config

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
"""Sizes of the small model: all different, none a multiple of another where a swap could hide."""
_RANKED = (
    ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    ("q_lora_rank", "kv_lora_rank"),
    ("hidden_size", "intermediate_size", "moe_intermediate_size"),
)
"""Sizes of which the larger stays the larger: kernels pad, slice and reuse buffers by which of them is."""
_WIDE_V = 22
"""Of a value that is wider than a query."""
_DENSE, _SPARSE = 2, 2
"""At most so many dense layers, and so many with experts."""


def shrink(c: Config) -> Config:
    """The config with small sizes, few layers and few experts.

    Kept as they are: full or low rank of queries, the groups and how they and the experts are chosen, scoring, renormalising,
    scaling, shared experts, the rule that says which layers are dense, RoPE and YaRN, eps, biases, tied embeddings, MTP modules;
    and which of the widths of a head, of the latents, of the stream and the experts is the larger.
    """
    small = {name: min(size, getattr(c, name)) for name, size in _sizes(c).items()}
    dense = min(c.first_k_dense_replace, _DENSE)
    sparse = [i for i in range(c.num_hidden_layers) if c.is_moe(i)]
    layers = dense + min(len(sparse) * c.moe_layer_freq, _SPARSE * c.moe_layer_freq) if sparse else _DENSE
    routing = _routing(c) if c.n_routed_experts else {}
    return c.replace(
        **small,
        **routing,
        first_k_dense_replace=dense,
        num_hidden_layers=max(1, min(layers, c.num_hidden_layers)),
    )


def _sizes(c: Config) -> dict[str, int]:
    """The small sizes, in the order that they have in the real model; what is equal there differs here."""
    sizes = {name: size for name, size in _SIZES.items() if getattr(c, name) is not None}
    for group in _RANKED:
        names = [n for n in group if n in sizes]
        rising = sorted(names, key=lambda n: (getattr(c, n), _SIZES[n]))
        sizes |= dict(zip(rising, sorted([sizes[n] for n in names]), strict=True))
    if c.v_head_dim > c.qk_nope_head_dim + c.qk_rope_head_dim:
        sizes["v_head_dim"] = _WIDE_V
    return sizes


def _routing(c: Config) -> dict[str, int]:
    """Experts and chosen experts: as many groups as before, four experts in each (16 where there is one group), half of what
    the kept groups hold at most being chosen.
    """
    per_group = min(16 if c.n_group == 1 else 4, c.n_routed_experts // c.n_group)
    kept = per_group * (c.topk_group if c.n_group > 1 and c.topk_method != "greedy" else c.n_group)
    return {
        "n_routed_experts": per_group * c.n_group,
        "num_experts_per_tok": max(1, min(c.num_experts_per_tok, kept // 2)),
    }


def quantised(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a config.json, None without one. SpecError for what is not FP8 in blocks."""
    q: Any = config.get("quantization_config")
    if q is None:
        return None
    method = q.get("quant_method") if isinstance(q, Mapping) else q
    more = "delete it from the config for weights in bfloat16"
    require(method == "fp8", f"quantization_config is {method!r}; a case's weights are FP8 in blocks or none: {more}")
    return dict(q)


def changes(before: Config, after: Config) -> list[str]:
    """`hidden_size 7168 -> 48` for every key that differs."""
    keys = [k for k, v in before.to_dict().items() if after.to_dict().get(k) != v]
    return [f"{k} {before.to_dict()[k]} -> {after.to_dict()[k]}" for k in keys]
