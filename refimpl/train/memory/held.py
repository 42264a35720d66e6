"""Which bytes a tape holds until backward: every array that a vjp closes over, each buffer once. Exact, no measuring."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from refimpl.autograd import Array, Tensor
from refimpl.autograd.tensor import Node


def held(*roots: Tensor, known: Iterable[Array] = ()) -> int:
    """Bytes that live because backward from `roots` may come; without `known` arrays (weights, inputs) and leaves."""
    outside = {id(_buffer(x)) for x in known}
    return sum([x.nbytes for x in _buffers(roots) if id(x) not in outside])


def _buffers(roots: Iterable[Tensor]) -> Iterator[Array]:
    """Every array below, as the whole buffer it is a view of; each once."""
    todo: list[Any] = [root.node for root in roots]
    seen: dict[int, Any] = {}  # keeps what it has seen alive, so that no id is used twice
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen[id(x)] = x
        if isinstance(x, np.ndarray):
            whole = _buffer(x)
            if whole is x or id(whole) not in seen:
                seen[id(whole)] = whole
                yield whole
        else:
            todo += _inside(x)


def _buffer(x: Array) -> Array:
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def _inside(x: Any) -> Iterable[Any]:
    """What an object of ours, a container or a function refers to; classes, modules and contexts hold no activations."""
    match x:
        case Tensor():
            return () if x.node is x else (x.node,)
        case Node():
            return x.edges or ()
        case types.FunctionType():
            cells = [c.cell_contents for c in x.__closure__ or () if not _empty(c)]
            return (*cells, *(x.__defaults__ or ()))
        case functools.partial():
            return (x.func, *x.args, *x.keywords.values())
        case types.MethodType():
            return (x.__self__, x.__func__)
        case list() | tuple() | set() | frozenset():
            return tuple(x)
        case dict():
            return tuple(x.values())
        case _ if type(x).__module__.startswith("refimpl.") and not isinstance(x, type):
            return tuple(getattr(x, "__dict__", {}).values())
        case _:
            return ()


def _empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
