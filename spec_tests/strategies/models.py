"""Random small DeepSeek models: strategies for config.json dictionaries, and weights for them.

Every config but those with n_group null is one that transformers 5.23.0 could run: groups of at
least two experts, enough experts in the kept groups, even rotary dimensions, and the two families
of router that exist (V3: sigmoid, bias, noaux_tc; V2: softmax, no bias, no renormalisation).
"""

import numpy as np
from hypothesis import strategies as st

mscales = st.just(0.0) | st.floats(0.3, 1.5)  # transformers takes 0 for absent

seeds = st.integers(0, 2**32 - 1)
V3, V2 = ("sigmoid", "noaux_tc"), ("softmax", "group_limited_greedy")
ROUTERS = [V3, V3, V2, ("softmax", "greedy")]  # (scoring_func, topk_method)


@st.composite
def rope(draw):
    """RoPE keys in either dialect: plain, or YaRN with factor 1..40 and any of the two mscales."""
    theta = draw(st.sampled_from([10.0, 100.0, 10000.0]))
    if draw(st.booleans()):
        return draw(
            st.sampled_from(
                [
                    {"rope_theta": theta},
                    {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}},
                ]
            )
        )
    scaling = {
        "factor": draw(st.floats(1.0, 40.0)),
        "original_max_position_embeddings": draw(st.sampled_from([16, 64, 512, 4096])),
    }
    scaling |= draw(st.sampled_from([{}, {"beta_fast": 32, "beta_slow": 1}, {"beta_fast": 4, "beta_slow": 2}]))
    scaling |= draw(st.fixed_dictionaries({}, optional={"mscale": mscales, "mscale_all_dim": mscales}))
    if draw(st.booleans()):
        return {"rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": theta}}
    return {"rope_theta": theta, "rope_scaling": scaling | {"type": "yarn"}}


@st.composite
def attention(draw):
    """Keys of multi-head latent attention."""
    rank = st.integers(2, 8)
    return {
        "num_attention_heads": draw(st.integers(1, 3)),
        "q_lora_rank": draw(st.none() | rank),
        "kv_lora_rank": draw(rank),
        "qk_nope_head_dim": draw(rank),
        "qk_rope_head_dim": 2 * draw(st.integers(1, 4)),
        "v_head_dim": draw(rank),
        "rope_interleave": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
    }


@st.composite
def routing(draw):
    """Keys of the router: groups, top-k and the two families of score and selection."""
    groups, size = draw(st.sampled_from([None, 1, 2, 4])), draw(st.integers(2, 4))
    experts = (groups or draw(st.integers(1, 3))) * size
    kept = draw(st.integers(1, groups)) if groups else None
    family = draw(st.sampled_from(ROUTERS))
    return {
        "n_routed_experts": experts,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": draw(st.integers(1, size * kept if kept else experts)),
        "scoring_func": family[0],
        "topk_method": family[1],
        "norm_topk_prob": family[0] == "sigmoid" and draw(st.booleans()),
        "routed_scaling_factor": draw(st.floats(0.5, 3.0)),
    }


@st.composite
def configs(draw):
    """A whole config.json of a model with 1 to 3 layers."""
    layers = draw(st.integers(1, 3))
    return (
        {
            "model_type": "deepseek_v3",
            "hidden_act": "silu",
            "vocab_size": draw(st.integers(7, 20)),
            "hidden_size": draw(st.integers(8, 24)),
            "intermediate_size": draw(st.integers(4, 12)),
            "moe_intermediate_size": draw(st.integers(2, 8)),
            "num_hidden_layers": layers,
            "first_k_dense_replace": draw(st.sampled_from([0, 0, 1, layers])),
            "moe_layer_freq": 1,
            "n_shared_experts": draw(st.integers(0, 2)),
            "num_nextn_predict_layers": 0,
            "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
            "max_position_embeddings": 4096,
            "tie_word_embeddings": draw(st.booleans()),
        }
        | draw(attention())
        | draw(routing())
        | draw(rope())
    )


def tokens(config, batch=2, length=6):
    """(B, S) token ids as an array."""
    shape = (batch, length)
    return seeds.map(lambda s: np.random.default_rng(s).integers(0, config["vocab_size"], shape))


# (mean, spread) of the selection bias: mixed signs, positive, every biased score negative.
biases = st.sampled_from([(0.0, 0.15), (0.3, 0.05), (-3.0, 0.5)])


def make_weights(config, rng, bias=(0.0, 0.15), mtp=0):
    """{checkpoint name: float64 array}, drawn large so that a mistake shows (golden/README.md).

    bias is (mean, spread) of e_score_correction_bias; mtp adds that many MTP layers.
    """
    return {name: _draw(name, shape, rng, bias) for name, shape in shapes(config, mtp).items()}


def _draw(name, shape, rng, bias):
    if "norm.weight" in name:
        return 1 + 0.2 * rng.standard_normal(shape)
    if name.endswith("e_score_correction_bias"):
        return bias[0] + bias[1] * rng.standard_normal(shape)
    if name.endswith(".bias"):
        return 0.3 * rng.standard_normal(shape)
    spread = 0.4 if name.endswith("mlp.gate.weight") else 1.0 if "embed" in name else 1.3 / np.sqrt(shape[-1])
    return spread * rng.standard_normal(shape)


def shapes(config, mtp=0):
    """{checkpoint name: shape} of everything the config asks for."""
    width, vocab, last = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    found = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, width)
    for layer in range(last + mtp):
        at = f"model.layers.{layer}."
        found |= {at + name: shape for name, shape in _layer(config, layer >= config["first_k_dense_replace"]).items()}
        if layer >= last:
            found |= {f"{at}{name}.weight": (width,) for name in ("enorm", "hnorm", "shared_head.norm")}
            found[at + "eh_proj.weight"] = (width, 2 * width)
    return found


def _layer(config, mixture):
    width = config["hidden_size"]
    found = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    found |= {"self_attn." + name: shape for name, shape in _attention(config).items()}
    if not mixture:
        return found | _swiglu("mlp.", width, config["intermediate_size"])
    experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
    found["mlp.gate.weight"] = (experts, width)
    if config["topk_method"] == "noaux_tc":
        found["mlp.gate.e_score_correction_bias"] = (experts,)
    for e in range(experts):
        found |= _swiglu(f"mlp.experts.{e}.", width, inner)
    if config["n_shared_experts"]:
        found |= _swiglu("mlp.shared_experts.", width, inner * config["n_shared_experts"])
    return found


def _swiglu(at, width, inner):
    return {
        at + "gate_proj.weight": (inner, width),
        at + "up_proj.weight": (inner, width),
        at + "down_proj.weight": (width, inner),
    }


def _attention(config):
    """Shapes of one attention; attention_bias never means q_proj, q_b_proj or kv_b_proj."""
    width, heads, q_rank, kv_rank = (
        config[k] for k in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    nope, rope_dim, value = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    found = {
        "kv_a_proj_with_mqa": (kv_rank + rope_dim, width),
        "kv_a_layernorm": (kv_rank,),
        "kv_b_proj": (heads * (nope + value), kv_rank),
        "o_proj": (width, heads * value),
    }
    if q_rank is None:
        found["q_proj"] = (heads * (nope + rope_dim), width)
    else:
        found |= {
            "q_a_proj": (q_rank, width),
            "q_a_layernorm": (q_rank,),
            "q_b_proj": (heads * (nope + rope_dim), q_rank),
        }
    with_bias = [n for n in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj") if n in found and config["attention_bias"]]
    return {n + ".weight": s for n, s in found.items()} | {n + ".bias": found[n][:1] for n in with_bias}
