"""The inside of all experts, whichever way transformers multiplies: one expert after the other, batched, or grouped.

Whose row is whose is known by the weights that it is multiplied with, never by its place alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array

from .hf_probes import Seen
from .torch_arrays import to_numpy

PRODUCTS = {"eager": ("linear",), "batched_mm": ("bmm",), "grouped_mm": ("sort", "grouped_mm", "_grouped_mm")}
"""Implementation -> the functions of torch that are watched in it. Of others nothing is seen inside."""

Call = tuple[str, Seen]
Rows = tuple[Array, Array, Array, Array]
"""Inputs (M, D), gate and up side by side (M, 2F), activations (M, F), outputs (M, D), as they were multiplied."""


def inside(kind: str, experts: Any, ids: Array, calls: Sequence[Call], of: Callable[[Any], Array]) -> list[Array]:
    """moe.rows, moe.gate, moe.up, moe.act, moe.down in our order: rows sorted by expert, token, slot. ids: (N, K).

    of(tensor) -> its values, or their gradient. ValueError if the products are not those of the experts in `ids`.
    """
    find = {"eager": _eager, "batched_mm": _batched, "grouped_mm": _grouped}[kind]
    (x, both, act, down), order = find(experts, ids, calls, of)
    gate, up = np.split(both, 2, axis=-1)
    token, slot = np.indices(ids.shape).reshape(2, -1)
    ours = np.lexsort((slot, token, ids.ravel()))
    place = np.argsort(order)[ours]  # order: which (token, slot) each row is of
    return [a[place] for a in (x, gate, up, act, down)]


def _eager(experts: Any, ids: Array, calls: Sequence[Call], of: Callable[[Any], Array]) -> tuple[Rows, Array]:
    """A loop over experts: two products each, known by the part of the fused weights; rows sorted by slot, token."""
    first: dict[int, Seen] = {}
    second: dict[int, Seen] = {}
    for _, seen in calls:
        for found, stack in ((first, experts.gate_up_proj), (second, experts.down_proj)):
            if (e := _place(stack, seen.args[1])) is not None:
                found[e] = seen
    rows = {e: len(seen.args[0]) for e, seen in first.items()}
    chosen = {int(e): int(n) for e, n in zip(*np.unique(ids, return_counts=True), strict=True)}
    _require(rows == chosen and set(second) == set(first) and len(calls) == 2 * len(first))
    order = sorted(first)
    x, act = (np.concatenate([of(half[e].args[0]) for e in order]) for half in (first, second))
    both, down = (np.concatenate([of(half[e].out) for e in order]) for half in (first, second))
    token, slot = np.indices(ids.shape).reshape(2, -1)
    return (x, both, act, down), np.lexsort((token, slot, ids.ravel()))


def _batched(experts: Any, ids: Array, calls: Sequence[Call], of: Callable[[Any], Array]) -> tuple[Rows, Array]:
    """Two products of all rows, each with a copy of its expert's matrix; rows sorted by token, slot."""
    _require(len(calls) == 2)
    for (_, seen), stack in zip(calls, (experts.gate_up_proj, experts.down_proj), strict=True):
        used, chosen = to_numpy(seen.args[0]), to_numpy(stack)[ids.ravel()]
        _require(used.shape == chosen.shape and used.tobytes() == chosen.tobytes())
    first, second = (seen for _, seen in calls)
    flat = [of(t)[..., 0] for t in (first.args[1], first.out, second.args[1], second.out)]
    return (flat[0], flat[1], flat[2], flat[3]), np.arange(ids.size)


def _grouped(experts: Any, ids: Array, calls: Sequence[Call], of: Callable[[Any], Array]) -> tuple[Rows, Array]:
    """Two products of all rows, sorted by expert in the order that a sort of the ids gave, and where each expert's rows end."""
    sorts, products = [s for n, s in calls if n == "sort"], [s for n, s in calls if n != "sort"]
    _require(len(sorts) == 1 and len(products) == 2)
    order = to_numpy(sorts[0].out[1])
    _require(sorted(order.tolist()) == list(range(ids.size)))
    counts = np.bincount(ids.ravel(), minlength=len(experts.gate_up_proj))
    for seen, stack in zip(products, (experts.gate_up_proj, experts.down_proj), strict=True):
        _require(seen.args[1].data_ptr() == stack.data_ptr() and seen.args[1].mT.shape == stack.shape)
        _require(np.array_equal(to_numpy(seen.kwargs["offs"]), np.cumsum(counts)))
    _require(bool((np.diff(ids.ravel()[order]) >= 0).all()))
    first, second = products
    return (of(first.args[0]), of(first.out), of(second.args[0]), of(second.out)), order


def _require(right: bool) -> None:
    if not right:
        raise ValueError("the rows that the experts multiply are not those of the experts that were chosen")


def _place(stack: Any, part: Any) -> int | None:
    """e if `part` is the memory of stack[e]."""
    if part.shape != stack.shape[1:] or part.dtype != stack.dtype:
        return None
    e, rest = divmod(part.data_ptr() - stack.data_ptr(), stack.stride(0) * stack.element_size())
    return e if rest == 0 and 0 <= e < len(stack) else None
