"""One decoder layer: pre-norm attention and feed-forward around the residual stream (R fig. 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .common import attn_norm, ffn_norm, resid, resid_mid
from .config import Config
from .mla import KV, Attend, Attention
from .module import Module, RMSNorm
from .moe import MLP, MoE
from .router import Routing


class DecoderLayer(Module):
    """x + MLA(norm x), then + FFN(norm x): dense for the first layers, experts for the others."""

    def __init__(self, c: Config, layer: int) -> None:
        self.config = c
        self.input_layernorm = RMSNorm(c.hidden_size)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size)
        self.mlp: MoE | MLP = MoE(c) if c.is_moe(layer) else MLP(c.hidden_size, c.intermediate_size)

    def __call__(
        self, x: Any, table: Any, mask: Any, past: KV | None = None, attend: Attend = "auto"
    ) -> tuple[Any, KV, Routing | None]:
        """x (B, S, D), table (2, B, S, Dr/2), mask (B, 1, S, T) -> x (B, S, D), this layer's cache, its routing."""
        return self.around(x, lambda h: self.self_attn(h, table, mask, past, attend))

    def around(self, x: Any, attention: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any, Routing | None]:
        """The layer around attention as the caller makes it, of the normed stream (B, S, D): output (B, S, D), and what it kept.  x
        (B, S, D) -> x (B, S, D), that, its routing.
        """
        eps = self.config.rms_norm_eps
        a, kv = attention(attn_norm(x, self.input_layernorm.weight, eps=eps))
        x = resid_mid(x, a)
        y, routing = self.mlp(ffn_norm(x, self.post_attention_layernorm.weight, eps=eps))
        return resid(x, y), kv, routing
