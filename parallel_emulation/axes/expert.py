"""Expert parallelism: tokens travel to their experts and back (R 3.2.2), as DeepEP documents it.

`plan` tells who gets what; `dispatch` and `combine` are a dual pair, each other's backward along the way that is already
known (DeepEP's cached handle); `moe` is the serial layer with these three lines between its stages. A token goes once to
each rank, over nodes of several GPUs once to each node first. Two things are free to choose: the `Wire`, in which
formats rows travel, and the `Recipe`, in which order and with which roundings a token's rows are added up (DeepEP V1).

With the recipe ONE_RANK forward and backward of the experts have the bits of one rank that holds all tokens in rank
order, given the same routing: an expert meets the very same matrix. The other recipes add partial sums, so only the
order of the K additions differs, and on a BF16 wire three roundings in a row instead of one.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from refimpl.autograd import Array, primitive, require
from refimpl.autograd.nn_ops import once
from refimpl.autograd.tensor import Vjp
from refimpl.layers import moe as layer
from refimpl.layers import router
from refimpl.layers.moe import MoE
from refimpl.layers.router import Routing
from refimpl.parallel_emulation.collectives import Nodes, collectives, copy_to, reduce_from
from refimpl.parallel_emulation.collectives.collectives import wide
from refimpl.parallel_emulation.comm import Comm

from .expert_layout import Handle, plan, spread
from .expert_wire import OWN, V1, Recipe, Wire, ordered_sum, pack, unpack

Result = tuple[Array, tuple[Vjp | None, ...]]


def my_experts(world: Comm, n_experts: int) -> slice:
    """Expert e is on rank e // (E / R).  SpecError where they do not divide."""
    require(n_experts % world.size == 0, f"{n_experts} experts do not divide among {world.size} ranks")
    each = n_experts // world.size
    return slice(each * world.rank, each * (world.rank + 1))


def shard_moe(world: Comm, m: MoE) -> MoE:
    """The same layer with my experts only; router and shared experts are replicated."""
    mine = copy.copy(m)
    mine.experts = m.experts[my_experts(world, len(m.experts))]
    return mine


# ---- Dispatch and combine


def deliver(handle: Handle, x: Array, weights: Array, label: str = "dispatch") -> tuple[Array, Array]:
    """What each rank receives, in one message.  x (T, D), weights (T, K) -> rows (M, D), their weights (M, K).

    Weights of other ranks' experts are 0, as in DeepEP V1 (the V2 reference leaves them as sent).
    """
    for name, a, shape in (("x", x, (handle.route.rows, x.shape[-1])), ("weights", weights, handle.ids.shape)):
        require(a.shape == shape, f"{name} has shape {a.shape}, the plan was for {shape}")
    both = np.concatenate([x, weights.astype(x.dtype, copy=False)], axis=1)
    got = _sent(handle, both, x.shape[1], label)
    return got[:, : x.shape[1]], np.where(handle.local_ids >= 0, got[:, x.shape[1] :], 0)


def _sent(h: Handle, rows: Array, width: int, label: str) -> Array:
    """Rows as they arrive.  (T, D + K) -> (M, D + K)."""
    packed = pack(rows, width, h.wire.dispatch, h.wire.dialect)
    return unpack(spread(h, packed, label), rows.dtype)


@primitive
def dispatch(x: Array, weights: Array, *, handle: Handle, label: str = "dispatch") -> Result:
    """y[p] = [row, weight] of every choice of one of my experts.  x (T, D), weights (T, K) -> y (P, D + 1).

    DeepEP's expanded layout, in the order source rank, token, slot. The vjp is a combine of [dx, dweight].
    """
    rows, w = deliver(handle, x, weights, label)
    y = np.concatenate([rows[handle.row_of], w[handle.row_of, handle.slot_of][:, None]], axis=1)
    width = x.shape[1]

    @once
    def back(dy: Array) -> Array:
        return give_back(handle, dy, width, handle.recipe.backward, f"{label}.bwd")

    return y, (lambda dy: back(dy)[:, :width], lambda dy: back(dy)[:, width:].astype(weights.dtype))


