"""The small model of the tests: every mechanism of V3. By itself, since rank programs start in many processes at once."""

from refimpl.layers import Config
from refimpl.layers.rope import RopeScaling

SMALL = Config(
    vocab_size=29,
    hidden_size=24,
    intermediate_size=20,
    moe_intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=3,
    n_routed_experts=12,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    q_lora_rank=10,
    kv_lora_rank=9,
    qk_nope_head_dim=7,
    qk_rope_head_dim=8,
    v_head_dim=5,
    first_k_dense_replace=1,
    max_position_embeddings=512,
    rope_theta=100.0,  # all channels turn within the few positions that tests have
    rope_scaling=RopeScaling(original_max_position_embeddings=64),
    num_nextn_predict_layers=0,
)
