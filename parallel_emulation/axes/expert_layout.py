"""Where tokens go in expert parallelism: DeepEP's dispatch layout, and the handle that dispatch and combine share.

Experts are split contiguously: expert e is on rank e // (E / R). A token goes once to every rank that has one of its K
experts, however many they are. Received rows are sorted by source rank, then by source token; their expert numbers are
local ones, -1 for the choices of other ranks. Source: DeepEP dd758ca, get_dispatch_layout and reference implementation
(deep_ep/utils/refs.py); DeepEP's kernels promise this order in their deterministic mode only.

Ranks are always grouped in nodes (`two_hop.make_nodes`). Nodes of one GPU make the first hop go straight to the rank,
and the second go nowhere: that is the direct transport.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refimpl.autograd import Array, SpecError, require
from refimpl.parallel_emulation.collectives import Nodes, Route, two_hop

from .expert_wire import OWN, V1, Recipe, Wire


@dataclass(frozen=True)
class Layout:
    """What a rank's choices mean for the network."""

    per_rank: Array  # (R,) tokens that go there, each counted once
    per_node: Array  # (N,) likewise
    per_expert: Array  # (E,) choices
    to_rank: Array  # (T, R) bool


def layout(ids: Array, *, n_experts: int, ranks: int, gpus: int = 1) -> Layout:
    """Counts of a rank's tokens.  ids (T, K) expert numbers, -1 for none.

    SpecError for ids that are no experts, experts that do not divide among the ranks, ranks among the nodes.
    """
    if ranks < 1 or gpus < 1 or n_experts < 1 or n_experts % ranks or ranks % gpus:
        raise SpecError(f"{n_experts} experts on {ranks} ranks in nodes of {gpus}: they do not divide evenly")
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise SpecError(f"expert ids are {ids.dtype}{list(ids.shape)}, expected whole numbers (T, K)")
    if ids.size and not (ids.min() >= -1 and ids.max() < n_experts):
        raise SpecError(f"expert ids from {ids.min()} to {ids.max()}; expected -1 to {n_experts - 1}")
    to_rank = np.zeros((len(ids), ranks + 1), bool)  # the last column takes the -1
    np.put_along_axis(to_rank, np.where(ids < 0, ranks, ids // (n_experts // ranks)), True, axis=1)
    to_rank = to_rank[:, :ranks]
    per_node = to_rank.reshape(len(ids), ranks // gpus, gpus).any(axis=2).sum(axis=0)
    per_expert = np.bincount(ids[ids >= 0], minlength=n_experts)
    return Layout(to_rank.sum(axis=0), per_node, per_expert, to_rank)


@dataclass(frozen=True)
class Handle:
    """What `plan` learnt, and what was chosen; dispatch, combine and their backwards need nothing else.

    The P choices are the received rows' experts of mine, in the order source rank, source token, slot.
    """

    route: Route
    ids: Array  # (T, K) of my tokens
    n_experts: int
    source: Array  # (M,) rank that a received row came from
    token: Array  # (M,) its number there
    local_ids: Array  # (M, K) number of the expert here, -1 for those of other ranks
    row_of: Array  # (P,) received row of each choice
    slot_of: Array  # (P,) its slot among the K
    recipe: Recipe
    wire: Wire
    relay_slots: Array | None = None  # (Q,) last slot of each in-node copy that I passed on; for recipes in slot order

    @property
    def nodes(self) -> Nodes:
        """The ranks among which it goes to and fro."""
        return self.route.nodes

    @property
    def expert_of(self) -> Array:
        """(P,) my expert that each choice is for."""
        return self.local_ids[self.row_of, self.slot_of]

    def last_slots(self, ids: Array, group: Array, *, per_group: int) -> Array:
        """The last slot whose expert is on one of the ranks group * per_group, ....  ids (N, K), group (N,) -> (N,)."""
        there = ids // (self.n_experts // self.nodes.world.size * per_group) == group[:, None]
        return ids.shape[1] - 1 - np.argmax(there[:, ::-1], axis=1)

    def tokens_per_expert(self, alignment: int = 1) -> Array:
        """Choices per expert of mine, rounded up to what a grouped GEMM wants (128 in DeepGEMM).  -> (E / R,) int."""
        counts = np.bincount(self.expert_of, minlength=self.n_experts // self.nodes.world.size)
        return -(-counts // alignment) * alignment


def plan(
    nodes: Nodes, ids: Array, *, n_experts: int, recipe: Recipe = V1, wire: Wire = OWN, label: str = "plan"
) -> Handle:
    """Tell every rank which rows it will get, and for which experts.  ids (T, K) int, -1 for none.

    One dispatch of K int32 a row, with its address; DeepEP sends them along with the first payload. For a recipe in slot
    order relays learn the slots of what they pass on, 2 bytes a row. SpecError for sizes that do not fit (see `layout`).
    """
    straight = recipe.local or nodes.node.size == 1
    require(straight, "a recipe without local sums sends every choice straight back: it needs nodes of one GPU")
    world = nodes.world
    to = layout(ids, n_experts=n_experts, ranks=world.size, gpus=nodes.node.size)
    got, source, token, route = two_hop.dispatch(nodes, ids.astype(np.int32), to.to_rank, label)
    first = n_experts // world.size * world.rank
    mine = (got >= first) & (got < first + n_experts // world.size)
    row_of, slot_of = np.nonzero(mine)
    local_ids = np.where(mine, got - first, -1).astype(np.int64)
    handle = Handle(route, ids, n_experts, source, token, local_ids, row_of, slot_of, recipe, wire)
    return replace(handle, relay_slots=_relay_slots(handle, f"{label}.slots")) if recipe.by_slot else handle


def _relay_slots(h: Handle, label: str) -> Array:
    """The last slot that each in-node copy serves at its receiver, told to the relay.  -> (Q,) int."""
    r = h.route
    last = h.ids.shape[1] - 1 - np.argmax(h.local_ids[:, ::-1] >= 0, axis=1)  # (M,)
    back = np.empty(len(last), np.int16)
    back[r.order] = last
    return r.nodes.node.alltoallv(back, r.final_counts, label)[0]


def spread(handle: Handle, x: Array, label: str) -> Array:
    """Send each of my rows to every rank that needs it, the way that is known.  x (T, *) -> (M, *).

    Only the rows themselves travel: one copy per other node on `{label}.rail`, one per other GPU on `{label}.node`.
    """
    r = handle.route
    require(len(x) == r.rows, f"{len(x)} rows to dispatch, the plan was for {r.rows}")
    at_relay, _ = r.nodes.rail.alltoallv(x[r.hop1_row], r.hop1_counts, f"{label}.rail")
    got, _ = r.nodes.node.alltoallv(at_relay[r.hop2_from], r.hop2_counts, f"{label}.node")
    return got[r.order]
