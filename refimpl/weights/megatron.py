"""Megatron-core's names, of whole tensors (one rank): linear_fc1 = [gate; up], norms fused into the linear behind them or not."""

from __future__ import annotations

from collections.abc import Mapping

from refimpl.checkpoint import Checkpoint
from refimpl.checkpoint.held import Part
from refimpl.layers.config import Config

from .renaming import Rules, renamed

_LAYER = r"(?:.+\.)?decoder\.layers\.(\d+)\."
_ATTENTION = {
    r"linear_q_proj\.weight": "q_proj.weight",
    r"linear_q_down_proj\.weight": "q_a_proj.weight",
    r"linear_q_up_proj\.weight": "q_b_proj.weight",
    r"linear_kv_down_proj\.weight": "kv_a_proj_with_mqa.weight",
    r"linear_kv_up_proj\.weight": "kv_b_proj.weight",
    r"linear_proj\.weight": "o_proj.weight",
    r"(?:q_layernorm\.weight|linear_q_up_proj\.layer_norm_weight)": "q_a_layernorm.weight",
    r"(?:kv_layernorm\.weight|linear_kv_up_proj\.layer_norm_weight)": "kv_a_layernorm.weight",
}
_AT = "model.layers.{0}."
_EXPERT = _AT + "mlp.experts.{1}."
RULES: Rules = (
    {
        r"(?:.+\.)?embedding\.word_embeddings\.weight": ("model.embed_tokens.weight",),
        r"(?:.+\.)?decoder\.final_layernorm\.weight": ("model.norm.weight",),
        r"(?:.+\.)?output_layer\.weight": ("lm_head.weight",),
        _LAYER + r"input_layernorm\.weight": (_AT + "input_layernorm.weight",),
        _LAYER + r"(?:pre_mlp_layernorm\.weight|mlp\.linear_fc1\.layer_norm_weight)": (
            _AT + "post_attention_layernorm.weight",
        ),
        _LAYER + r"mlp\.router\.weight": (_AT + "mlp.gate.weight",),
        _LAYER + r"mlp\.router\.expert_bias": (_AT + "mlp.gate.e_score_correction_bias",),
        _LAYER + r"mlp\.experts\.(?:local_experts\.(\d+)\.linear_fc1\.weight|linear_fc1\.weight(\d+))": (
            _EXPERT + "gate_proj.weight",
            _EXPERT + "up_proj.weight",
        ),
        _LAYER + r"mlp\.experts\.(?:local_experts\.(\d+)\.linear_fc2\.weight|linear_fc2\.weight(\d+))": (
            _EXPERT + "down_proj.weight",
        ),
    }
    | {_LAYER + r"self_attention\." + t: (_AT + "self_attn." + o,) for t, o in _ATTENTION.items()}
    | {
        _LAYER + rf"mlp\.{theirs}linear_fc{n}\.weight": tuple(f"{_AT}mlp.{ours}{p}_proj.weight" for p in projections)
        for theirs, ours in (("", ""), (r"shared_experts\.", "shared_experts."))
        for n, projections in ((1, ("gate", "up")), (2, ("down",)))
    }
)
"""Megatron's name -> the checkpoint's."""


def parts(ckpt: Checkpoint, c: Config) -> Mapping[str, Part]:
    """Checkpoint names -> parts; what is no weight (`_extra_state`) is left out."""
    return {n: p for n, p in renamed(ckpt, RULES).items() if not n.endswith("_extra_state")}
