"""A case as a GGUF file of llama.cpp's architecture deepseek2, and such a file's weights back under checkpoint names.

What the conversion does: kv_b_proj is split into attn_k_b (H, C, Dn), transposed, and attn_v_b (H, Dv, C); experts are stacked;
rotated rows stay interleaved. The YaRN multiplier is written as 0.1 mscale_all_dim, by which llama.cpp then divides 0.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require, where
from refimpl.autograd.tensor import Array
from refimpl.checkpoint.held import Held, Part, Stored
from refimpl.diff import Case
from refimpl.layers.config import Config

from .candidate import library

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
} | {
    f"ffn_{part}{kind}.weight": f"mlp.{inside}{part}_proj.weight"
    for part in ("gate", "up", "down")
    for kind, inside in (("", ""), ("_shexp", "shared_experts."))
}
"""llama.cpp's names -> the checkpoint's, below blk.i and model.layers.i; the tensors that are one to one."""
_OTHERS = {"attn_kv_b.weight": "self_attn.kv_b_proj.weight"}
"""The same for a tensor that only other converters write: kv_b_proj whole."""
_LITE = (26, 27)
"""Layers of DeepSeek-V2-Lite and its kin, by whose number llama.cpp tells that queries have no latent; elsewhere the key must be
there, and is 0.
"""
_EXPERTS = {f"ffn_{part}_exps.weight": part for part in ("gate", "up", "down")}


def supported(c: Config) -> Config:
    """The config, if llama.cpp's deepseek2 computes what it says."""
    lite = c.q_lora_rank is not None and c.num_hidden_layers in _LITE
    require(not lite, f"llama.cpp takes every deepseek2 of {c.num_hidden_layers} layers for one without query latent")
    for name, only in {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}.items():
        value = getattr(c, name)
        require(value == only, f"{name} is {value!r}; llama.cpp's deepseek2 is written here for {only!r}")
    return c


Vocabulary = tuple[Sequence[str], Sequence[tuple[str, str]], int]
"""Tokens of byte-level BPE by id, merges, the id that ends a text."""


