"""The released models and two small ones, by name."""

from __future__ import annotations

from .config import Config
from .rope import RopeScaling

DEEPSEEK_V3 = Config()
"""DeepSeek-V3, R1, V3.1 (671B): R 4.2 and the released config."""

DEEPSEEK_V2 = Config(
    vocab_size=102400,
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=60,
    n_shared_experts=2,
    n_routed_experts=160,
    num_experts_per_tok=6,
    n_group=8,
    topk_group=3,
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
    # DeepSeek's inference code sets mscale 1.0 here; both give cos/sin x 1 and the stated softmax factor
)
"""DeepSeek-V2 (236B), DeepSeek-V3 inference/configs/config_236B.json."""

DEEPSEEK_V2_LITE = DEEPSEEK_V2.replace(
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    n_routed_experts=64,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    routed_scaling_factor=1.0,
    q_lora_rank=None,
    rope_scaling=RopeScaling(mscale=0.707, mscale_all_dim=0.707),
)
"""DeepSeek-V2-Lite (16B), DeepSeek-V3 inference/configs/config_16B.json."""

TINY = Config(
    vocab_size=128,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    q_lora_rank=24,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    first_k_dense_replace=1,
)
"""Every mechanism of V3 with 128,436 parameters (without MTP): the tests' and the diff's small case. Scaled down
only.
"""

MINI = TINY.replace(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1280,
    moe_intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    n_routed_experts=32,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
)
"""52 M parameters: the size the benchmarks run."""

PRESETS = {
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v2": DEEPSEEK_V2,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "tiny": TINY,
    "mini": MINI,
}
"""Config by name, for the command line."""
