"""The backward half of a program: the gradient of the loss by every tap and weight (R 3.2.1: backward for input, for weights).

The gradient by a tap is the sum of what its readers send back, each the vjp of one stage at the recorded forward inputs and the
recorded gradient of its output. So a wrong gradient is the fault of a reader of that tap, and of nothing further on.

What an FP8 recipe keeps of an activation until its weight's gradient is not the activation: of SwiGLU its inputs as codes, from
which it is run again (R 3.3.3, special case (2)). Such a gradient reads those inputs too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array, Parameter, Tensor, backward, data_of
from refimpl.layers.gemm import Kernel, using
from refimpl.layers.precision import FLOAT64, Plan
from refimpl.layers.stage import Call, Stage

from .program import integers, names, replaced, standing

LOSS = "loss.total"
Shape = tuple[int, ...]


def backward_of(program: list[Call], weights: Mapping[str, Shape], plan: Plan = FLOAT64) -> list[Call]:
    """A call for the gradient of every tap, last first, then for that of every weight: `weights` has the shapes of those that are
    trained. What no trained weight leads to, or what does not lead to the loss, has no gradient. The plan says what is run again.
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
    again = {c.tap: c for c in program if _recomputes(plan.kernel(c.stage))}
    return found + [_by_weight(n, weights[n], readers[f"w/{n}"], again) for n in weights if f"w/{n}" in readers]


def _recomputes(kernel: Kernel) -> bool:
    return bool(getattr(kernel, "recompute", False))


def gradient_name(tap: str) -> str:
    """`fwd/L3/attn_out` -> `bwd/L3/attn_out`."""
    return f"bwd/{tap.partition('/')[2]}"


def _by_tap(call: Call, readers: list[Call]) -> Call:
    shape, tap = call.of.shape, gradient_name(call.tap)
    return _call(tap, call.tap, f"bwd/{call.stage}", f"gradient by {call.of.what}", shape, readers)


def _by_weight(name: str, shape: Shape, readers: list[Call], again: Mapping[str, Call]) -> Call:
    kind, axes = ".".join(name.split(".")[-2:]), " ".join(map(str, shape))
    made = [next((again[n] for n in names(r.args) if n in again), None) for r in readers]
    return _call(f"grad/{name}", f"w/{name}", f"grad/{kind}", "gradient by a weight", axes, readers, made)


def _call(
    tap: str, name: str, stage: str, what: str, shape: str, readers: list[Call], made: Iterable[Call | None] = ()
) -> Call:
    makers = tuple(made) or (None,) * len(readers)
    seeds = [1.0 if r.stage == LOSS else gradient_name(r.tap) for r in readers]
    args = [(*r.args, dy, *(m.args if m else ())) for r, dy, m in zip(readers, seeds, makers, strict=True)]
    own = Stage(stage, gradient, what, "R 3.2.1", "value", shape, tap.rpartition("/")[2])
    return Call(
        stage, tap, tuple(args), {"readers": tuple(readers), "makers": makers, "name": name, "kernel": None}, own
    )


def gradient(
    *given: tuple[Any, ...],
    readers: tuple[Call, ...],
    makers: tuple[Call | None, ...],
    name: str,
    kernel: Callable[[str], Kernel],
) -> Array:
    """The sum over the readers of a tap of vjp(their arguments)(gradient of their output).

    given: for each reader its arguments, that gradient, and the arguments of what is run again before it (`makers`); `name` is the
    tap's.
    """
    parts = [_back(r, m, args, name, kernel) for r, m, args in zip(readers, makers, given, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _back(reader: Call, maker: Call | None, args: tuple[Any, ...], name: str, kernel: Callable[[str], Kernel]) -> Array:
    """What one reader sends back to the tap."""
    n = len(reader.args)
    values, dy = list(args[:n]), args[n]
    if maker and _recomputes(kernel(maker.stage)):
        i = reader.args.index(maker.tap)
        values[i] = _waiting(maker, args[n + 1 :], values[i], kernel(maker.stage))
    leaves = list(standing(reader.args, values, name))
    leaf = (Parameter if name.startswith("w/") else Tensor)(leaves[0])
    with using(kernel(reader.stage)):
        y = reader.of.fn(*replaced(reader.args, values, name, lambda _: leaf), **reader.static)
    if not isinstance(y, Tensor):
        return np.zeros_like(leaf.data)
    seed = None if type(dy) is float else np.asarray(data_of(dy), y.dtype).reshape(y.shape)
    return backward(y, seed).get(leaf, np.zeros_like(leaf.data))


def _waiting(maker: Call, args: tuple[Any, ...], x: Array, kernel: Kernel) -> Tensor:
    """x, and in its place until the backward pass what the kernel keeps that makes it."""
    with using(kernel):
        y = maker.of.fn(*[Tensor(a) if a is not None and a.dtype.kind == "f" else a for a in args], **maker.static)
    kept = Tensor(x)
    kept.saved = y.saved
    return kept