def write(case: Case, path: str | Path, *, vocabulary: Vocabulary | None = None) -> None:
    """Write the case's config and weights, dequantised, in float32; MTP layers are left out. vocabulary: None for ids alone."""
    gguf = library("gguf", "gguf")
    c = supported(case.config)
    writer = gguf.GGUFWriter(str(path), "deepseek2")
    _settings(gguf, writer, c)
    _text(gguf, writer, vocabulary)
    for name, x in converted(case.weights(), c).items():
        writer.add_tensor(name, np.ascontiguousarray(x, np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise SpecError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        writer.close()


def converted(weights: Mapping[str, Array], c: Config) -> dict[str, Array]:
    """llama.cpp's names -> tensors."""
    found = {theirs: weights[ours] for theirs, ours in _WHOLE.items() if ours in weights}
    for i in range(c.num_hidden_layers):
        at, to = f"model.layers.{i}.", f"blk.{i}."
        found |= {to + theirs: weights[at + ours] for theirs, ours in _BLOCK.items() if at + ours in weights}
        kv_b = np.asarray(weights[f"{at}self_attn.kv_b_proj.weight"]).reshape(c.num_attention_heads, -1, c.kv_lora_rank)
        k_b, v_b = np.split(kv_b, [c.qk_nope_head_dim], axis=1)
        found |= {f"{to}attn_k_b.weight": k_b.transpose(0, 2, 1), f"{to}attn_v_b.weight": v_b}
        for theirs, part in _EXPERTS.items() if c.is_moe(i) else ():
            names = [f"{at}mlp.experts.{e}.{part}_proj.weight" for e in range(c.n_routed_experts)]
            found[to + theirs] = np.stack([weights[n] for n in names])
    return found


def read(path: str | Path, c: Config) -> Held:
    """Checkpoint names -> the values that the file's tensors stand for, dequantised when asked for. SpecError for another
    architecture or size.
    """
    gguf = library("gguf", "gguf")
    with where(f"while reading {path}"):
        try:
            reader = gguf.GGUFReader(str(path))
            keys = ("general.architecture", "deepseek2.block_count")
            name, count = (field.contents() if (field := reader.get_field(key)) else None for key in keys)
        except (OSError, ValueError, LookupError, OverflowError, MemoryError) as error:
            raise SpecError(f"not a GGUF file, or not all of it: {error}") from None
        require(name == "deepseek2", f"architecture {name!r}; expected 'deepseek2'")
        require(
            count == c.num_hidden_layers,
            f"{'no count of' if count is None else count} blocks; the case has {c.num_hidden_layers} layers",
        )
        return Held("GGUF", path, _restored(gguf, {t.name: t for t in reader.tensors}, c))


def _restored(gguf: Any, tensors: Mapping[str, Any], c: Config) -> dict[str, Part]:
    """`converted` undone; what has no counterpart keeps its name. Where kv_b_proj is there both ways, its halves count: llama.cpp
    computes with them.
    """
    found: dict[str, Part] = {}
    known = _BLOCK | _OTHERS
    for name, t in tensors.items():
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        at, last = (f"model.layers.{block[1]}.", block[2]) if block else ("", name)
        if last in _EXPERTS:
            count, *shape = _shape(t)
            to = f"{at}mlp.experts.{{}}.{_EXPERTS[last]}_proj.weight"
            found |= {to.format(e): Part((*shape,), (_stored(gguf, t),), _reader(gguf, t, e)) for e in range(count)}
        elif last == "attn_k_b.weight":
            other = name.replace("attn_k_b", "attn_v_b")
            require(other in tensors, f"{name} without {other}")
            found[f"{at}self_attn.kv_b_proj.weight"] = _joined(gguf, t, tensors[other], c)
        elif last != "attn_v_b.weight" and (last != "attn_kv_b.weight" or name.replace("kv_b", "k_b") not in tensors):
            to = at + known[last] if last in known else _WHOLE.get(last, name)
            found[to] = Part(_shape(t), (_stored(gguf, t),), _reader(gguf, t))
    return found


def _joined(gguf: Any, k: Any, v: Any, c: Config) -> Part:
    """kv_b_proj (H (Dn + Dv), C) of attn_k_b (H, C, Dn) and attn_v_b (H, Dv, C)."""
    fit = len(_shape(k)) == len(_shape(v)) == 3 and _shape(v)[::2] == _shape(k)[:2]
    require(fit, f"attn_k_b is {_shape(k)}, attn_v_b {_shape(v)}; expected (H, C, Dn) and (H, Dv, C)")
    heads, latent, nope = _shape(k)

    def joined() -> Array:
        both = [_reader(gguf, k)().transpose(0, 2, 1), _reader(gguf, v)()]
        return np.concatenate(both, axis=1).reshape(-1, latent)

    def split(x: Array) -> tuple[Array, ...]:
        k_b, v_b = np.split(x.reshape(heads, -1, latent), [nope], axis=1)
        return k_b.transpose(0, 2, 1), v_b

    rows = heads * (nope + _shape(v)[1])
    return Part((rows, latent), (_stored(gguf, k), _stored(gguf, v)), joined, split)


def _shape(t: Any) -> tuple[int, ...]:
    """Slowest axis first."""
    return tuple(int(n) for n in reversed(t.shape))


def _stored(gguf: Any, t: Any) -> Stored:
    """The first number in the name of a quantised type is its bits (FP4's widest step is a third of the largest number); K-quants
    scale the scales of 256 together.
    """
    name = t.tensor_type.name
    if name in ("F32", "F16", "BF16", "F64"):
        return Stored(name)
    steps = 3 if "FP4" in name else 2 ** int(next((x for x in name if x.isdigit()), "8")) - 1
    return Stored(name, steps, gguf.GGML_QUANT_SIZES[t.tensor_type][0])


def _reader(gguf: Any, t: Any, e: int | None = None) -> Callable[[], Array]:
    """The tensor's values, or those of its e-th matrix, when called."""

    def values() -> Array:
        try:
            x: Array = gguf.quants.dequantize(t.data if e is None else t.data[e], t.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise SpecError(f"{t.name}: {t.tensor_type.name} cannot be dequantised: {error}") from None
        return x

    return values


def _settings(gguf: Any, w: Any, c: Config) -> None:
    w.add_file_type(gguf.LlamaFileType.ALL_F32)
    numbers = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "head_count": c.num_attention_heads,
        "head_count_kv": 1,
        "rope_freq_base": c.rope_theta,
        "layer_norm_rms_eps": c.rms_norm_eps,
        "leading_dense_block_count": c.first_k_dense_replace,
        "vocab_size": c.vocab_size,
        "q_lora_rank": c.q_lora_rank or 0,
        "kv_lora_rank": c.kv_lora_rank,
        "key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "value_length": c.kv_lora_rank,
        "key_length_mla": c.qk_nope_head_dim + c.qk_rope_head_dim,
        "value_length_mla": c.v_head_dim,
        "rope_dimension_count": c.qk_rope_head_dim,
        "expert_used_count": c.num_experts_per_tok,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_count": c.n_routed_experts,
        "expert_shared_count": c.n_shared_experts,
        "expert_weights_scale": c.routed_scaling_factor,
        "expert_weights_norm": c.norm_topk_prob,
        "expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
        "expert_group_count": c.n_group,
        "expert_group_used_count": c.topk_group,
    }
    for name, value in numbers.items():
        getattr(w, f"add_{name}")(value)
    _yarn(gguf, w, c)


def _text(gguf: Any, w: Any, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        w.add_tokenizer_model("no_vocab")
        return
    tokens, merges, end = vocabulary
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    w.add_token_list(list(tokens))
    w.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    w.add_token_merges([" ".join(pair) for pair in merges])
    w.add_eos_token_id(end)
    w.add_bos_token_id(end)
    w.add_add_bos_token(False)


def _yarn(gguf: Any, w: Any, c: Config) -> None:
    r = c.rope_scaling
    if r is not None:
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(r.factor)
        w.add_rope_scaling_orig_ctx_len(r.original_max_position_embeddings)
        w.add_rope_scaling_yarn_log_mul(0.1 * (r.mscale_all_dim or 0))
        w.add_rope_scaling_yarn_beta_fast(r.beta_fast)
        w.add_rope_scaling_yarn_beta_slow(r.beta_slow)
