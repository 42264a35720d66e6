"""transformers' attention in parts, each of which a bug or a rewrite may replace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from entries import with_forward
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs


def rotate(q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    """Interleaved pairs rotated, halves written: transformers' own."""
    return theirs.apply_rotary_pos_emb_interleave(q, k, cos, sin)


def kernel(a: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    """q, k (B, H, S, Dn+Dr), v (B, H, S, Dv) -> (B, S, H, Dv), transformers' own."""
    return theirs.eager_attention_forward(a, q, k, v, mask, scaling=a.scaling)[0]


@dataclass(frozen=True)
class Attend:
    """Attention of module `a`. Each part gets the module first."""

    split_q: Callable[..., Any] = lambda a, q: q.split([a.qk_nope_head_dim, a.qk_rope_head_dim], dim=-1)
    split_a: Callable[..., Any] = lambda a, x: (
        a.kv_a_layernorm(x[..., : a.kv_lora_rank]),
        x[..., a.kv_lora_rank :],
    )
    rotate: Callable[..., Any] = lambda a, q, k, cos, sin: rotate(q, k, cos, sin)
    split_kv: Callable[..., Any] = lambda a, kv: kv.split([a.qk_nope_head_dim, a.v_head_dim], dim=-1)
    kernel: Callable[..., Any] = kernel
    join: Callable[..., Any] = lambda a, out: out.flatten(2)

    def __call__(self, a: Any, x: Any, tables: Any, mask: Any) -> tuple[Any, None]:
        """x (B, S, D) -> (B, S, D), None."""
        b, s, _ = x.shape
        q = a.q_proj(x) if a.q_lora_rank is None else a.q_b_proj(a.q_a_layernorm(a.q_a_proj(x)))
        q_nope, q_rot = self.split_q(a, q.view(b, s, -1, a.qk_head_dim).transpose(1, 2))
        latent, k_rot = self.split_a(a, a.kv_a_proj_with_mqa(x))
        q_rot, k_rot = self.rotate(a, q_rot, k_rot[:, None], *tables)
        kv = a.kv_b_proj(latent).view(b, s, a.num_heads, -1).transpose(1, 2)
        k_nope, v = self.split_kv(a, kv)
        k = torch.cat((k_nope, k_rot.expand(-1, a.num_heads, -1, -1)), dim=-1)
        out = self.kernel(a, torch.cat((q_nope, q_rot), dim=-1), k, v, mask)
        return a.o_proj(self.join(a, out)), None


def attending(**parts: Any) -> Callable[[Any], Any]:
    """A patch: every attention is an Attend with these parts."""
    attend = Attend(**parts)

    def wrap(a: Any, _: Any) -> Any:
        return lambda hidden_states, position_embeddings, attention_mask, **_: attend(
            a, hidden_states, position_embeddings, attention_mask
        )

    return lambda model: with_forward(model, "self_attn", wrap)
