"""A micro-batch on its way through the layers, each layer in the parts that two micro-batches take turns with (R 3.4).

Attention, in decoding in two steps; dispatch; the experts; combine. `run` takes the parts of two micro-batches in the order of
`Lanes`: while the network has one of them, the GPU has the other. Here a call to the network returns when it is done; what the
order shows is which parts a real engine may have in flight together. The order changes no number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from refimpl.autograd import Array
from refimpl.layers import moe as layer
from refimpl.layers.block import DecoderLayer
from refimpl.layers.common import attn_norm, embed, ffn_norm, resid, resid_mid
from refimpl.layers.mla import latents
from refimpl.layers.moe import MoE
from refimpl.layers.rope import rope_tables
from refimpl.layers.router import Routing
from refimpl.layers.stage import phase, unit
from refimpl.model import ForCausalLM
from refimpl.parallel_emulation.axes.expert import combine, dispatch, routed_experts
from refimpl.parallel_emulation.axes.expert_layout import Handle
from refimpl.parallel_emulation.serving import Lanes, Part, run_lanes

from .experts import Experts


class Batch(ABC):
    """N tokens of mine at their positions, which may be none; subclasses know what their attention sees."""

    def __init__(self, model: ForCausalLM, experts: Experts, number: int, tokens: Array, positions: Array) -> None:
        self.model, self.experts, self.number, self.positions = model, experts, number, positions
        self.x: Array = np.asarray(embed(tokens[None], model.model.embed_tokens.weight))  # (1, N, D)
        self.table = self.tables(positions)
        self.mine: tuple[Array, Array, Array]  # query latent (1, N, Q), c_kv (1, N, C), rotated key (1, N, Dr)
        self.normed: Array  # (1, N, D) what the feed-forward sees
        self.way: Handle
        self.sent: Any  # (P, D + 1) rows for my experts, with their weights

    def tables(self, positions: Array) -> Array:
        """Rope tables (2, 1, N, Dr/2)."""
        c = self.model.config
        p = positions[None]
        return rope_tables(p, dim=c.qk_rope_head_dim, theta=c.rope_theta, yarn=c.yarn, dtype=self.model.dtype)

    def layer(self, i: int) -> DecoderLayer:
        """Decoder layer i, whole."""
        return self.model.model.layers[i]

    @abstractmethod
    def attend(self, i: int) -> Array:
        """Attention of `mine` in layer i.  -> (1, N, D)."""

    def attention_1(self, i: int) -> None:
        """Norm and what belongs to no head."""
        m = self.layer(i)
        n = attn_norm(self.x, m.input_layernorm.weight, eps=m.config.rms_norm_eps)
        self.mine = latents(m.self_attn, n, self.table)

    def attention_2(self, i: int) -> None:
        """The heads, the residual stream, and the gate."""
        m = self.layer(i)
        self.x = np.asarray(resid_mid(self.x, self.attend(i)))
        self.normed = np.asarray(ffn_norm(self.x, m.post_attention_layernorm.weight, eps=m.config.rms_norm_eps))
        if isinstance(m.mlp, MoE):
            self.routing = _ascending(m.mlp.gate(self.normed))

    def attention(self, i: int) -> None:
        """Both steps."""
        self.attention_1(i)
        self.attention_2(i)

    def dispatch(self, i: int) -> None:
        """My tokens to the slots of their experts; a dense layer has none."""
        if i in self.experts.at:
            k, tag = self.routing.ids.shape[-1], self._tag(i)
            self.way = self.experts.send(i, self.routing.ids.reshape(-1, k), self.positions, tag)
            rows, weights = self.normed.reshape(-1, self.x.shape[-1]), self.routing.weights.reshape(-1, k)
            self.sent = dispatch(rows, weights, handle=self.way, label=f"dispatch{tag}")

    def mlp(self, i: int) -> None:
        """My experts on what came; the shared experts, or the dense feed-forward, on my own tokens."""
        m = self.layer(i).mlp
        if not isinstance(m, MoE):
            self.out, _ = m(self.normed)
            return
        d = self.x.shape[-1]
        here = self.experts.layers[self.experts.at[i]]
        self.out = routed_experts(here, self.sent[:, :d], self.sent[:, d:], self.way.expert_of)
        self.shared = m.shared_experts.shared(self.normed) if m.config.n_shared_experts else None

    def combine(self, i: int) -> None:
        """Back, added up, and onto the residual stream."""
        y = self.out
        if i in self.experts.at:
            y = combine(y, handle=self.way, label=f"combine{self._tag(i)}").reshape(*self.x.shape)
            y = layer.moe_out(y, self.shared)
        self.x = np.asarray(resid(self.x, y))

    def _tag(self, i: int) -> str:
        return f".L{i}.{self.number}"


def _ascending(r: Routing) -> Routing:
    """The same choices, each token's by ascending expert."""
    order = np.argsort(r.ids, axis=-1, kind="stable")
    return Routing(r.scores, np.take_along_axis(r.ids, order, -1), np.take_along_axis(r.weights, order, -1))


def order(lanes: Lanes) -> list[Part]:
    """The parts of both lanes as they begin when every part takes the same time; of two that begin together the network's first."""
    start = {part: at for part, (at, _) in run_lanes(lanes, dict.fromkeys(lanes.stages, 1.0)).items()}
    return sorted([*lanes.network, *lanes.compute], key=lambda part: start[part])  # stable: the network's first


def alone(lanes: Lanes) -> list[Part]:
    """The same parts one micro-batch after the other: without overlap."""
    return sorted(order(lanes), key=lambda p: (p.batch, p.layer, lanes.stages.index(p.stage)))


def run(parts: Sequence[Part], batches: Sequence[Batch], name: str) -> None:
    """Take the micro-batches through all layers; their `x` is then the last hidden."""
    with phase(name):
        for part in parts:
            with unit(f"L{part.layer}"):
                getattr(batches[part.batch], part.stage.replace(" ", "_"))(part.layer)
