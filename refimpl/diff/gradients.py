"""The backward half of a program: the gradient of the loss by every tap and weight (R 3.2.1: backward for input, for weights).

The gradient by a tap is the sum of what its readers send back, each the vjp of one stage at the recorded forward inputs and the
recorded gradient of its output. So a wrong gradient is the fault of a reader of that tap, and of nothing further on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array, Parameter, Tensor, backward, data_of
from refimpl.layers.gemm import Kernel, using
from refimpl.layers.stage import Call, Stage

from .program import integers, names

LOSS = "loss.total"
Shape = tuple[int, ...]


def backward_of(program: list[Call], weights: Mapping[str, Shape]) -> list[Call]:
    """A call for the gradient of every tap, last first, then for that of every weight: `weights` has the shapes of those that are
    trained. What no trained weight leads to, or what does not lead to the loss, has no gradient.
    """
    trained = {f"w/{name}" for name in weights}
    for call in program:
        if not integers(call.of) and any(n in trained for n in names(call.args)):
            trained.add(call.tap)
    readers: dict[str, list[Call]] = {}
    for call in reversed(program):
        if call.stage == LOSS or call.tap in readers:
            for name in dict.fromkeys(n for n in names(call.args) if n in trained):
                readers.setdefault(name, []).append(call)
    found = [_by_tap(call, readers[call.tap]) for call in reversed(program) if call.tap in readers]
    return found + [_by_weight(n, weights[n], readers[f"w/{n}"]) for n in weights if f"w/{n}" in readers]


def gradient_name(tap: str) -> str:
    """`fwd/L3/attn_out` -> `bwd/L3/attn_out`."""
    return f"bwd/{tap.partition('/')[2]}"


def _by_tap(call: Call, readers: list[Call]) -> Call:
    shape, tap = call.of.shape, gradient_name(call.tap)
    return _call(tap, call.tap, f"bwd/{call.stage}", f"gradient by {call.of.what}", shape, readers)


def _by_weight(name: str, shape: Shape, readers: list[Call]) -> Call:
    kind = ".".join(name.split(".")[-2:])
    return _call(
        f"grad/{name}", f"w/{name}", f"grad/{kind}", "gradient by a weight", " ".join(map(str, shape)), readers
    )


def _call(tap: str, name: str, stage: str, what: str, shape: str, readers: list[Call]) -> Call:
    args = tuple([(*r.args, 1.0 if r.stage == LOSS else gradient_name(r.tap)) for r in readers])
    own = Stage(stage, gradient, what, "R 3.2.1", "value", shape, tap.rpartition("/")[2])
    return Call(stage, tap, args, {"readers": tuple(readers), "name": name, "kernel": None}, own)


def gradient(*given: tuple[Any, ...], readers: tuple[Call, ...], name: str, kernel: Callable[[str], Kernel]) -> Array:
    """The sum over the readers of a tap of vjp(their arguments)(gradient of their output). given: for each reader its arguments,
    and that gradient last; `name` is the tap's.
    """
    parts = [_back(r, args, name, kernel) for r, args in zip(readers, given, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _back(reader: Call, args: tuple[Any, ...], name: str, kernel: Callable[[str], Kernel]) -> Array:
    """What one reader sends back to the tap."""
    *values, dy = args
    leaves = list(_leaves(reader.args, values, name))
    leaf = (Parameter if name.startswith("w/") else Tensor)(leaves[0])
    with using(kernel(reader.stage)):
        y = reader.of.fn(*_put(reader.args, values, name, leaf), **reader.static)
    if not isinstance(y, Tensor):
        return np.zeros_like(leaf.data)
    seed = None if isinstance(dy, float) else np.asarray(data_of(dy), y.dtype).reshape(y.shape)
    return backward(y, seed).get(leaf, np.zeros_like(leaf.data))


def _leaves(args: Any, values: Any, name: str) -> Iterator[Array]:
    for arg, value in zip(args, values, strict=True):
        if isinstance(arg, tuple):
            yield from _leaves(arg, value, name)
        elif arg == name:
            yield value


def _put(args: Any, values: Any, name: str, leaf: Tensor) -> tuple[Any, ...]:
    """The values, with the leaf wherever the name stands."""
    return tuple(
        [
            _put(arg, value, name, leaf) if isinstance(arg, tuple) else leaf if arg == name else value
            for arg, value in zip(args, values, strict=True)
        ]
    )
