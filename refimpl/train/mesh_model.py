"""A rank's slice of DeepSeek-V3 on a mesh: its stages, its experts, its heads; and with whom it shares each weight.

Layers keep their serial code: attention, MLP and MoE are replaced by rank programs of `parallel_emulation`
(`placed.Placed`), where there is anything to share. Weights keep their checkpoint names, except that a rank counts its
own experts from 0. In bf16 the combine of several expert ranks rounds each expert's share, the serial layer their sum.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from refimpl.autograd import Array
from refimpl.layers.block import DecoderLayer
from refimpl.layers.module import Module, is_buffer
from refimpl.layers.moe import MLP, MoE
from refimpl.layers.router import Routing
from refimpl.model import ForCausalLM
from refimpl.parallel_emulation import axes
from refimpl.parallel_emulation.axes.mesh import Groups, divisions, holders, mirror
from refimpl.parallel_emulation.axes.placed import Placed, placed
from refimpl.parallel_emulation.collectives import Nodes, collectives, gather_from, make_nodes, scatter_to
from refimpl.parallel_emulation.comm import Comm, split_into
from refimpl.parallel_emulation.pipeline import Layout

from .pipeline_parts import Cut, cut

_AXES = {"whole": ("dp", "ep"), "split": ("dp", "ep"), "expert": ("dp",)}
"""Class of weight -> the axes along which ranks hold the same and see other tokens: there gradients add up."""


@dataclass(frozen=True)
class Kind:
    """Weights that the same ranks hold: their gradients add up over `group`, their squares over `distinct`."""

    names: tuple[str, ...]
    group: Comm
    distinct: Comm

    def shard(self, held: Mapping[str, Array], master: Any) -> axes.data.Shard:
        """My part of the optimiser for these weights; an empty one if I hold none of the kind."""
        mine = {name: held[name] for name in self.names}
        if mine:
            return axes.data.start(self.group, mine, distinct=self.distinct, master=master)
        kind = np.dtype(master)
        return axes.data.Shard(self.group, self.distinct, {}, kind, kind, np.zeros(0, kind), None)


@dataclass(frozen=True)
class Local:
    """What one rank has of the model."""

    cut: Cut
    stages: tuple[int, ...]  # by direction
    model: ForCausalLM
    kinds: list[Kind]
    replicas: Comm  # the ranks with my stages and other tokens
    once: Comm  # ranks that all compute different things: one of each tensor-parallel group


def divide(g: Groups, layout: Layout, whole: ForCausalLM) -> Local:
    """My slice of the whole model, and my groups. SpecError where layers, experts or heads do not go round."""
    c = cut(whole.config, layout.n_stages)
    stages = layout.stages[g.place.pp]
    mine = c.only(whole, stages)
    for i in range(len(mine.model.layers)):
        if any(c.holds(s, f"model.layers.{i}.") for s in stages):
            mine.model.layers[i] = spread(g, mine.model.layers[i])
    once = split_into(g.world, g.mesh.groups("pp", "dp", "ep"), "mesh.once")
    pipes = sorted({mirror(layout, r) for r in range(layout.n_ranks)})
    replicas = split_into(g.world, g.mesh.groups("dp", "ep", pipes=pipes), "mesh.replicas")
    return Local(c, stages, mine, _kinds(g, layout, c, whole, mine, once), replicas, once)


def _kinds(g: Groups, layout: Layout, c: Cut, whole: ForCausalLM, mine: ForCausalLM, once: Comm) -> list[Kind]:
    """All kinds of weights, the same list on every rank."""
    names = [n for n, w in whole.named_weights() if hasattr(w, "dtype") and not is_buffer(n)]
    held = holders(layout, [[n for n in names if c.holds(s, n)] for s in range(c.n_stages)])
    here = [n for n, w in mine.named_weights() if hasattr(w, "dtype") and not is_buffer(n)]
    kinds = []
    for i, division in enumerate(divisions(held, g.mesh.pp)):
        (inside,) = [set(shared) for pipes, shared in division.items() if g.place.pp in pipes]
        for sort, over in _AXES.items():
            group = split_into(g.world, g.mesh.groups(*over, pipes=list(division)), f"mesh.{sort}{i}")
            chosen = tuple([n for n in here if n in inside and _class(n, g.tp.size) == sort])
            kinds.append(Kind(chosen, group, once if sort == "whole" else g.world))
    return kinds


_SPLIT = re.compile(r"\.self_attn\.(q_proj|q_b_proj|kv_b_proj|o_proj)\.weight$|\.mlp\.(gate|up|down)_proj\.weight$")
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


def _class(name: str, tp: int) -> str:
    """How the ranks of a stage hold a weight: an expert's on some of them, "split" in slices, "whole" each."""
    if _EXPERT.search(name):
        return "expert"
    return "split" if tp > 1 and _SPLIT.search(name) else "whole"


def checkpoint_names(g: Groups, n_experts: int, held: Mapping[str, Any]) -> dict[str, Any]:
    """My weights under their names in the whole model; slices of tensor parallelism stay slices."""
    first = axes.expert.my_experts(g.experts, n_experts).start
    return {_EXPERT.sub(lambda m: f".mlp.experts.{first + int(m[1])}.", name): w for name, w in held.items()}


# ---- A layer's rank programs


def spread(g: Groups, layer: DecoderLayer) -> DecoderLayer:
    """The layer with my heads, my channels and my experts, and the programs that run them."""
    parts: dict[str, Module] = {}
    if isinstance(layer.mlp, MoE) and g.experts.size > 1:
        nodes = make_nodes(g.experts, 1)
        parts["mlp"] = Placed(axes.expert.shard_moe(g.experts, layer.mlp), partial(moe, g.tp, nodes))
    if g.tp.size > 1:
        attention = axes.tensor.shard_attention(g.tp, layer.self_attn)
        parts["self_attn"] = Placed(attention, partial(axes.tensor.attention, g.tp))
        if isinstance(layer.mlp, MLP):
            parts["mlp"] = Placed(axes.tensor.shard_mlp(g.tp, layer.mlp), partial(_mlp, g.tp))
    return placed(layer, **parts)


def _mlp(tp: Comm, m: MLP, x: Any) -> tuple[Any, None]:
    return axes.tensor.mlp(tp, m, x), None


def moe(tp: Comm, nodes: Nodes, m: MoE, x: Any) -> tuple[Any, Routing]:
    """Experts over ep and tp: each tensor-parallel rank dispatches its own tokens, so none travels twice.

    x (B, S, D) replicated over tp -> y (B, S, D) replicated, the Routing of all tokens.
    """
    if tp.size == 1:
        return axes.expert.moe(nodes, m, x)
    axes.sequence.tokens_of(tp, x.shape[1])  # a share for everyone
    sizes = collectives.shares(x.shape[1], tp.size)
    m = axes.sequence.replicated(tp, m, split=("experts.",))
    y, r = axes.expert.moe(nodes, m, scatter_to(x, comm=tp, axis=1, sizes=sizes, label="moe.tokens"))

    def whole(part: Any) -> Any:
        return gather_from(part, comm=tp, axis=1, sizes=sizes, label="moe.gather")

    return whole(y), Routing(whole(r.scores), whole(r.ids), whole(r.weights))
