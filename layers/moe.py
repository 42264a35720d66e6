"""Feed-forward blocks: dense SwiGLU, shared and routed experts (R 2.1.2, eq 12)."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np

from refimpl.autograd import expert_ops, ops
from refimpl.autograd.tensor import Array

from . import gemm
from .common import linear
from .config import Config
from .module import Linear, Module
from .router import MoEGate, Routing
from .stage import observed, stage


def _swiglu(gate: Any, up: Any) -> Any:
    """silu(gate) up.  gate (..., F), up (..., F) -> (..., F)."""
    return gemm.swiglu(gate, up)


def _grouped(rows: Any, ids: Array, *ws: Any) -> Any:
    """Each row times its expert's matrix.  rows (M, D), ids (B, S, K), E times w (F, D) -> (M, F)."""
    return gemm.grouped_linear(rows, ids, *ws)


mlp_gate = stage("mlp.gate", what="dense feed-forward, gate", eq="R 4.2 (SwiGLU)", shape="B S F")(linear)
mlp_up = stage("mlp.up", what="dense feed-forward, up", eq="R 4.2 (SwiGLU)", shape="B S F")(linear)
mlp_act = stage("mlp.act", what="dense feed-forward, activation", eq="R 4.2 (SwiGLU)", shape="B S F")(_swiglu)
mlp_down = stage("mlp.down", what="output of the feed-forward", eq="R 4.2 (SwiGLU)", shape="B S D", tap="ffn_out")(
    linear
)

shared_gate = stage("shared.gate", what="shared experts, gate", eq="R eq 12, FFN^(s)", shape="B S F")(linear)
shared_up = stage("shared.up", what="shared experts, up", eq="R eq 12, FFN^(s)", shape="B S F")(linear)
shared_act = stage("shared.act", what="shared experts, activation", eq="R eq 12, FFN^(s)", shape="B S F")(_swiglu)
shared_down = stage("moe.shared", what="output of the shared experts", eq="R eq 12, FFN^(s)", shape="B S D")(linear)

moe_gate = stage("moe.gate", what="routed experts, gate", eq="R eq 12, FFN^(r)", shape="M F")(_grouped)
moe_up = stage("moe.up", what="routed experts, up", eq="R eq 12, FFN^(r)", shape="M F")(_grouped)
moe_down = stage("moe.down", what="routed experts, output of every dispatched row", eq="R eq 12, FFN^(r)", shape="M D")(
    _grouped
)


@stage("moe.rows", what="dispatched rows, sorted by expert, token, slot", eq="R 3.2.2 (dispatch)", shape="M D")
def rows(x: Any, ids: Array, *, n_experts: int) -> Any:
    """Tokens copied once per chosen expert, sorted by expert, then token, then slot.  x (B, S, D), ids (B, S, K) ->
    (M, D).
    """
    return expert_ops.dispatch(x, ids, n_experts=n_experts)


@stage("moe.act", what="routed experts, activation", eq="R eq 12, FFN^(r)", shape="M F")
def act(gate: Any, up: Any, ids: Array | None, weights: Any) -> Any:
    """silu(gate) up, times the routing weight if ids and weights are given.  gate (M, F), up (M, F), ids (B, S, K)
    or None, weights (B, S, K) or None -> (M, F).
    """
    y = gemm.swiglu(gate, up)
    if ids is None:
        return y
    order, _, _ = expert_ops.by_expert(ids, int(ids.max(initial=-1)) + 1)
    return y * weights.reshape(-1)[order][:, None]


@stage(
    "moe.routed", what="weighted sum of the routed experts", eq="R eq 12, the sum over routed experts", shape="B S D"
)
def routed(down: Any, ids: Array, weights: Any) -> Any:
    """sum_k g_k FFN_k(x), ascending expert id; without weights a plain sum.  down (M, D), ids (B, S, K), weights (B,
    S, K) or None -> (B, S, D).
    """
    if weights is None:
        weights = (ids * 0 + 1).astype(down.dtype)
    return expert_ops.combine(down, ids, weights)


@stage("moe.out", what="output of the feed-forward", eq="R eq 12", shape="B S D", tap="ffn_out")
def moe_out(routed: Any, shared: Any) -> Any:
    """Routed plus shared experts; the shared ones have weight 1.  routed (B, S, D), shared (B, S, D) or None -> (B,
    S, D).
    """
    return routed if shared is None else ops.add(routed, shared)


class MLP(Module):
    """SwiGLU: down(silu(gate x) up x); in DeepSeek's own files w1 = gate, w3 = up, w2 = down."""

    def __init__(self, dim: int, width: int) -> None:
        self.gate_proj = Linear(dim, width)
        self.up_proj = Linear(dim, width)
        self.down_proj = Linear(width, dim)

    def __call__(self, x: Any) -> tuple[Any, None]:
        """x (B, S, D) -> y (B, S, D), no routing."""
        a = mlp_act(mlp_gate(x, self.gate_proj.weight), mlp_up(x, self.up_proj.weight))
        return mlp_down(a, self.down_proj.weight), None

    def shared(self, x: Any) -> Any:
        """The same as shared expert: x (B, S, D) -> (B, S, D)."""
        a = shared_act(shared_gate(x, self.gate_proj.weight), shared_up(x, self.up_proj.weight))
        return shared_down(a, self.down_proj.weight)


class MoE(Module):
    """Router, E routed experts, shared experts as one wide MLP (R 2.1.2)."""

    def __init__(self, c: Config) -> None:
        self.config = c
        self.experts = [MLP(c.hidden_size, c.moe_intermediate_size) for _ in range(c.n_routed_experts)]
        self.gate = MoEGate(c)
        if c.n_shared_experts:
            self.shared_experts = MLP(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts)

    def __call__(self, x: Any) -> tuple[Any, Routing]:
        """x (B, S, D) -> y (B, S, D), Routing."""
        r = self.gate(x)
        shared = self.shared_experts.shared(x) if self.config.n_shared_experts else None
        return moe_out(self._routed(x, r), shared), r

    def _routed(self, x: Any, r: Routing) -> Any:
        early = self.config.dialect.routing_weight_on == "activation"
        if not observed():
            matrices = [(e.gate_proj.weight, e.up_proj.weight, e.down_proj.weight) for e in self.experts]
            if all(
                isinstance(a, np.ndarray) for a in (x, r.weights, *chain(*matrices))
            ):  # no gradients, nothing on disk
                return expert_ops.feed_forward(x, r.ids, r.weights, matrices, early=early)
        sent = rows(x, r.ids, n_experts=len(self.experts))
        gate = moe_gate(sent, r.ids, *[e.gate_proj.weight for e in self.experts])
        up = moe_up(sent, r.ids, *[e.up_proj.weight for e in self.experts])
        a = act(gate, up, *((r.ids, r.weights) if early else (None, None)))
        down = moe_down(a, r.ids, *[e.down_proj.weight for e in self.experts])
        return routed(down, r.ids, None if early else r.weights)
