"""Expert-parallel load balancing: which expert each physical slot holds, so that GPUs receive equal load (R 3.4).

The contract is that of `rebalance_experts` in deepseek-ai/EPLB d52c72d, with one decision added: equal loads are taken
in index order. The published code sorts with torch's unstable sort, so its order among ties depends on the build, and
two replicas of one expert always tie. Shapes: L layers, E logical experts, R physical slots, n_rows = L * nodes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refimpl.autograd.errors import SpecError, require, where

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]  # loads: float32 throughout, as in the published code


class Placement(NamedTuple):
    """Where the experts are. Unpacks as the published function's result."""

    phy2log: Ints  # (L, R): expert in each slot
    log2phy: Ints  # (L, E, X): slots of each expert's replicas, -1 beyond; X the most replicas of any
    logcnt: Ints  # (L, E): replicas of each expert


def rebalance_experts(
    weight: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Placement:
    """weight (L, E) >= 0 -> phy2log (L, num_replicas), log2phy (L, E, X), logcnt (L, E).

    Hierarchical if num_nodes divides num_groups: groups to nodes, then experts to slots, then slots to the node's GPUs,
    so that a token's groups stay on few nodes (prefill). Otherwise global, the same with one group and one node
    (decode). Slot s is on GPU s // (num_replicas / num_gpus). Raises SpecError for loads that are not finite and
    non-negative, and for sizes that do not divide. Prefer integer loads: their sums are exact below 2^24.
    """
    with where("in rebalance_experts"):
        w = _loads(weight)
        sizes = {"replicas": num_replicas, "groups": num_groups, "nodes": num_nodes, "gpus": num_gpus}
        for name, n in sizes.items():
            require(isinstance(n, (int, np.integer)) and n >= 1, f"num_{name} is {n!r}; expected an integer >= 1")
        if num_groups % num_nodes:
            num_groups = num_nodes = 1
        _check_sizes(w.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    return _hierarchical(w, num_replicas, num_groups, num_nodes, num_gpus)


def _loads(weight: ArrayLike) -> Floats:
    array: NDArray[Any] = np.asarray(weight)
    require(array.ndim == 2 and array.size > 0, f"weight has shape {array.shape}; expected (layers, experts)")
    if array.dtype.kind not in "iufb":
        raise SpecError(f"weight is {array.dtype}; expected numbers")
    with np.errstate(invalid="ignore", over="ignore"):
        total = array.sum(axis=1, dtype=np.float64)  # NaN and infinity survive a sum
    require((total <= np.finfo(np.float32).max).all(), "loads and their sums must be finite in float32")
    w = array.astype(np.float32)
    require((w >= 0).all(), "loads must not be negative")
    return w


def _check_sizes(experts: int, replicas: int, groups: int, nodes: int, gpus: int) -> None:
    require(experts % groups == 0, f"num_groups={groups} does not divide the {experts} experts")
    require(gpus % nodes == 0, f"num_nodes={nodes} does not divide num_gpus={gpus}")
    require(replicas % gpus == 0, f"num_gpus={gpus} does not divide num_replicas={replicas}")
    require(replicas >= experts, f"num_replicas={replicas} slots are too few for {experts} experts")


def _hierarchical(w: Floats, replicas: int, groups: int, nodes: int, gpus: int) -> Placement:
    """The three packings. `mlog` numbers the experts node by node, `phy` the slots node by node."""
    (layers, experts), node_experts, node_slots = w.shape, w.shape[1] // nodes, replicas // nodes
    size = experts // groups

    # Groups to nodes: mlog order is node, rank of the group in its node, position in the group.
    load = np.cumsum(w.reshape(layers, groups, size), axis=2, dtype=np.float32)[:, :, -1]  # in index order
    place = balanced_packing(load, nodes)  # (L, G)
    order = _inverse(place)
    mlog2log = (order[:, :, None] * size + np.arange(size)).reshape(layers * nodes, node_experts)

    # Experts to slots of their node, each further slot to the expert with the largest load per replica.
    rows = np.repeat(np.arange(layers), nodes)[:, None]
    node_load = w[rows, mlog2log]  # (n_rows, E / nodes)
    slot2mlog, slot_rank, count = replicate(node_load, node_slots)

    # Slots to GPUs of the node, heaviest first.
    share = node_load / count.astype(np.float32)
    order = _inverse(balanced_packing(np.take_along_axis(share, slot2mlog, 1), gpus // nodes))
    phy2mlog = np.take_along_axis(slot2mlog, order, 1)
    rank = np.take_along_axis(slot_rank, order, 1).reshape(layers, replicas)
    phy2log = np.take_along_axis(mlog2log, phy2mlog, 1).reshape(layers, replicas)

    logcnt = np.zeros((layers, experts), np.int64)
    logcnt[rows, mlog2log] = count
    log2phy = np.full((layers, experts, int(count.max())), -1, np.int64)
    log2phy[np.arange(layers)[:, None], phy2log, rank] = np.arange(replicas)
    return Placement(phy2log, log2phy, logcnt)


def _inverse(place: Ints) -> Ints:
    """place (n_rows, n): item -> position; returns position -> item."""
    inverse = np.empty_like(place)
    np.put_along_axis(inverse, place, np.broadcast_to(np.arange(place.shape[1]), place.shape), 1)
    return inverse


def balanced_packing(weight: Floats, num_packs: int) -> Ints:
    """weight (n_rows, n) -> (n_rows, n): position of each item, pack * (n / num_packs) + rank in the pack.

    Heaviest item first (ties: lower index), into the lightest pack with room (ties: lower pack). With one item per pack
    nothing is sorted: item i goes to pack i. All rows are packed at once, one item of each at a time.
    """
    n_rows, n = weight.shape
    room = n // num_packs
    if room == 1:
        return np.broadcast_to(np.arange(n, dtype=np.int64), weight.shape)
    order = np.argsort(-weight, axis=1, kind="stable")
    heaviest = np.take_along_axis(weight, order, 1)
    load = np.zeros((n_rows, num_packs), np.float32)  # +inf once a pack is full
    filled = np.zeros((n_rows, num_packs), np.int64)
    rows, place = np.arange(n_rows), np.empty((n_rows, n), np.int64)
    for i in range(n):
        pack = load.argmin(axis=1)  # the first of the smallest
        rank = filled[rows, pack]
        place[rows, order[:, i]] = pack * room + rank
        filled[rows, pack] = rank + 1
        load[rows, pack] = np.where(rank + 1 == room, np.float32(np.inf), load[rows, pack] + heaviest[:, i])
    return place


def replicate(load: Floats, num_slots: int) -> tuple[Ints, Ints, Ints]:
    """load (n_rows, e) -> expert of each slot, its replica number (n_rows, num_slots), replicas (n_rows, e).

    The first e slots are the experts themselves; each further one goes to the largest load / replicas (ties: lower
    index).
    """
    n_rows, e = load.shape
    slot2log = np.empty((n_rows, num_slots), np.int64)
    slot2log[:, :e] = np.arange(e)
    rank = np.zeros((n_rows, num_slots), np.int64)
    count = np.ones((n_rows, e), np.int64)
    share, rows = load.copy(), np.arange(n_rows)
    for slot in range(e, num_slots):
        chosen = share.argmax(axis=1)  # the first of the largest
        slot2log[:, slot] = chosen
        rank[:, slot] = count[rows, chosen]
        count[rows, chosen] += 1
        share[rows, chosen] = load[rows, chosen] / count[rows, chosen].astype(np.float32)
    return slot2log, rank, count


def gpu_loads(weight: ArrayLike, placement: Placement, num_gpus: int) -> NDArray[np.float64]:
    """weight (L, E) -> (L, num_gpus): load of each GPU when an expert's load is shared equally by its replicas.

    Raises SpecError unless the placement fits the weight and num_gpus divides its slots.
    """
    w, (phy2log, _, logcnt) = np.asarray(weight, np.float64), placement
    require(w.shape == logcnt.shape, f"weight has shape {w.shape}, the placement is for {logcnt.shape}")
    slots = phy2log.shape[1]
    require(num_gpus >= 1 and slots % num_gpus == 0, f"num_gpus={num_gpus} does not divide the {slots} slots")
    share = np.take_along_axis(w / logcnt, phy2log, 1)
    loads: NDArray[np.float64] = share.reshape(len(w), num_gpus, -1).sum(axis=2)
    return loads


def imbalance(weight: ArrayLike, placement: Placement, num_gpus: int) -> NDArray[np.float64]:
    """max / mean of the GPUs' loads, per layer (L,); 1 where a layer has no load at all."""
    loads = gpu_loads(weight, placement, num_gpus)
    mean = loads.mean(axis=1)
    ratio: NDArray[np.float64] = np.where(mean > 0, loads.max(axis=1) / np.where(mean > 0, mean, 1), 1.0)
    return ratio
