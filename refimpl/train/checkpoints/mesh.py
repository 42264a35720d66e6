"""A rank of a mesh (`refimpl.train.parallel`) as a snapshot, and back on any other mesh.

A rank writes what nobody else does: its 1/d of each reduction group's masters and moments (ZeRO-1), in bytes the d-th part
of the optimiser; buffers by the first rank that holds them. Reading puts whole tensors together and starts as a new run
starts, masters as weights; moments are divided in the same way, since they lie like masters. So a checkpoint knows nothing
of the mesh that will read it, and the tensors are the same bits on any. What a run then does differs by the order of sums.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.autograd import Array, require
from refimpl.layers.config import Config
from refimpl.layers.module import is_buffer
from refimpl.model import ForCausalLM
from refimpl.parallel_emulation.axes.mesh import Mesh
from refimpl.parallel_emulation.comm import Comm
from refimpl.parallel_emulation.pipeline import Schedule
from refimpl.train import parallel
from refimpl.train.mesh_model import checkpoint_names, divide
from refimpl.train.optimizer import AdamState
from refimpl.train.parallel import Rank
from refimpl.train.training import Recipe

from .facts import check_config
from .pieces import Piece, Place, Shape
from .serial import EMA, FIRST, MASTER, SECOND
from .snapshot import Saved, Snapshot


def snapshot(rank: Rank, facts: Mapping[str, Any], *, ema: Mapping[str, Array] | None = None) -> Snapshot:
    """My part of the run. All ranks call it together, with the same facts; no copy. `ema`: an average of `my_masters`."""
    names, boxes = _names(rank), _boxes(rank)
    pieces: dict[str, Piece] = {}
    for kind, name, (begin, end), data in _held(rank, ema or {}):
        shape, start = boxes[names[name]]
        pieces[f"{kind}/{names[name]}"] = Piece(Place(shape, start, rank.weights[name].shape, begin, end), data)
    return Snapshot(rank.t, pieces, facts)


def my_masters(rank: Rank) -> dict[str, Array]:
    """By local name: my part (K,) of the master of every weight of which I have one, and the buffers that I hold."""
    found = {name: w for name, w in rank.weights.items() if is_buffer(name)}
    for shard in rank.shards:
        found |= shard.pieces(shard.master)
    return found


def _held(rank: Rank, ema: Mapping[str, Array]) -> Iterator[tuple[str, str, tuple[int, int], Array]]:
    """(kind, local name, elements of the local weight, data) of what I am the one to write."""
    copies = rank.groups.tp.rank > 0  # tensor-parallel ranks hold the same of all that is not split
    for kind, shard in zip(rank.local.kinds, rank.shards, strict=True):
        if copies and kind.distinct is rank.local.once:
            continue
        parts: dict[str, Mapping[str, Array]] = {MASTER: shard.pieces(shard.master)}
        if shard.state is not None:
            parts |= {FIRST: shard.state.m, SECOND: shard.state.v}
        parts |= {EMA: ema} if ema else {}
        for what, held in parts.items():
            for name, span in shard.spans().items():
                yield what, name, span, held[name]
    if rank.local.replicas.rank == 0 and not copies:
        for name, w in rank.weights.items():
            if is_buffer(name):
                yield MASTER, name, (0, w.size), w
                if ema:
                    yield EMA, name, (0, w.size), ema[name]


def _names(rank: Rank) -> dict[str, str]:
    """Local name -> checkpoint name."""
    named = checkpoint_names(rank.groups, rank.config.n_routed_experts, {name: name for name in rank.weights})
    return {local: name for name, local in named.items()}


def _boxes(rank: Rank) -> dict[str, tuple[Shape, Shape]]:
    """Checkpoint name -> shape of the whole weight, where my slice of it begins.

    Found by dividing a model whose weights are their own row and column numbers: nothing about slices is said twice.
    """
    c = rank.config
    whole = {n: tuple(w.shape) for n, w in ForCausalLM(c).named_weights() if not w.optional}
    names = list(_names(rank).values())
    if rank.groups.tp.size == 1:
        return {n: (whole[n], (0,) * len(whole[n])) for n in names}
    starts: dict[str, list[int]] = {n: [] for n in names}
    for axis in range(2):
        numbers = {n: _numbers(shape, axis) for n, shape in whole.items()}
        local = divide(rank.groups, rank.schedule.layout, ForCausalLM(c).load(numbers))
        held = {n: w for n, w in local.model.named_weights() if hasattr(w, "dtype")}
        for n, w in checkpoint_names(rank.groups, c.n_routed_experts, held).items():
            starts[n] += [int(w.reshape(-1)[0])] if axis < w.ndim else []
    return {n: (whole[n], tuple(starts[n])) for n in names}


def _numbers(shape: Shape, axis: int) -> Array:
    """x[i, j] = i, or j, in no memory; zeros along an axis that is not there."""
    if axis >= len(shape):
        return np.broadcast_to(np.int64(0), shape)
    along = np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return np.broadcast_to(along, shape)


def resume(
    saved: Saved,
    world: Comm,
    c: Config,
    recipe: Recipe,
    mesh: Mesh,
    schedule: Schedule,
    *,
    changed: Collection[str] = (),
) -> Rank:
    """My part of the run that was saved, on this mesh. SpecError for a checkpoint of another config or dtype."""
    check_config(saved, parallel.trained(c, recipe), changed)
    masters, dtype = saved.tensors(MASTER), np.dtype(recipe.plan.dtype)
    other = sorted({str(masters[n].dtype) for n in masters} - {str(dtype)})
    require(not other, f"{saved.folder} has masters in {', '.join(other)}, the plan {recipe.plan.name} keeps {dtype}")
    rank = parallel.start(world, c, masters, recipe, mesh, schedule)
    if not saved.step:
        return rank
    moments = []
    for kind in (FIRST, SECOND):
        held = saved.tensors(kind)
        whole = {n: held[n] if n in held else np.zeros_like(masters[n]) for n in masters}
        moments.append(parallel.start(world, c, whole, recipe, mesh, schedule).shards)
    shards = [
        replace(s, state=AdamState(s.pieces(m.master), s.pieces(v.master), saved.step))
        for s, m, v in zip(rank.shards, *moments, strict=True)
    ]
    return replace(rank, shards=shards, t=saved.step)


def resume_ema(saved: Saved, rank: Rank) -> dict[str, Array]:
    """My part of the average that was saved, as `my_masters` gives that of the masters; {} if none was."""
    whole = dict(saved.tensors(EMA))
    return my_masters(parallel.again(rank, whole)) if whole else {}