@primitive
def combine(y: Array, *biases: Array, handle: Handle, label: str = "combine") -> Result:
    """z[t] = biases[t] + sum of y over the choices of token t.  y (P, D), already weighted, biases (T, D) -> z (T, D).

    The vjp is a dispatch of dz: every choice gets its token's.
    """
    require(len(y) == len(handle.row_of), f"{len(y)} rows to combine, there are {len(handle.row_of)} choices")
    for b in biases:
        require(b.shape == (handle.route.rows, y.shape[1]), f"bias of shape {b.shape}, rows are {y.shape[1]} wide")
    start = collectives.in_order([b.astype(wide(b.dtype)) for b in biases]) if biases else None
    z = give_back(handle, y, y.shape[1], handle.recipe.order, label, start)

    def vjp_y(dz: Array) -> Array:
        return _sent(handle, dz, dz.shape[1], f"{label}.bwd")[handle.row_of]

    return z, (vjp_y, *[lambda dz: dz for _ in biases])


def give_back(h: Handle, y: Array, width: int, order: str, label: str, start: Array | None = None) -> Array:
    """What became of my tokens' choices, added up.  y (P, D) or (P, D + 1) -> z (T, D) or (T, D + K).

    The first `width` = D numbers of a row are summed over a token's choices; the one behind them belongs to a choice and
    goes to its slot.
    """
    fmt = h.wire.combine
    require(y.dtype == wide(y.dtype), f"rows of {y.dtype} to combine; the wire says what is rounded, rows are float32")
    rows = y if fmt == "own" else y.astype(np.float32, copy=False)
    start = None if start is None else start.astype(rows.dtype)
    if h.recipe.local:
        z = _back_reduced(h, _by_slot(h, rows, width), width, order, label, start)
    else:
        z = _back_single(h, rows, width, order, label, start)
    return unpack(pack(z, width, fmt), y.dtype)  # BF16, the last rounding


def _by_slot(h: Handle, rows: Array, width: int) -> Array:
    """Rows whose last number stands in the column of its slot.  (P, D + 1) -> (P, D + K); (P, D) as it is."""
    if rows.shape[1] == width:
        return rows
    slots = np.zeros((len(rows), h.ids.shape[1]), rows.dtype)
    slots[np.arange(len(rows)), h.slot_of] = rows[:, width]
    return np.concatenate([rows[:, :width], slots], axis=1)


def _back_reduced(h: Handle, rows: Array, width: int, order: str, label: str, start: Array | None) -> Array:
    """Partial sums per rank, then per node, then here."""
    r, fmt = h.route, h.wire.combine
    sent = pack(ordered_sum(len(h.token), h.row_of, h.slot_of, rows), width, fmt)
    back = np.empty_like(sent)
    back[r.order] = sent  # in the order in which the in-node copies came
    at_relay, _ = r.nodes.node.alltoallv(back, r.final_counts, f"{label}.node")
    key = np.repeat(np.arange(r.nodes.node.size), r.hop2_counts) if order == "rank" else h.relay_slots
    partial = ordered_sum(int(r.relay_counts.sum()), r.hop2_from, key, unpack(at_relay, rows.dtype))
    at_source, _ = r.nodes.rail.alltoallv(pack(partial, width, fmt), r.relay_counts, f"{label}.rail")
    node = np.repeat(np.arange(r.nodes.rail.size), r.hop1_counts)
    key = node if order == "rank" else h.last_slots(h.ids[r.hop1_row], node, per_group=r.nodes.node.size)
    return ordered_sum(r.rows, r.hop1_row, key, unpack(at_source, rows.dtype), start)


