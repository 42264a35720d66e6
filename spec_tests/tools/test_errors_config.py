"""Configs that the specification rejects, and what it says: each names the key, its value and the rule."""

import pytest

from refimpl.layers import Config
from refimpl.spec_tests.cases.small_models import SMALL

from .test_errors import DICT, rejected

AT_LEAST_ONE = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
    "moe_layer_freq",
]
NOT_NEGATIVE = ["n_shared_experts", "n_routed_experts", "first_k_dense_replace", "num_nextn_predict_layers"]
YARN = DICT["rope_scaling"]
CONFIGS = [
    *[({k: 0}, f"{k} is 0; it must be at least 1") for k in AT_LEAST_ONE],
    *[({k: -1}, f"{k} is -1; it must not be negative") for k in NOT_NEGATIVE],
    ({"q_lora_rank": -4}, "q_lora_rank is -4; at least 1 or null"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; pairs need an even size"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0; it must be positive"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be positive"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0; it must be positive"),
    ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor must be finite"),
    ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0; at least 1"),
    ({"num_experts_per_tok": 13}, "num_experts_per_tok=13 is not between 1 and n_routed_experts=12"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 is not between 1 and"),
    ({"n_group": 5}, "n_group=5 does not divide n_routed_experts=12"),
    ({"n_group": 0}, "n_group=0 does not divide"),
    ({"topk_group": 5}, "topk_group=5 exceeds n_group=4"),
    ({"topk_group": 0}, "topk_group=0; at least 1"),
    ({"topk_group": 1}, "num_experts_per_tok=4 exceeds the 3 experts of topk_group=1 groups"),
    ({"n_group": 12, "topk_group": 6}, "groups of 1 expert: .* sum of its two best"),
    ({"scoring_func": "tanh"}, "scoring_func is 'tanh'; it must be one of sigmoid, softmax"),
    ({"topk_method": "best"}, "topk_method is 'best'; it must be one of noaux_tc, "),
    ({"vocab_size": "29"}, "vocab_size is '29'; it must be an integer"),
    ({"hidden_size": 24.0}, r"hidden_size is 24\.0; it must be an integer"),
    ({"num_attention_heads": True}, "num_attention_heads is True; it must be an integer"),
    ({"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be true or false"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; it must be a number"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the specification has only 'silu'"),
    ({"mlp_bias": True}, "mlp_bias is True; the specification has only False"),
    ({"index_topk": 2048, "index_n_heads": 64}, "does not know: index_n_heads, index_topk"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'; .*'default' and 'yarn'"),
    ({"rope_scaling": YARN | {"factor": 0}}, "rope_scaling.factor is 0; it must be a positive"),
    ({"rope_scaling": YARN | {"beta_fast": "x"}}, "rope_scaling.beta_fast is 'x'"),
    ({"rope_scaling": {"type": "yarn", "factor": 40}}, "needs 'original_max_position_embeddings'"),
    ({"rope_scaling": YARN | {"low_freq_factor": 1}}, "does not know: low_freq_factor"),
    ({"rope_scaling": YARN | {"attention_factor": 1.3}}, "attention_factor .* not part of"),
    ({"rope_scaling": YARN | {"truncate": False}}, "truncate=false are not part of"),
    ({"rope_theta": "ten thousand"}, "rope_theta"),
    ({"rope_theta": 1.0}, "rope_theta is 1.0; frequencies fall with it only above 1"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be an object or null"),
    ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be an object or null"),
    ({"rope_scaling": YARN | {"mscale": float("nan")}}, "rope_scaling.mscale is nan; it must be a number or null"),
    ({"dialect": "paper"}, "dialect is 'paper'; it must be an object or null"),
    ({"dialect": {"latent_norm_eps": float("nan")}}, "latent_norm_eps is nan; it must be a number"),
    ({3: 4}, r"config keys must be names, not \[3\]"),
    ({"rope_theta": None, "rope_scaling": None}, "rope_theta"),
    ({"dialect": {"mtp_order": "x"}}, "unknown dialect points mtp_order; known: bias_update, "),
    ({"dialect": {"mtp_concat": "both"}}, "mtp_concat is 'both'.*embedding_first"),
    ({"dialect": {"topk_denominator_eps": "x"}}, "topk_denominator_eps is 'x'"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=lambda v: str(v)[:60])
def test_impossible_config(changes, message):
    """Each names the key, its value and the rule."""
    rejected(lambda: Config.from_dict(DICT | changes), message)


@pytest.mark.parametrize("key", ["vocab_size", "qk_rope_head_dim", "topk_group"])
def test_replacing_a_value_checks_again(key):
    """Catches a copy that skips the rules."""
    rejected(lambda: SMALL.replace(**{key: -2}), key)


def test_a_model_without_experts_needs_no_expert_rules():
    """Catches rules applied to what is not there: n_routed_experts = 0 is a dense model."""
    c = SMALL.replace(n_routed_experts=0, n_group=7, num_experts_per_tok=99)
    assert not any(c.is_moe(i) for i in range(c.num_hidden_layers))
