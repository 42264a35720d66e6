"""Recomputation: keep a segment's inputs instead of its insides, run it again in backward (R 3.2.3).

The second run happens in the context of the first (a precision plan that stood around it stands around it again), on the
same arrays, so it makes the same bits.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .tensor import Array, Gradients, Node, Parameter, Tensor, Vjp, data_of, walk


class _Parts(dict[int, Array]):
    """The gradients of a segment's outputs, as one cotangent: output -> gradient."""

    shape = ()

    def __add__(self, other: _Parts) -> _Parts:
        return _Parts(self | other)  # outputs are different, so nothing is added up


class _Again:
    """A segment's second run: made when first asked for, gone when its gradients have been taken."""

    def __init__(self, fn: Callable[..., Any], args: list[Any]) -> None:
        self._run = partial(contextvars.copy_context().run, fn)
        self._args = args
        self._made: tuple[list[Any], tuple[Any, ...]] | None = None

    def _tape(self) -> tuple[list[Any], tuple[Any, ...]]:
        if self._made is None:
            leaves = [Parameter(a) if _is_float(a) else a for a in self._args]
            self._made = leaves, _as_tuple(self._run(*leaves))
        return self._made

    def output(self) -> Array:
        """The first output."""
        return data_of(self._tape()[1][0])

    def gradients(self, parts: _Parts) -> list[Array | None]:
        """Of every argument, None where there is none."""
        (leaves, outputs), self._made = self._tape(), None
        # as a bare tape reaches them, main path first: the order in which gradients of one tensor add up depends on it
        reached = [i for i in sorted(parts) if isinstance(outputs[i], Tensor)]
        edges = tuple([(outputs[i].node, partial(_part, i)) for i in reached])
        del outputs
        grads = Gradients()
        walk(Node(edges, "recompute", ()), parts, grads, {})
        return [grads.get(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]


def recompute(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A pure function of arrays whose tape is rebuilt in backward: same value and gradients, memory of its inputs only.

    `fn(*arrays) -> y`, or a tuple of results, must take every tensor it needs as an argument; weights too.
    """
    return partial(_segment, fn, False)


def discard(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`recompute` for one output that later ops need not keep either: its `again` makes it once more, in the same run.

    Megatron's name for it is output-discarding recomputation: the way to have a norm's output in no memory although the
    linear layer behind it needs it for its weight gradient.
    """
    return partial(_segment, fn, True)


def _segment(fn: Callable[..., Any], discarding: bool, *args: Any) -> Any:
    tracked = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    plain = [data_of(a) for a in args]
    results = fn(*plain)
    if not tracked:
        return results
    again = _Again(fn, plain)
    memo: list[Any] = [None, None]

    def vjp(i: int) -> Vjp:
        def vjp_i(parts: Any) -> Array:
            if memo[0] is not parts:
                memo[:] = [parts, again.gradients(parts)]
            g = memo[1][i]
            return np.zeros_like(plain[i]) if g is None else g

        return vjp_i

    node = Node(tuple([(args[i].node, vjp(i)) for i in tracked if _is_float(plain[i])]), "recompute", ())
    outputs = [_output(node, i, y) if _is_float(y) else y for i, y in enumerate(_as_tuple(results))]
    if discarding:
        outputs[0].again = again.output
    return tuple(outputs) if isinstance(results, tuple) else outputs[0]


def _output(node: Node, i: int, y: Array) -> Tensor:
    return Tensor(y, Node(((node, partial(_bundle, i)),), "recomputed", y.shape))


def _bundle(i: int, dy: Array) -> Any:
    return _Parts({i: dy})


def _part(i: int, parts: Any) -> Array:
    g: Array = parts[i]
    return g


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _is_float(a: Any) -> bool:
    return getattr(a, "dtype", None) is not None and a.dtype.kind == "f"
