"""torchtitan's names (0.3.0 and, for the experts, before): w1 gate, w2 down, w3 up; experts stacked."""

from __future__ import annotations

from collections.abc import Mapping

from refimpl.checkpoint import Checkpoint
from refimpl.checkpoint.held import Part
from refimpl.layers.config import Config

from .renaming import Rules, renamed

_AT = "model.layers.{0}."
_INSIDE = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wq_a.weight": "self_attn.q_a_proj.weight",
    "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.wq_b.weight": "self_attn.q_b_proj.weight",
    "attention.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.wkv_b.weight": "self_attn.kv_b_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "moe.router.gate.weight": "mlp.gate.weight",
    "moe.expert_bias(?:_E)?": "mlp.gate.e_score_correction_bias",
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "mtp_norm.weight": "shared_head.norm.weight",
} | {
    theirs.replace("W", w): ours.replace("P", p)
    for w, p in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    for theirs, ours in (
        ("feed_forward.W.weight", "mlp.P.weight"),
        ("moe.shared_experts.W.weight", "mlp.shared_experts.P.weight"),
        ("moe.(?:routed_experts.inner_experts|experts).W(?:_EFD|_EDF)?", "mlp.experts.{e}.P.weight"),
    )
}


def parts(ckpt: Checkpoint, c: Config) -> Mapping[str, Part]:
    """Checkpoint names -> parts; MTP modules follow the layers."""
    found = renamed(ckpt, RULES)
    return {_behind(name, c.num_hidden_layers): part for name, part in found.items()}


def _behind(name: str, layers: int) -> str:
    first, _, rest = name.removeprefix("mtp.").partition(".")
    return f"model.layers.{layers + int(first)}.{rest}" if name.startswith("mtp.") else name


def _pattern(text: str) -> str:
    return text.replace(".", r"\.")


RULES: Rules = (
    {
        r"tok_embeddings\.weight": ("model.embed_tokens.weight",),
        r"norm\.weight": ("model.norm.weight",),
        r"(?:lm_head|output)\.weight": ("lm_head.weight",),
    }
    | {rf"layers\.(\d+)\.{_pattern(t)}": (_AT + o,) for t, o in _INSIDE.items()}
    | {rf"mtp_layers\.(\d+)\.{_pattern(t)}": ("mtp.{0}." + o,) for t, o in _INSIDE.items()}
)
"""torchtitan's name -> the checkpoint's."""