def _back_single(h: Handle, rows: Array, width: int, order: str, label: str, start: Array | None) -> Array:
    """Every choice by itself, straight to its token's rank."""
    nodes = h.nodes
    counts = np.bincount(h.source[h.row_of], minlength=nodes.world.size)
    got, _ = nodes.rail.alltoallv(pack(rows, width, h.wire.combine), counts, f"{label}.rail")
    token, slot = np.nonzero(h.ids >= 0)
    expert = h.ids[token, slot]
    came = np.argsort(expert // (h.n_experts // nodes.world.size), kind="stable")  # by rank, token, slot
    token, slot, expert = token[came], slot[came], expert[came]
    values = unpack(got, rows.dtype)
    z = ordered_sum(h.route.rows, token, expert if order == "expert" else slot, values[:, :width], start)
    if values.shape[1] == width:
        return z
    extra = np.zeros(h.ids.shape, z.dtype)
    extra[token, slot] = values[:, width]
    return np.concatenate([z, extra], axis=1)


# ---- The layer


def moe(ep: Nodes, m: MoE, x: Any, *, recipe: Recipe = V1, wire: Wire = OWN) -> tuple[Any, Routing]:
    """`layers.moe.MoE` with m.experts mine, x my tokens.  x (B, S, D) -> y (B, S, D), Routing.

    Gradients of the experts are whole, over all tokens of ep; those of router and shared experts are of my tokens.
    """
    r = m.gate(x)
    shared = m.shared_experts.shared(x) if m.config.n_shared_experts else None
    k, d = r.ids.shape[-1], x.shape[-1]
    handle = plan(ep, r.ids.reshape(-1, k), n_experts=m.config.n_routed_experts, recipe=recipe, wire=wire)
    sent = dispatch(x.reshape(-1, d), r.weights.reshape(-1, k), handle=handle)  # (P, D + 1)
    y = routed_experts(m, sent[:, :d], sent[:, d:], handle.expert_of)  # (P, D)
    y = combine(y, handle=handle).reshape(*x.shape)
    return layer.moe_out(y, shared), r


def routed_experts(m: MoE, x: Any, weights: Any, expert: Array) -> Any:
    """weight FFN_e(x), one expert of mine a row.  x (P, D), weights (P, 1), expert (P,) -> (P, D)."""
    early = m.config.dialect.routing_weight_on == "activation"
    x, weights, ids = x.reshape(1, *x.shape), weights.reshape(1, *weights.shape), expert[None, :, None]
    sent = layer.rows(x, ids, n_experts=len(m.experts))
    gate = layer.moe_gate(sent, ids, *[e.gate_proj.weight for e in m.experts])
    up = layer.moe_up(sent, ids, *[e.up_proj.weight for e in m.experts])
    a = layer.act(gate, up, *((ids, weights) if early else (None, None)))
    down = layer.moe_down(a, ids, *[e.down_proj.weight for e in m.experts])
    return layer.routed(down, ids, None if early else weights)[0]


def moe_replicated(tp: Comm, m: MoE, x: Any) -> tuple[Any, Routing]:
    """The same with every token on every rank, so that none travels: DeepSeek's inference code (model.py at 9b4e978).

    x (B, S, D) replicated -> y (B, S, D) replicated, Routing. One all-reduce of B S D numbers forward; backward one of
    B S D and one of B S K. Router and shared experts are computed whole on every rank.
    """
    r = m.gate(x)
    shared = m.shared_experts.shared(x) if m.config.n_shared_experts else None
    mine = my_experts(tp, m.config.n_routed_experts)
    k, d = r.ids.shape[-1], x.shape[-1]
    ids = r.ids.reshape(-1, k)
    token, slot = np.nonzero((ids >= mine.start) & (ids < mine.stop))
    rows = copy_to(x, comm=tp, label="moe").reshape(-1, d)
    weights = copy_to(r.weights, comm=tp, label="moe.weights").reshape(-1, k)
    y = routed_experts(m, rows[token], weights[token, slot].reshape(-1, 1), ids[token, slot] - mine.start)
    y = fold(y, token=token, key=ids[token, slot], n=len(ids)).reshape(*x.shape)  # partial over tp
    return layer.moe_out(reduce_from(y, comm=tp, label="moe"), shared), r


@primitive
def fold(y: Array, *, token: Array, key: Array, n: int) -> Result:
    """z[t] = sum of the rows of token t in the order of their keys.  y (P, D), token (P,), key (P,) -> z (n, D)."""
    return ordered_sum(n, token, key, y), (lambda dz: dz[token],)


def expert_load(comm: Comm, ids: Array, *, n_experts: int) -> Array:
    """Tokens each expert received over all ranks, for the balancing bias.  ids (B, S, K) of my tokens -> (E,) int."""
    return collectives.all_reduce(comm, router.counts(ids, n_experts=n_experts), "expert_load")
