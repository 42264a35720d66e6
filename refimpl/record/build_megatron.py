"""Megatron-core's GPTModel on a CPU for the tap map `megatron`: one gloo rank, the local spec, sdpa as core attention.

Four things stand in the way without CUDA and Transformer Engine, and are put aside while the model lives: the YaRN table asks for
the current CUDA device, the local DotProductAttention knows no k_channels, multi_latent_attention asks isinstance of Transformer
Engine's classes, and moe_utils names a product of Transformer Engine's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.diff import Case
from refimpl.layers.config import Config

from .candidate import Candidate, library, plain_only
from .torch_arrays import to_torch

_TE_CLASSES = ("TELinear", "TEColumnParallelLinear", "TELayerNormColumnParallelLinear", "TERowParallelLinear")
_ATTENTION = {
    "linear_q_down_proj": "q_a_proj",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "linear_kv_up_proj": "kv_b_proj",
    "linear_proj": "o_proj",
    "q_layernorm": "q_a_layernorm",
    "kv_layernorm": "kv_a_layernorm",
}
"""Megatron's module -> the checkpoint's, below self_attention and self_attn."""


def build(case: Case) -> Candidate:
    """The model in float32, holding the case's weights. SpecError for a config that this does not know how to say."""
    torch = library("torch", "megatron")
    library("megatron.core", "megatron")
    plain_only(case, "Megatron's model here")
    c = supported(case.config)
    stack = ExitStack()
    try:
        _stand_ins(torch, stack)
        _one_rank(torch, stack)
        model = _model(torch, c)
        state = {n: to_torch(np.asarray(w, np.float32)) for n, w in converted(case.weights(), c).items()}
        found = model.load_state_dict(state, strict=False)
        missing = [n for n in found.missing_keys if not n.endswith("_extra_state")]
        require(not missing and not found.unexpected_keys, f"Megatron did not take {missing + found.unexpected_keys}")
    except BaseException:
        stack.close()
        raise
    note = "core attention is scaled_dot_product_attention with is_causal"
    return Candidate(model.eval(), _call, notes=(note,), release=stack.close)


def supported(c: Config) -> Config:
    """The config, if it is said here in Megatron's words."""
    require(c.q_lora_rank is not None, "q_lora_rank is null; Megatron is built here with a query latent")
    require(c.rope_scaling is not None, "rope_scaling is null; Megatron is built here with YaRN")
    said = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "num_nextn_predict_layers": 0}
    for name, only in said.items():
        value = getattr(c, name)
        require(value == only, f"{name} is {value!r}; Megatron is built here for {only!r}")
    return c


def converted(weights: Mapping[str, Array], c: Config) -> dict[str, Array]:
    """Megatron's names -> tensors; gate and up one below the other in linear_fc1."""
    found = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "output_layer.weight": weights["lm_head.weight"],
    }

    def feed_forward(to: str, at: str) -> dict[str, Array]:
        fc1 = np.concatenate([weights[f"{at}gate_proj.weight"], weights[f"{at}up_proj.weight"]])
        return {f"{to}linear_fc1.weight": fc1, f"{to}linear_fc2.weight": weights[f"{at}down_proj.weight"]}

    for i in range(c.num_hidden_layers):
        to, at = f"decoder.layers.{i}.", f"model.layers.{i}."
        found[f"{to}input_layernorm.weight"] = weights[f"{at}input_layernorm.weight"]
        found[f"{to}pre_mlp_layernorm.weight"] = weights[f"{at}post_attention_layernorm.weight"]
        for theirs, ours in _ATTENTION.items():
            found[f"{to}self_attention.{theirs}.weight"] = weights[f"{at}self_attn.{ours}.weight"]
        if not c.is_moe(i):
            found |= feed_forward(f"{to}mlp.", f"{at}mlp.")
            continue
        found[f"{to}mlp.router.weight"] = weights[f"{at}mlp.gate.weight"]
        found[f"{to}mlp.router.expert_bias"] = weights[f"{at}mlp.gate.e_score_correction_bias"]
        found |= feed_forward(f"{to}mlp.shared_experts.", f"{at}mlp.shared_experts.")
        for e in range(c.n_routed_experts):
            found |= feed_forward(f"{to}mlp.experts.local_experts.{e}.", f"{at}mlp.experts.{e}.")
    return found


