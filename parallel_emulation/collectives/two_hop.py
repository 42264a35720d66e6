"""Dispatch and combine in two hops: one copy per node over the rail ("IB"), then copies inside the node ("NVLink").

R 3.2.2: a token goes to at most 4 nodes, is sent once to each, to the GPU with the sender's own number in its node, and
is passed on from there to every GPU that needs it. The node-limited gate makes the first hop cheap, and the second one,
3.2 times as fast, is hidden behind it. `combine` goes the same way back and adds up on the way.

Ranks are numbered node by node: rank = node * gpus + index. Received rows are in the order (source rank, source row),
whatever way they came, so the two-hop transport delivers what a direct one does, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd import Array, SpecError
from refimpl.parallel_emulation.comm import Comm

from .collectives import wide


@dataclass(frozen=True)
class Nodes:
    """My two groups: `rail`, the GPUs with my number in every node, and `node`, the GPUs of my node."""

    world: Comm
    rail: Comm
    node: Comm


@dataclass(frozen=True)
class Route:
    """What dispatch remembers for combine: the way of every row, as sort orders and counts of the two hops."""

    nodes: Nodes
    rows: int  # that I dispatched
    hop1_row: Array  # (A,) which of my rows each rail copy was
    hop1_counts: Array  # (N,) rail copies per node, as sent
    hop2_from: Array  # (P,) which rail copy (as received) each in-node copy was
    hop2_counts: Array  # (G,) in-node copies per GPU, as sent
    relay_counts: Array  # (N,) rail copies per node, as received
    final_counts: Array  # (G,) in-node copies per GPU, as received
    order: Array  # (M,) received row i came as in-node copy order[i]


def make_nodes(world: Comm, gpus: int, label: str = "nodes") -> Nodes:
    """Divide the ranks into nodes of `gpus`. SpecError where they do not divide."""
    if gpus < 1 or world.size % gpus:
        raise SpecError(f"{world.size} ranks are not whole nodes of {gpus} GPUs")
    node, index = divmod(world.rank, gpus)
    return Nodes(world, world.split(index, node, f"{label}.rail"), world.split(node, index, f"{label}.node"))


def dispatch(nodes: Nodes, x: Array, needed: Array, label: str = "dispatch") -> tuple[Array, Array, Array, Route]:
    """Send row t of x to every rank r with needed[t, r].  x (T, *), needed (T, n) bool.

    Returns rows (M, *), their source rank (M,), their row there (M,), and the route back. On the wires: hop 1
    `{label}.rail` one copy per other node that needs the row, hop 2 `{label}.node` one per other GPU there that does.
    """
    world, rail, node = nodes.world, nodes.rail, nodes.node
    if needed.shape != (len(x), world.size) or needed.dtype != bool:
        raise SpecError(f"needed is {needed.dtype}{list(needed.shape)}, expected bool{[len(x), world.size]}")
    mask = needed.reshape(len(x), rail.size, node.size)  # (T, N, G)
    to_node, hop1_row = np.nonzero(mask.any(axis=2).T)  # (A,) by node, then by row
    parcels = _parcels(x[hop1_row], world.rank, hop1_row, mask[hop1_row, to_node])
    hop1_counts = np.bincount(to_node, minlength=rail.size)
    arrived, relay_counts = rail.alltoallv(parcels, hop1_counts, f"{label}.rail")  # (A',)
    to_gpu, hop2_from = np.nonzero(arrived["needed"].T)  # (P,) by GPU, then by arrival
    hop2_counts = np.bincount(to_gpu, minlength=node.size)
    got, final_counts = node.alltoallv(_unmasked(arrived[hop2_from]), hop2_counts, f"{label}.node")  # (M,)
    order = np.lexsort((got["row"], got["source"]))
    got = got[order]
    route = Route(nodes, len(x), hop1_row, hop1_counts, hop2_from, hop2_counts, relay_counts, final_counts, order)
    return np.ascontiguousarray(got["x"]), got["source"].astype(np.int64), got["row"].astype(np.int64), route


def combine(route: Route, y: Array, label: str = "combine", *, start: Array | None = None) -> Array:
    """For every row dispatched, the sum of what its receivers give back.  y (M, *) -> z (T, *) of y's dtype.

    Rounding points (DeepEP V1, hybrid): the relay adds its node's GPUs in ascending order in float32 and rounds to y's
    dtype; the source adds the nodes in ascending order in float32, from `start` (T, *) or zero, and rounds once.
    """
    if len(y) != len(route.order):
        raise SpecError(f"{len(y)} rows to combine, {len(route.order)} were received")
    back = np.empty_like(y)
    back[route.order] = y  # in the order in which the in-node copies came
    at_relay, _ = route.nodes.node.alltoallv(back, route.final_counts, f"{label}.node")  # (P, *) by GPU
    partial = _sum_into(int(route.relay_counts.sum()), route.hop2_from, route.hop2_counts, at_relay)
    at_source, _ = route.nodes.rail.alltoallv(partial.astype(y.dtype), route.relay_counts, f"{label}.rail")  # (A, *)
    return _sum_into(route.rows, route.hop1_row, route.hop1_counts, at_source, start).astype(y.dtype)


def _sum_into(n: int, place: Array, counts: Array, rows: Array, start: Array | None = None) -> Array:
    """z[place[i]] += rows[i], one sender after the other; a sender has at most one row for a place.  -> z (n, *) wide."""
    z = np.zeros((n, *rows.shape[1:]), wide(rows.dtype)) if start is None else start.astype(wide(rows.dtype))
    for part in np.split(np.arange(len(rows)), np.cumsum(counts)[:-1]):
        z[place[part]] += rows[part].astype(z.dtype)
    return z


def _parcels(x: Array, source: int, row: Array, needed: Array) -> Array:
    """One structured row per copy, so that values and addresses travel in one message."""
    kind = np.dtype([("x", x.dtype, x.shape[1:]), ("source", "<i4"), ("row", "<i4"), ("needed", "?", needed.shape[1:])])
    parcels = np.zeros(len(x), kind)
    parcels["x"], parcels["source"], parcels["row"], parcels["needed"] = x, source, row, needed
    return parcels


def _unmasked(parcels: Array) -> Array:
    """The same parcels without the mask, which nobody needs any more."""
    kind: Any = np.dtype([(name, parcels.dtype[name]) for name in ("x", "source", "row")])
    bare = np.zeros(len(parcels), kind)
    for name in kind.names:
        bare[name] = parcels[name]
    return bare
