"""The experts of a unit: slots with replicas, spread over its ranks; who runs, what was asked of whom, and new plans (R 3.4)."""

from __future__ import annotations

import copy

import numpy as np

from refimpl.autograd import Array
from refimpl.autograd.errors import require
from refimpl.layers.moe import MoE
from refimpl.layers.router import counts
from refimpl.model import ForCausalLM
from refimpl.parallel_emulation.axes.expert_layout import Handle, plan
from refimpl.parallel_emulation.axes.expert_wire import OWN, V2_SINGLE, Recipe, Wire
from refimpl.parallel_emulation.collectives import Nodes, collectives
from refimpl.parallel_emulation.eplb import Placement, rebalance_experts
from refimpl.parallel_emulation.serving import choose_replicas

from .moves import Move, migrate, mine
from .residents import choose_residents, only

IN_ORDER = V2_SINGLE
"""Every choice comes back by itself and is added in the order of the columns: here ascending experts, one rank's order."""


class Experts:
    """One rank's end. `at`: decoder layer -> place among the layers with experts. `seen` (L, E): what was asked here since the last
    plan.
    """

    def __init__(
        self,
        nodes: Nodes,
        model: ForCausalLM,
        slots: int,
        *,
        active: int | None = None,
        recipe: Recipe = IN_ORDER,
        wire: Wire = OWN,
    ) -> None:
        """`slots` in all, first as if all loads were equal; `active`: how many of a rank's run in a step, by default all.

        SpecError where the slots do not divide among the ranks, or are too few.
        """
        c, ranks = model.config, nodes.world.size
        layers = [i for i in range(c.num_hidden_layers) if c.is_moe(i)]
        require(bool(layers), "a model without experts has nothing to spread")
        require(slots % ranks == 0, f"{slots} expert slots do not divide among {ranks} ranks")
        require(active is None or 1 <= active <= slots // ranks, f"{active} active of {slots // ranks} experts a rank")
        self.nodes, self.slots, self.active, self.recipe, self.wire = nodes, slots, active, recipe, wire
        self.at = {i: j for j, i in enumerate(layers)}
        self.placement = self._plan(np.ones((len(layers), c.n_routed_experts)))
        self.seen = np.zeros((len(layers), c.n_routed_experts), np.int64)
        whole = [model.model.layers[i].mlp for i in layers]
        self.layers: list[MoE] = []
        for m, row in zip(whole, mine(self.placement, ranks, nodes.world.rank), strict=True):
            assert isinstance(m, MoE)
            here = copy.copy(m)
            here.experts = [m.experts[e] for e in row]
            self.layers.append(here)

    def _plan(self, loads: Array) -> Placement:
        return rebalance_experts(loads, self.slots, 1, 1, self.nodes.world.size)

    def send(self, layer: int, ids: Array, tokens: Array, label: str) -> Handle:
        """Whose slot each choice goes to, told to everybody.  ids (N, K) ascending experts, tokens (N,) -> the way there."""
        j, n = self.at[layer], self.placement.logcnt.shape[1]
        load = counts(ids[None], n_experts=n)
        self.seen[j] += load
        placement, row = self.placement, j
        if self.active is not None:
            asked = collectives.all_reduce(self.nodes.world, load, f"residents{label}")
            on = choose_residents(asked, placement.phy2log[j], self.nodes.world.size, self.active)
            placement, row = only(placement, j, on), 0
        slots = choose_replicas(ids, placement, row, tokens)
        return plan(self.nodes, slots, n_experts=self.slots, recipe=self.recipe, wire=self.wire, label=f"plan{label}")

    def replan(self) -> list[Move]:
        """EPLB anew from what all ranks have seen since the last time; the weights travel. All ranks of the unit call it."""
        loads = collectives.all_reduce(self.nodes.world, self.seen, "eplb.loads")
        new = self._plan(loads)
        held, done = migrate(self.nodes.world, [m.experts for m in self.layers], self.placement, new)
        for m, experts in zip(self.layers, held, strict=True):
            m.experts = experts
        self.placement, self.seen = new, np.zeros_like(self.seen)
        return done
