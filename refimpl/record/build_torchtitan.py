"""torchtitan's deepseek_v3 for the tap map `torchtitan`: its config from a case's, its own conversion of names, and sdpa in the
place of FlexAttention, which does not run on a CPU.
"""

from __future__ import annotations

from typing import Any

from refimpl.autograd.errors import require
from refimpl.diff import Case
from refimpl.layers.config import Config

from .candidate import Candidate, library
from .torch_arrays import to_torch


def build(case: Case) -> Candidate:
    """The model in float32, holding the case's weights. SpecError for a config that torchtitan has no words for."""
    titan = library("torchtitan.models.deepseek_v3", "torchtitan")
    c = supported(case.config)
    config = model_config(titan, c)
    model = config.build()
    adapter = titan.DeepSeekV3StateDictAdapter(config, None)
    weights = {n: to_torch(w).float() for n, w in case.weights().items()}
    found = model.load_state_dict(adapter.from_hf(weights), strict=False)
    missing = [n for n in found.missing_keys if n.endswith((".weight", "_EFD", "_EDF"))]
    require(not missing and not found.unexpected_keys, f"torchtitan did not take {missing + found.unexpected_keys}")
    note = "FlexAttention is replaced by scaled_dot_product_attention with is_causal"
    return Candidate(model.eval(), weights=adapter.to_hf(model.state_dict()), notes=(note,), release=_sdpa())


def supported(c: Config) -> Config:
    """The config, if torchtitan's parts can say it."""
    require(c.rope_scaling is not None, "torchtitan's deepseek_v3 is built here with YaRN; rope_scaling is null")
    r = c.rope_scaling
    require(
        r is not None and r.mscale == r.mscale_all_dim,
        "mscale and mscale_all_dim differ; torchtitan has one mscale, and which it stands for is not said",
    )
    require(c.topk_method == "noaux_tc", f"topk_method {c.topk_method!r}; torchtitan computes noaux_tc")
    require(c.num_nextn_predict_layers == 0, "MTP layers are not built here")
    return c


def model_config(titan: Any, c: Config) -> Any:
    """DeepSeekV3Model.Config, from torchtitan's own parts."""
    common = library("torchtitan.models.common", "torchtitan")
    table = {"num_embeddings": c.vocab_size, "embedding_dim": c.hidden_size, "param_init": titan._EMBEDDING_INIT}
    head = {"in_features": c.hidden_size, "out_features": c.vocab_size}
    return titan.DeepSeekV3Model.Config(
        vocab_size=c.vocab_size,
        dim=c.hidden_size,
        tok_embeddings=common.Embedding.Config(**table),
        norm=common.RMSNorm.Config(normalized_shape=c.hidden_size, param_init=titan._NORM_INIT),
        lm_head=common.Linear.Config(**head, param_init=titan._output_linear_init(c.hidden_size)),
        layers=titan._build_dsv3_layers(
            **{theirs: getattr(c, ours) for theirs, ours in _SETTINGS.items()},
            q_lora_rank=c.q_lora_rank or 0,
            rope=_rope(common, c),
            mscale=c.rope_scaling.mscale if c.rope_scaling else 1.0,
            attn_backend="flex",
            moe_comm_backend="standard",
            non_blocking_capacity_factor=None,
        ),
    )


_SETTINGS = {
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "dense_hidden_dim": "intermediate_size",
    "moe_hidden_dim": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "router_top_k": "num_experts_per_tok",
    "router_score_func": "scoring_func",
    "router_num_expert_groups": "n_group",
    "router_num_limited_groups": "topk_group",
    "router_route_scale": "routed_scaling_factor",
    "router_route_norm": "norm_topk_prob",
}
"""torchtitan's word -> the config's."""


def _rope(common: Any, c: Config) -> Any:
    r = c.rope_scaling
    assert r is not None, "`supported` lets only YaRN through"
    return common.ComplexRoPE.Config(
        dim=c.qk_rope_head_dim,
        max_seq_len=c.max_position_embeddings,
        theta=c.rope_theta,
        scaling="yarn",
        rope_factor=r.factor,
        beta_fast=r.beta_fast,
        beta_slow=r.beta_slow,
        original_seq_len=r.original_max_position_embeddings,
    )


def _sdpa() -> Any:
    """Put sdpa into FlexAttention -> a function that takes it out again."""
    torch = library("torch", "torchtitan")
    flex = library("torchtitan.models.common.attention", "torchtitan").FlexAttention
    original = flex.forward

    def forward(self: Any, q: Any, k: Any, v: Any, *, scale: float | None = None, **rest: Any) -> Any:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, S, H, .) -> (B, H, S, .)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return y.transpose(1, 2)

    flex.forward = forward
    return lambda: setattr(flex, "forward", original)
