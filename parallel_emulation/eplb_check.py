"""Judge anybody's expert maps: are they whole, do they agree, and how near to balance do they come (R 3.4).

A *fault* makes tokens go to the wrong place, or a slot stand idle: an empty slot, an expert without a slot, maps that are not
each other's inverse, slots that do not exist, counts that do not add up. A *remark* is legal and costs something: two
replicas on one GPU relieve nobody. The published algorithm knows nothing of that either, so its own number stands beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refimpl.autograd.errors import require, where

from .eplb import Ints, Placement, imbalance, rebalance_experts, replicate
from .eplb_files import Maps


class Finding(NamedTuple):
    """What is wrong in a layer: the rule, how often, and the first time in words."""

    rule: str
    layer: int
    times: int
    text: str


@dataclass(frozen=True)
class Verdict:
    """faults and remarks; max / mean of the GPUs' loads per layer (L,): of these maps and of the published algorithm (None where
    the maps are too broken to tell), and the least that any maps of so many slots can reach.
    """

    phy2log: Ints
    faults: list[Finding]
    remarks: list[Finding]
    reached: NDArray[np.float64] | None
    published: NDArray[np.float64] | None
    bound: NDArray[np.float64]

    @property
    def good(self) -> bool:
        """Whether the maps can be used."""
        return not self.faults


def check_maps(
    weight: ArrayLike,
    maps: Maps,
    num_gpus: int,
    *,
    num_replicas: int | None = None,
    num_nodes: int = 1,
    num_groups: int = 1,
    slack: float | None = None,
) -> Verdict:
    """weight (L, E), maps of as many layers and experts; num_replicas slots, by default as many as the maps have. With `slack` it
    is a fault, too, if a layer's max / mean is more than (1 + slack) times that of the published algorithm. SpecError for maps
    of another model, and for sizes that cannot be.
    """
    w = np.asarray(weight, np.float64)
    with where("in check_maps"):
        require(w.ndim == 2 and w.size > 0, f"weight has shape {w.shape}; expected (layers, experts)")
        require(num_gpus >= 1 and num_nodes >= 1, f"{num_gpus} GPUs in {num_nodes} nodes")
        require(num_gpus % num_nodes == 0, f"num_nodes={num_nodes} does not divide num_gpus={num_gpus}")
        require(slack is None or slack >= 0, f"slack {slack} must not be negative")
        _check_model(maps, w.shape)
        phy2log = slots_of(maps, num_replicas)
    faults = _gather(_faults(maps, phy2log, w.shape[1], num_gpus, num_replicas))
    reached = published = None
    remarks: list[Finding] = []
    if not faults:
        ours = rebalance_experts(w, phy2log.shape[1], num_groups, num_nodes, num_gpus)
        reached, published = (imbalance(w, p, num_gpus) for p in (placement(phy2log, w.shape[1]), ours))
        remarks = _remarks(phy2log, ours.phy2log, num_gpus, num_nodes)
        faults = [] if slack is None else _worse(reached, published, slack)
    return Verdict(phy2log, faults, remarks, reached, published, least_imbalance(w, phy2log.shape[1], num_gpus))


def placement(phy2log: Ints, experts: int) -> Placement:
    """The other two maps of phy2log (L, R), replicas in the order of their slots.  Every expert has one, or it is our bug."""
    logcnt = (phy2log[:, :, None] == np.arange(experts)).sum(axis=1)  # (L, E)
    assert logcnt.min() >= 1, "an expert without a slot"
    log2phy = np.full((*logcnt.shape, int(logcnt.max())), -1, np.int64)
    for layer, row in enumerate(phy2log):
        order = np.argsort(row, kind="stable")
        nth = np.arange(len(row)) - np.searchsorted(row[order], row[order])
        log2phy[layer, row[order], nth] = order
    return Placement(phy2log, log2phy, logcnt)


def least_imbalance(weight: ArrayLike, num_replicas: int, num_gpus: int) -> NDArray[np.float64]:
    """max(1, gpus / total x the least possible largest share of a replica), per layer (L,): no maps of so many slots do better.

    A GPU bears the mean at least; and whichever holds the largest load per replica bears that. Giving every further slot to
    the largest share makes the largest share as small as can be.
    """
    w = np.asarray(weight, np.float64)
    if num_replicas < w.shape[1]:
        return np.full(len(w), np.nan)
    _, _, count = replicate(w.astype(np.float32), num_replicas)
    share, total = (w / count).max(axis=1), w.sum(axis=1)
    bound: NDArray[np.float64] = np.maximum(
        1.0, np.divide(share * num_gpus, total, out=np.ones_like(total), where=total > 0)
    )
    return bound


def slots_of(maps: Maps, num_replicas: int | None = None) -> Ints:
    """(L, R) expert of each slot, -1 where nothing says so: phy2log itself, or read off the first other map there is.

    Maps that name more slots than they have entries are refused (SpecError): nobody says then how many there are.
    """
    if maps.phy2log is not None:
        return maps.phy2log
    if maps.expert_maps is not None:
        layers, ranks, experts = maps.expert_maps.shape
        each = int(maps.expert_maps.max()) + 1
        require(1 <= each <= experts, f"expert_maps has {each} slots on a rank, for {experts} experts")
        layer, rank, expert = np.nonzero(maps.expert_maps >= 0)
        slot, slots = rank * each + maps.expert_maps[layer, rank, expert], ranks * each
    else:
        assert maps.log2phy is not None
        layers, slots = len(maps.log2phy), num_replicas or int(maps.log2phy.max()) + 1
        require(
            1 <= slots <= maps.log2phy[0].size, f"log2phy has {maps.log2phy[0].size} entries a layer for {slots} slots"
        )
        layer, expert, nth = np.nonzero((maps.log2phy >= 0) & (maps.log2phy < slots))
        slot = maps.log2phy[layer, expert, nth]
    found = np.full((layers, slots), -1, np.int64)
    found[layer, slot] = expert
    return found


def _check_model(maps: Maps, shape: tuple[int, ...]) -> None:
    layers, experts = shape
    for name, a in vars(maps).items():
        if a is not None:
            require(len(a) == layers, f"{name} has {len(a)} layers, the loads {layers}")
            at = {"logcnt": 1, "log2phy": 1, "expert_maps": 2}.get(name)
            require(at is None or a.shape[at] == experts, f"{name} has shape {a.shape}, the loads {experts} experts")


# ---- Faults


Fault = tuple[str, int, str]  # rule, layer, words


def _faults(maps: Maps, phy2log: Ints, experts: int, gpus: int, replicas: int | None) -> Iterator[Fault]:
    slots = phy2log.shape[1]
    if replicas not in (None, slots):
        yield "slots", 0, f"the maps have {slots} slots; expected {replicas}"
    if slots % gpus:
        yield "slots", 0, f"{slots} slots do not divide among {gpus} GPUs"
    if maps.expert_maps is not None and maps.expert_maps.shape[1] != gpus:
        yield "slots", 0, f"expert_maps is of {maps.expert_maps.shape[1]} ranks, not of {gpus} GPUs"
    for layer, s in np.argwhere(phy2log < 0):
        yield "empty slot", int(layer), f"slot {s} holds no expert"
    for layer, s in np.argwhere(phy2log >= experts):
        yield "no such expert", int(layer), f"slot {s} holds expert {phy2log[layer, s]} of {experts}"
    held = (phy2log[:, :, None] == np.arange(experts)).sum(axis=1)  # (L, E)
    for layer, e in np.argwhere(held == 0):
        yield "expert without a slot", int(layer), f"expert {e} is in no slot"
    if maps.logcnt is not None:
        for layer, e in np.argwhere(maps.logcnt != held):
            text = f"expert {e} has {held[layer, e]} slots, logcnt says {maps.logcnt[layer, e]}"
            yield "count", int(layer), text
    if maps.log2phy is not None:
        yield from _log2phy(maps.log2phy, phy2log)
    if maps.expert_maps is not None:
        yield from _expert_maps(maps.expert_maps, phy2log)


def _log2phy(log2phy: Ints, phy2log: Ints) -> Iterator[Fault]:
    """Every listed slot exists, holds the expert, and is listed once; every slot is listed; -1 only behind the slots."""
    slots = phy2log.shape[1]
    listed = np.zeros(phy2log.shape, np.int64)
    for layer, e, j in np.argwhere((log2phy >= slots) | (log2phy < -1)):
        yield "no such slot", int(layer), f"log2phy sends expert {e} to slot {log2phy[layer, e, j]} of {slots}"
    for layer, e, j in np.argwhere((log2phy >= 0) & (log2phy < slots)):
        s = log2phy[layer, e, j]
        listed[layer, s] += 1
        if phy2log[layer, s] != e:
            text = f"log2phy sends expert {e} to slot {s}, which holds expert {phy2log[layer, s]}"
            yield "not inverse", int(layer), text
    for layer, s in np.argwhere(listed == 0):
        text = f"slot {s} holds expert {phy2log[layer, s]}, whose row of log2phy does not list it"
        yield "never used", int(layer), text
    for layer, s in np.argwhere(listed > 1):
        yield "listed twice", int(layer), f"log2phy lists slot {s} {listed[layer, s]} times"
    for layer, e in np.argwhere(((log2phy[:, :, 1:] >= 0) & (log2phy[:, :, :-1] < 0)).any(axis=2)):
        yield "gap", int(layer), f"log2phy of expert {e} has a -1 before a slot: {log2phy[layer, e].tolist()}"


def _expert_maps(maps: Ints, phy2log: Ints) -> Iterator[Fault]:
    """Every rank's map says where each of its experts is among its slots, and phy2log says the same."""
    ranks, slots = maps.shape[1], phy2log.shape[1]
    if slots % ranks:
        yield "slots", 0, f"expert_maps has {ranks} ranks, phy2log {slots} slots"
        return
    each = slots // ranks
    for layer, rank, e in np.argwhere((maps >= each) | (maps < -1)):
        yield "no such slot", int(layer), f"rank {rank} has expert {e} in its slot {maps[layer, rank, e]} of {each}"
    held = phy2log.reshape(len(phy2log), ranks, each)
    for layer, rank, e in np.argwhere((maps >= 0) & (maps < each)):
        s = maps[layer, rank, e]
        if held[layer, rank, s] != e:
            text = f"rank {rank} has expert {e} in its slot {s}, which holds expert {held[layer, rank, s]}"
            yield "not inverse", int(layer), text
    for layer, rank, s in np.argwhere((held >= 0) & (held < maps.shape[2])):
        e = held[layer, rank, s]
        if maps[layer, rank, e] < 0:
            yield "never used", int(layer), f"rank {rank} holds expert {e} in its slot {s}, its map says it does not"