def _call(model: Any, tokens: list[list[int]]) -> Any:
    torch = library("torch", "megatron")
    x = torch.tensor(tokens)
    places = torch.arange(x.shape[1])[None].expand(*x.shape)
    mask = torch.triu(torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool), 1)
    return model(x, places, mask)


def _model(torch: Any, c: Config) -> Any:
    specs = library("megatron.core.models.gpt.gpt_layer_specs", "megatron")
    gpt = library("megatron.core.models.gpt.gpt_model", "megatron")
    config = library("megatron.core.transformer.transformer_config", "megatron").MLATransformerConfig(
        **_settings(torch, c)
    )
    spec = specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    core = _sdpa(torch)
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = core
    return gpt.GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=c.vocab_size,
        max_sequence_length=c.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=c.rope_theta,
        share_embeddings_and_output_weights=c.tie_word_embeddings,
    )


_WORDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "num_moe_experts": "n_routed_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_router_num_groups": "n_group",
    "moe_router_group_topk": "topk_group",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "rotary_base": "rope_theta",
    "layernorm_epsilon": "rms_norm_eps",
}
"""Megatron's word -> the config's."""


def _settings(torch: Any, c: Config) -> dict[str, Any]:
    """MLATransformerConfig of the config: on a CPU, in float32, without fusions and dropout."""
    rope = c.rope_scaling
    assert rope is not None, "`supported` lets only YaRN through"
    dense = c.first_k_dense_replace
    names = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    off = (
        "moe_grouped_gemm",
        "apply_rope_fusion",
        "masked_softmax_fusion",
        "bias_activation_fusion",
        "add_bias_linear",
    )
    return {
        **{theirs: getattr(c, ours) for theirs, ours in _WORDS.items()},
        **{name: getattr(rope, name) for name in names},
        **dict.fromkeys((*off, "moe_router_pre_softmax"), False),
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), 0.0),
        "rotary_scaling_factor": rope.factor,
        "rope_type": "yarn",
        "moe_layer_freq": [0] * dense + [1] * (c.num_hidden_layers - dense),
        "moe_shared_expert_intermediate_size": c.moe_intermediate_size * c.n_shared_experts,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "qk_layernorm": True,
        "multi_latent_attention": True,
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
        "attention_softmax_in_fp32": True,
    }


def _sdpa(torch: Any) -> Any:
    """A core attention of torch's own, (S, B, H, D) in and (S, B, H Dv) out."""

    class Core(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self, *args: Any, softmax_scale: float | None = None, **rest: Any) -> None:
            super().__init__()
            self.scale = softmax_scale

        def forward(self, q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> Any:
            q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            return y.permute(2, 0, 1, 3).reshape(y.shape[2], y.shape[0], -1)

    return Core


def _stand_ins(torch: Any, stack: ExitStack) -> None:
    """What is missing without CUDA and Transformer Engine, until the stack is left."""
    attention = library("megatron.core.transformer.multi_latent_attention", "megatron")
    moe = library("megatron.core.transformer.moe.moe_utils", "megatron")

    def put(home: Any, name: str, value: Any) -> None:
        before = vars(home).get(name, stack)  # the stack itself stands for: was not there
        undo: Callable[..., None] = setattr if before is not stack else lambda h, n, _: delattr(h, n)
        stack.callback(undo, home, name, before)
        setattr(home, name, value)

    put(torch.cuda, "current_device", lambda: "cpu")
    if "te_general_gemm" not in vars(moe):
        put(moe, "te_general_gemm", None)
    for name in _TE_CLASSES:
        if not isinstance(vars(attention).get(name), type):
            put(attention, name, type(name, (), {}))


def _one_rank(torch: Any, stack: ExitStack) -> None:
    """torch.distributed and Megatron's groups, of this process alone, until the stack is left."""
    state = library("megatron.core.parallel_state", "megatron")
    require(not torch.distributed.is_initialized(), "torch.distributed is in use in this process")
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    stack.callback(torch.distributed.destroy_process_group)
    state.initialize_model_parallel(1, 1)
    stack.callback(state.destroy_model_parallel)
