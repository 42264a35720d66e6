"""Names of tensors and config keys. Canonical = Hugging Face's checkpoint; DeepSeek's converted
names map onto them.

One row per module of the model: Hugging Face's name, the name in deepseek-ai/DeepSeek-V3
inference/convert.py, and the axis along which convert.py cuts the weight for model parallelism
(None: every rank holds a copy). Beware of w2 and w3: w2 is the *down* projection, w3 the *up* one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from refimpl.autograd.errors import SpecError, require
from refimpl.layers.config import Config

_MODULES: tuple[tuple[str, str, int | None], ...] = (
    ("embed_tokens", "embed", 0),
    ("input_layernorm", "attn_norm", None),
    ("post_attention_layernorm", "ffn_norm", None),
    ("q_proj", "wq", 0),
    ("q_a_proj", "wq_a", None),
    ("q_a_layernorm", "q_norm", None),
    ("q_b_proj", "wq_b", 0),
    ("kv_a_proj_with_mqa", "wkv_a", None),
    ("kv_a_layernorm", "kv_norm", None),
    ("kv_b_proj", "wkv_b", 0),
    ("o_proj", "wo", 1),
    ("gate", "gate", None),
    ("gate_proj", "w1", 0),
    ("down_proj", "w2", 1),
    ("up_proj", "w3", 0),
    ("norm", "norm", None),
    ("lm_head", "head", 0),
)
_TO_DEEPSEEK = {hf: deepseek for hf, deepseek, _ in _MODULES}
_TO_HF = {deepseek: hf for hf, deepseek, _ in _MODULES}
_AXIS = {hf: axis for hf, _, axis in _MODULES}
_BLOCKS = {"self_attn": "attn", "mlp": "ffn"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

FP8_MODULES = frozenset(hf for hf in _TO_DEEPSEEK if "_proj" in hf)
"""The Linears stored as FP8 with a weight_scale_inv: all projections; not the gate, eh_proj, norms,
embedding or head.
"""
SCALE = "_scale_inv"
"""`name + SCALE` is the scale that belongs to the FP8 tensor `name`."""
BIAS = "e_score_correction_bias"
"""Last part of the name of the router's selection bias, the one tensor that is float32 in every
release.
"""


def layer_of(name: str) -> int | None:
    """12 for "model.layers.12.mlp.gate.weight"; None for a tensor outside the layers."""
    found = _LAYER.fullmatch(name)
    return int(found[1]) if found else None


def is_mtp_copy(name: str, num_hidden_layers: int) -> bool:
    """Whether the tensor is an MTP layer's copy of the main embedding or head (README_WEIGHTS.md:
    shared parameters).
    """
    found = _LAYER.fullmatch(name)
    if found is None or int(found[1]) < num_hidden_layers:
        return False
    return found[2] in ("embed_tokens.weight", "shared_head.head.weight")


def is_fp8(name: str) -> bool:
    """Whether the release stores this tensor as FP8 codes with a scale (README_WEIGHTS.md, tensor
    table of the release).
    """
    parts = name.split(".")
    return len(parts) >= 2 and parts[-1] == "weight" and parts[-2] in FP8_MODULES


def shard_axis(name: str) -> int | None:
    """The axis along which convert.py cuts a canonical tensor across model-parallel ranks, None if
    it is replicated.

    Routed experts are not cut but dealt whole (see `expert_of`). A Linear's bias follows the rows
    of its weight.
    """
    parts = name.split(".")
    axis = _AXIS.get(parts[-2]) if len(parts) >= 2 else None
    return None if parts[-1] == "bias" and axis == 1 else axis


def expert_of(name: str) -> int | None:
    """5 for "model.layers.3.mlp.experts.5.up_proj.weight"; None for what is no routed expert's."""
    found = re.search(r"\.mlp\.experts\.(\d+)\.", name)
    return int(found[1]) if found else None


