"""Which rank of how many a torch program is, and how its distributed tensors lie over them, in the words of a trace's header.

`parallel` is {"rank": 3, "ranks": 4, "axes": {"tp": [1, 2], "dp": [1, 2]}}, `dims` "B S H@tp Dn+Dr" (refimpl/diff/marks.py). Axes
are those of the model's DeviceMesh, or Megatron's groups; where neither is known there is one axis, `ranks`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refimpl.diff.dims import size_of

from .refimpl_tap import parallel as plain

Shares = tuple[tuple[str, int | None], ...]
"""(axis of ranks, axis of the tensor that is split over it, None for a sum not yet taken), outermost first."""


@dataclass(frozen=True)
class Spread:
    """How a distributed tensor lies: the shape of the whole, and its shares."""

    shape: tuple[int, ...]
    shares: Shares


def parallel_of(module: Any) -> dict[str, Any]:
    """The header's `parallel` of this process; {} where it is alone. module: what runs, whose tensors may tell a mesh."""
    found = plain()
    if not found:
        return {}
    axes = _mesh_axes(getattr(module, "parameters", tuple)()) or _megatron_axes()
    return {**found, "axes": axes} if math.prod(n for _, n in axes.values()) >= found["ranks"] else found


def _mesh_axes(tensors: Iterable[Any]) -> dict[str, list[int]]:
    """Axis -> [coordinate, size], of the largest mesh that a tensor lies on."""
    meshes = [t.device_mesh for t in tensors if hasattr(t, "device_mesh")]
    meshes = [getattr(m, "_get_root_mesh", lambda m=m: m)() for m in meshes]
    largest = max(meshes, key=lambda m: m.size(), default=None)
    if largest is None or largest.get_coordinate() is None:
        return {}
    return {_axis(largest, i): [int(at), int(largest.size(i))] for i, at in enumerate(largest.get_coordinate())}


def _axis(mesh: Any, i: int) -> str:
    return (mesh.mesh_dim_names or ())[i] if mesh.mesh_dim_names else f"mesh{i}"


def _megatron_axes() -> dict[str, list[int]]:
    """Those of Megatron's groups, if they were made."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return {}
    kinds = {
        "tp": "tensor_model_parallel",
        "pp": "pipeline_model_parallel",
        "cp": "context_parallel",
        "dp": "data_parallel",
    }
    return {
        axis: [getattr(state, f"get_{kind}_rank")(), getattr(state, f"get_{kind}_world_size")()]
        for axis, kind in kinds.items()
    }


def spread_of(x: Any) -> Spread | None:
    """How a DTensor lies over its mesh; None for any other array, and for one that is the same everywhere."""
    if not (hasattr(x, "placements") and hasattr(x, "device_mesh")):
        return None
    shares = []
    for i, p in enumerate(x.placements):
        if p.is_shard():
            shares.append((_axis(x.device_mesh, i), p.dim % x.ndim))
        elif p.is_partial():
            shares.append((_axis(x.device_mesh, i), None))
    return Spread(tuple(x.shape), tuple(shares)) if shares else None


def dims_of(spread: Spread, axes: Sequence[str], numbers: Mapping[str, int]) -> str:
    """The dims string of a tap of these axes: `B S (H@tp Dv)` where heads and channels are one; "" if the axes do not fit."""
    merged = _grouped(spread.shape, axes, numbers)
    if merged is None:
        return ""
    sums = [f"+{axis}" for axis, place in spread.shares if place is None]
    for axis, place in spread.shares:
        if place is not None:
            merged[place][0] += f"@{axis}"
    return " ".join([*[f"({' '.join(m)})" if len(m) > 1 else m[0] for m in merged], *sums])


def _grouped(shape: tuple[int, ...], axes: Sequence[str], numbers: Mapping[str, int]) -> list[list[str]] | None:
    """Which of the axes each axis of an array is: neighbours may be one."""
    found, rest = list[list[str]](), list(axes)
    for n in shape:
        here, product = list[str](), 1
        while rest and (not here or product < n):
            product *= size_of(rest[0], numbers)
            here.append(rest.pop(0))
        if product != n or not here:
            return None
        found.append(here)
    return None if rest else found
