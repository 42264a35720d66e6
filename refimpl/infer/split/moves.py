"""From one placement of experts to the next: which weights have to travel, and their journey (R 3.4.1: every 10 minutes or so)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from refimpl.autograd import Array
from refimpl.autograd.errors import require
from refimpl.layers.moe import MLP
from refimpl.parallel_emulation.comm import Comm, Recv, Send
from refimpl.parallel_emulation.eplb import Placement

Held = list[list[MLP]]
"""Layer by layer, the experts in a rank's slots."""


class Move(NamedTuple):
    """An expert of a layer that rank `to` has to have and lacks, and a rank that has it."""

    layer: int
    expert: int
    source: int
    to: int


def moves(old: Placement, new: Placement, ranks: int) -> list[Move]:
    """What has to travel: an expert that is on the rank already, in whichever slot, does not, and none comes twice.

    The sources of an expert take turns over its receivers. SpecError for placements of different models.
    """
    require(
        old.logcnt.shape == new.logcnt.shape,
        f"placements of {old.logcnt.shape} and {new.logcnt.shape} layers and experts",
    )
    was, will = _on_ranks(old, ranks), _on_ranks(new, ranks)
    found = []
    for layer, rank, expert in np.argwhere(will & ~was):
        holders = np.flatnonzero(was[layer, :, expert])
        found.append(Move(int(layer), int(expert), int(holders[rank % len(holders)]), int(rank)))
    return found


def _on_ranks(p: Placement, ranks: int) -> Array:
    """(L, W, E) bool: which rank has which expert."""
    layers, slots = p.phy2log.shape
    require(slots % ranks == 0, f"{ranks} ranks do not divide {slots} slots")
    held = p.phy2log.reshape(layers, ranks, slots // ranks)
    return (held[..., None] == np.arange(p.logcnt.shape[1])).any(axis=2)


def mine(p: Placement, ranks: int, rank: int) -> Array:
    """(L, R / ranks) experts in the slots of a rank."""
    return p.phy2log.reshape(len(p.phy2log), ranks, -1)[:, rank]


def migrate(
    comm: Comm, held: Held, old: Placement, new: Placement, label: str = "eplb.move"
) -> tuple[Held, list[Move]]:
    """My slots after the change; one message a move, 3 D F numbers.  Every rank of the group calls it with the same placements."""
    plan = moves(old, new, comm.size)
    before = [
        {int(e): m for e, m in zip(row, slots, strict=True)} for row, slots in zip(_rows(comm, old), held, strict=True)
    ]
    out = [Send(m.to, _flat(before[m.layer][m.expert])) for m in plan if m.source == comm.rank]
    expected = [m for m in plan if m.to == comm.rank]
    came = comm.exchange(out, [Recv(m.source) for m in expected], label)
    for m, flat in zip(expected, came, strict=True):
        before[m.layer][m.expert] = _filled(held[m.layer][0], flat)
    after = [[before[layer][int(e)] for e in row] for layer, row in enumerate(_rows(comm, new))]
    return after, plan


def _rows(comm: Comm, p: Placement) -> Sequence[Array]:
    return list(mine(p, comm.size, comm.rank))


def _flat(m: MLP) -> Array:
    return np.concatenate([np.asarray(w).reshape(-1) for _, w in m.named_weights()])


def _filled(like: MLP, flat: Array) -> MLP:
    """An expert of the same shapes with these numbers."""
    ends = np.cumsum([w.size for _, w in like.named_weights()])
    parts = dict(zip([n for n, _ in like.named_weights()], np.split(flat, ends[:-1]), strict=True))
    return like.map(lambda name, w: parts[name].reshape(w.shape))