def _gather(found: Iterator[Fault]) -> list[Finding]:
    """One finding for a rule and a layer: how often, and the first."""
    first: dict[tuple[str, int], list[str]] = {}
    for rule, layer, text in found:
        first.setdefault((rule, layer), []).append(text)
    return [Finding(rule, layer, len(texts), texts[0]) for (rule, layer), texts in first.items()]


def _worse(reached: NDArray[np.float64], published: NDArray[np.float64], slack: float) -> list[Finding]:
    bad = np.flatnonzero(reached > (1 + slack) * published * (1 + 1e-9)).tolist()  # 1e-9: sums in another order
    return [
        Finding("balance", n, 1, f"max / mean {reached[n]:.3f}, the published algorithm reaches {published[n]:.3f}")
        for n in bad
    ]


# ---- Remarks


def _remarks(phy2log: Ints, published: Ints, gpus: int, nodes: int) -> list[Finding]:
    places = [("replicas on one GPU", gpus)] + ([("replicas on one node", nodes)] if nodes > 1 else [])
    found = []
    for rule, n in places:
        for layer, (row, ours) in enumerate(zip(phy2log, published, strict=True)):
            twice, theirs = together(row, n), together(ours, n)
            if twice:
                what = rule.removeprefix("replicas on one ")
                text = f"{what} {twice[0][0]} has {twice[0][2]} of expert {twice[0][1]}; the published maps have {len(theirs)} such"
                found.append(Finding(rule, layer, len(twice), text))
    return found


def together(phy2log: Ints, places: int) -> list[tuple[int, int, int]]:
    """(place, expert, how many) where a GPU or node has several replicas of an expert.  phy2log (R,)"""
    found = []
    for place, row in enumerate(phy2log.reshape(places, -1)):
        experts, counts = np.unique(row, return_counts=True)
        found += [(place, int(e), int(n)) for e, n in zip(experts, counts, strict=True) if n > 1]
    return found
