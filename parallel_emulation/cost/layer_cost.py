"""Parameters, FLOP and bytes of one layer of a config: what the planner multiplies. All counts are per layer.

Letters as in `Config`: D hidden, H heads, Dn Dr Dv head sizes, C and Q latent ranks, E experts, K chosen, S sequence.
"""

from __future__ import annotations

from refimpl.layers.config import Config

GROUPS = ("attention F", "mlp F", "attention I", "mlp I", "mlp W", "attention W")
"""Kernel groups of a layer: forward, backward for input, backward for weights of attention and of the experts."""


def attention_parameters(c: Config) -> int:
    """Projections of MLA: q (through its latent if there is one), kv_a, kv_b, o."""
    heads = c.num_attention_heads
    q_out = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    q = c.hidden_size * q_out if c.q_lora_rank is None else c.q_lora_rank * (c.hidden_size + q_out)
    kv_a = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim)
    kv_b = c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    return q + kv_a + kv_b + heads * c.v_head_dim * c.hidden_size


def norm_parameters(c: Config) -> int:
    """Two norms of the residual stream and those of the latents."""
    return 2 * c.hidden_size + (c.q_lora_rank or 0) + c.kv_lora_rank


def expert_parameters(c: Config) -> int:
    """gate, up and down of one routed expert."""
    return 3 * c.hidden_size * c.moe_intermediate_size


def dense_parameters(c: Config, layer: int) -> int:
    """What every data-parallel rank holds of a layer: all of it but the routed experts."""
    own = attention_parameters(c) + norm_parameters(c)
    if not c.is_moe(layer):
        return own + 3 * c.hidden_size * c.intermediate_size
    bias = c.n_routed_experts if c.topk_method == "noaux_tc" else 0  # the selection bias
    return own + c.n_shared_experts * expert_parameters(c) + c.n_routed_experts * c.hidden_size + bias


def core_flop(c: Config, sequence: int) -> float:
    """Forward FLOP per token of scores and context with a causal mask: (S + 1) / 2 keys on average."""
    per_key = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    return 2 * c.num_attention_heads * per_key * (sequence + 1) / 2


def mlp_flop(c: Config, *, moe: bool = True) -> float:
    """Forward FLOP per token of the router, K routed and the shared experts, or of a dense MLP."""
    if not moe:
        return 6.0 * c.hidden_size * c.intermediate_size
    active = c.num_experts_per_tok + c.n_shared_experts
    return 2.0 * (active * expert_parameters(c) + c.n_routed_experts * c.hidden_size)


def group_flop(c: Config, sequence: int) -> dict[str, float]:
    """FLOP per token of each kernel group of a MoE layer.

    The backward for input goes through each projection once and through the core with twice the forward's products;
    recomputed up-projections (R 3.2.3) are left out: they cancel against the calibration.
    """
    projections, core, mlp = 2.0 * attention_parameters(c), core_flop(c, sequence), mlp_flop(c)
    return {
        "attention F": projections + core,
        "mlp F": mlp,
        "attention I": projections + 2 * core,
        "mlp I": mlp,
        "mlp W": mlp,
        "attention W": projections,
    }


def training_flop(c: Config, sequence: int) -> float:
    """FLOP per token of a training step: 3 x forward of all layers and the head, without MTP and recomputation."""
    layers = range(c.num_hidden_layers)
    attention = 2 * attention_parameters(c) + core_flop(c, sequence)
    forward = sum(attention + mlp_flop(c, moe=c.is_moe(i)) for i in layers) + 2 * c.hidden_size * c.vocab_size
    return 3 * forward


def activation_bytes(c: Config, *, moe: bool = True) -> float:
    """Bytes a token keeps per layer until its backward, with what R 3.2.3 and R 3.3.3 recompute and compress.

    Kept: layer input and residual after attention (BF16), latents of q and kv (BF16; the up-projections are
    recomputed), attention output (E5M6, 12 bits) with a float32 log-sum-exp per head, the dispatched rows (FP8, one per
    chosen expert) and the inputs of SwiGLU (FP8; its output is recomputed). Norm outputs are recomputed.
    """
    heads = c.num_attention_heads
    latents = (c.q_lora_rank or c.hidden_size) + c.kv_lora_rank + c.qk_rope_head_dim
    attention = 2 * (2 * c.hidden_size + latents) + heads * (1.5 * c.v_head_dim + 4)
    if not moe:
        return attention + 2 * c.intermediate_size
    active = c.num_experts_per_tok + c.n_shared_experts
    return attention + c.num_experts_per_tok * c.hidden_size + active * 2 * c.moe_intermediate_size


def kv_cache_bytes(c: Config, value_bytes: int = 2) -> int:
    """Bytes of latent cache per token: (C + Dr) values in each layer (R 2.1.1); 70,272 for V3 in BF16."""
    return (c.kv_lora_rank + c.qk_rope_head_dim) * value_bytes * c.num_hidden_layers