def to_deepseek(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight_scale_inv` -> `layers.3.ffn.w3.scale`. SpecError for a
    module convert.py lacks.
    """
    *path, module, leaf = ("", *name.removeprefix("model.").split("."))
    if module not in _TO_DEEPSEEK:
        raise SpecError(f"{name!r} has no name in DeepSeek's converted format")
    leaf = {"weight" + SCALE: "scale", BIAS: "bias"}.get(leaf, leaf)
    return ".".join([*(_BLOCKS.get(p, p) for p in path[1:]), _TO_DEEPSEEK[module], leaf])


def from_deepseek(name: str) -> str:
    """`layers.3.ffn.w3.scale` -> `model.layers.3.mlp.up_proj.weight_scale_inv`; an unknown name
    stays as it is.
    """
    *path, module, leaf = ("", *name.split("."))
    if module not in _TO_HF:
        return name
    hf = {deepseek: block for block, deepseek in _BLOCKS.items()}
    leaf = "weight" + SCALE if leaf == "scale" else leaf
    leaf = BIAS if (module, leaf) == ("gate", "bias") else leaf
    outer = [] if module == "head" else ["model"]
    return ".".join([*outer, *(hf.get(p, p) for p in path[1:]), _TO_HF[module], leaf])


def looks_like_deepseek(names: Iterable[str]) -> bool:
    """Whether the names are those of convert.py rather than Hugging Face's."""
    mark = re.compile(r"(embed|head)\.weight|layers\.\d+\.(attn|ffn)\..+")
    return any(mark.fullmatch(n) for n in names)


def near(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, for "did you mean"; first among those with its numbers."""
    names = list(candidates)
    numbers = re.findall(r"\d+", name)
    same = [c for c in names if re.findall(r"\d+", c) == numbers]
    best = get_close_matches(name, same[:500] or names[:500], n=1, cutoff=0.6)
    return best[0] if best else None


# ------------------------------------------------------------------------------------------ config

_CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "rope_theta": "rope_theta",
    "max_seq_len": "max_position_embeddings",
}
_ROPE_KEYS = {
    "rope_factor": "factor",
    "original_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
}
_DEFAULTS: dict[str, Any] = {  # ModelArgs of inference/model.py, for keys that a config leaves out
    "vocab_size": 102400,
    "dim": 2048,
    "inter_dim": 10944,
    "moe_inter_dim": 1408,
    "n_layers": 27,
    "n_dense_layers": 1,
    "n_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_activated_experts": 6,
    "n_expert_groups": 1,
    "n_limited_groups": 1,
    "score_func": "softmax",
    "route_scale": 1.0,
    "q_lora_rank": 0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "original_seq_len": 4096,
    "rope_theta": 10000.0,
    "rope_factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "max_seq_len": 16384,
    "max_batch_size": 8,
    "dtype": "bf16",
    "scale_fmt": None,
}


def is_deepseek_config(config: Mapping[str, Any]) -> bool:
    """Whether the config is in the keys of inference/configs/*.json."""
    return "hidden_size" not in config and bool(config.keys() & {"dim", "n_layers", "n_activated_experts"})


def config_from_deepseek(config: Mapping[str, Any], *, has_bias: bool | None = None) -> dict[str, Any]:
    """{"dim": 7168, ...} -> {"hidden_size": 7168, ...}, with what inference/model.py hard-codes
    made explicit.

    has_bias: whether the checkpoint holds a selection bias; inference/model.py has one if dim ==
    7168 (the default here). Top-k weights are renormalised for sigmoid scores only; YaRN is on if
    max_seq_len > original_seq_len; no MTP.
    """
    unknown = sorted(config.keys() - _DEFAULTS.keys())
    require(not unknown, f"keys that DeepSeek's ModelArgs does not have: {', '.join(unknown)}")
    d = _DEFAULTS | dict(config)
    for key, value in d.items():
        number = isinstance(_DEFAULTS[key], int | float)
        ok = type(value) in ((int, float) if number else (str, type(None)))
        require(ok, f"{key} is {value!r}; expected {'a number' if number else 'a string'}")
    has_bias = d["dim"] == 7168 if has_bias is None else has_bias
    grouped = "group_limited_greedy" if d["n_expert_groups"] > 1 else "greedy"
    hf = {key: d[k] for k, key in _CONFIG_KEYS.items()} | {
        "q_lora_rank": d["q_lora_rank"] or None,
        "norm_topk_prob": d["score_func"] == "sigmoid",
        "topk_method": "noaux_tc" if has_bias else grouped,
        "rope_scaling": None,
        "num_nextn_predict_layers": 0,
    }
    if d["max_seq_len"] > d["original_seq_len"]:
        rope = {key: d[k] for k, key in _ROPE_KEYS.items()}
        hf["rope_scaling"] = {"type": "yarn", "mscale_all_dim": d["mscale"]} | rope
    return hf | (quantization_config(d["scale_fmt"]) if d["dtype"] == "fp8" else {})


def config_to_deepseek(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse. Raises SpecError naming the settings that DeepSeek's format cannot hold."""
    full = Config.from_dict(config)
    rope = full.rope_scaling.to_dict() if full.rope_scaling else {}
    quantization = config.get("quantization_config")
    block = (quantization or {}).get("weight_block_size") or [128, 128]
    require(list(block) == [128, 128], f"DeepSeek's kernels are for 128 x 128 blocks, not {block}")
    hf = full.to_dict()
    deepseek = {k: hf[key] for k, key in _CONFIG_KEYS.items()}
    deepseek |= {k: rope[key] for k, key in _ROPE_KEYS.items() if rope.get(key) is not None}
    deepseek |= {"q_lora_rank": full.q_lora_rank or 0, "dtype": "fp8" if quantization else "bf16"}
    if quantization and quantization.get("scale_fmt"):
        deepseek["scale_fmt"] = quantization["scale_fmt"]
    if not rope:
        deepseek["original_seq_len"] = max(full.max_position_embeddings, 4096)
    has_bias = full.topk_method == "noaux_tc"
    back = Config.from_dict(config_from_deepseek(deepseek, has_bias=has_bias))
    layers = full.num_nextn_predict_layers  # convert.py drops them, so they need not be held
    kept = back.replace(num_nextn_predict_layers=layers).to_dict()
    lost = ", ".join(f"{key}={value!r}" for key, value in hf.items() if kept.get(key) != value)
    require(not lost, f"DeepSeek's config format cannot hold {lost}")
    return deepseek


def quantization_config(scale_fmt: str | None, block: tuple[int, int] = (128, 128)) -> dict[str, Any]:
    """The entry that announces block-scaled FP8 weights in config.json (README_WEIGHTS.md)."""
    entry: dict[str, Any] = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    entry["weight_block_size"] = list(block)
    return {"quantization_config": entry | ({"scale_fmt": scale_fmt} if scale_fmt else {})}
