"""The tape: arrays that remember which function made them, and one backward pass.

An op is a plain function on arrays, `fn(*arrays, **static) -> (y, (vjp per array argument, ...))`; `primitive` lifts
it to the tape. Called with plain arrays only, a lifted op records nothing and returns a plain array: there is no
"no_grad" mode because there is no mode at all. Vjps work on plain arrays, so there is no double backward.

Works on NumPy and on CuPy arrays alike: ops use NumPy functions, which dispatch on the array they are given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .errors import SpecError

Array = Any  # numpy.ndarray or cupy.ndarray; shapes are tested, not typed
Vjp = Callable[[Array], Array]
Edges = tuple[tuple["Node | Tensor", Vjp], ...]


class Node:
    """What backward needs of a Tensor that an op made: its edges, (parent, vjp) pairs, and of its array the shape.

    The array itself is not here: it lives until backward if a vjp closes over it, and else no longer than its Tensor.
    `edges` is None once backward has used them.
    """

    __slots__ = ("__weakref__", "edges", "op", "shape")

    def __init__(self, edges: Edges, op: str, shape: tuple[int, ...]) -> None:
        self.edges: Edges | None = edges
        self.op, self.shape = op, shape

    def __repr__(self) -> str:
        return f"Tensor({self.op}, shape={self.shape})"


class Tensor:
    """An array on the tape; a leaf, unless an op made it.

    `saved`, if set, gives what the vjps of later ops may use in place of `data`: an activation kept in fewer bits, or
    recomputed (R 3.3.3). `again`, if set, gives the same bits as `data`, made once more: later ops that know of it keep it
    instead of the array.
    """

    __slots__ = ("__weakref__", "_made", "again", "data", "saved")
    __array_ufunc__ = None  # ndarray + Tensor asks Tensor.__radd__ instead of looping over elements

    def __init__(self, data: Array, made: Node | None = None) -> None:
        self.data, self._made = data, made
        self.saved: Callable[[], Array] | None = None
        self.again: Callable[[], Array] | None = None

    @property
    def node(self) -> Node | Tensor:
        """Where edges that lead here end: the node of the op that made it, or the leaf itself."""
        return self if self._made is None else self._made

    @property
    def edges(self) -> Edges | None:
        """None where an op made it and backward has used it, () for a leaf."""
        return () if self._made is None else self._made.edges

    @property
    def op(self) -> str:
        """The op that made it."""
        return "leaf" if self._made is None else self._made.op

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(self.data.shape)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return int(self.data.ndim)

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(self.data.size)

    @property
    def dtype(self) -> Any:
        """The array's dtype."""
        return self.data.dtype

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"Tensor({self.op}, shape={self.shape}, dtype={self.dtype})"

    def __bool__(self) -> bool:
        raise SpecError("a Tensor has no truth value; compare its .data")


class Parameter(Tensor):
    """A leaf that holds a weight: gradients towards it can be deferred (`backward(..., later=[])`)."""

    __slots__ = ()


def data_of(x: Any) -> Any:
    """The plain array of a Tensor; anything else unchanged."""
    return x.data if isinstance(x, Tensor) else x


def primitive(fn: Callable[..., tuple[Array, tuple[Vjp | None, ...]]]) -> Callable[..., Any]:
    """Lift `fn(*arrays, **static) -> (y, vjps)` to the tape. `None` instead of a vjp: no gradient that way.

    An fn with a keyword `again` is told how its first argument can be made once more, if that is so.
    """
    takes_again = "again" in inspect.signature(fn).parameters

    @functools.wraps(fn)
    def op(*args: Any, **static: Any) -> Any:
        for a in args:
            if isinstance(a, Tensor):
                break
        else:  # nothing on the tape: the common case of a decode step, in which an op's own work takes microseconds
            return fn(*args, **static)[0]
        tracked = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        if takes_again and tracked[0] == 0:
            static["again"] = args[0].again
        y, vjps = fn(*[a.data if isinstance(a, Tensor) else a for a in args], **static)
        edges = tuple([(args[i].node, v) for i in tracked if (v := vjps[i]) is not None])
        return Tensor(y, Node(edges, fn.__name__, np.shape(y))) if edges else y

    op.raw = fn  # type: ignore[attr-defined]
    return op


class Gradients(dict[Tensor, Array]):
    """Leaf (or kept) Tensor -> gradient array. Adding to it is how micro-batches accumulate."""

    def add(self, leaf: Tensor, g: Array) -> None:
        """Accumulate by `+`; the first gradient is taken as it is."""
        self[leaf] = self[leaf] + g if leaf in self else g


def backward(
    y: Tensor,
    dy: Array | None = None,
    *,
    into: Gradients | None = None,
    keep: Iterable[Tensor] = (),
    later: list[Callable[[], None]] | None = None,
) -> Gradients:
    """Gradients of <dy, y> with respect to every leaf under `y`, and to the inner Tensors named in `keep`.

    `dy` defaults to 1 and is then only allowed for a scalar y. `into` accumulates into an earlier result. With `later`,
    vjps that lead to a Parameter are not run but appended as thunks that add to the result when called: that is the
    split of backward into "for inputs" and "for weights" of zero-bubble pipelines (R 3.2.1), and Dgrad against Wgrad.
    The graph is freed as it is walked; a second backward through it raises SpecError.
    """
    if not isinstance(y, Tensor):
        raise SpecError("backward needs a Tensor; this value depends on no leaf")
    grads = Gradients() if into is None else into
    walk(y.node, _seed(y, dy), grads, {t.node: t for t in keep}, later)
    return grads


def walk(
    start: Node | Tensor,
    dy: Any,
    grads: Gradients,
    kept: Mapping[Node | Tensor, Tensor],
    later: list[Callable[[], None]] | None = None,
) -> None:
    """`backward` from a node on, into `grads`; the gradients of the nodes in `kept` too, under their Tensors."""
    flowing: dict[Node | Tensor, Any] = {start: dy}
    order = _topological(start)
    while order:
        node = order.pop()
        g = flowing.pop(node, None)
        if g is None:
            continue
        edges = node.edges
        assert edges is not None
        if isinstance(node, Tensor):
            grads.add(node, g)
        elif node in kept:
            grads.add(kept[node], g)
        for parent, vjp in edges:
            if later is not None and type(parent) is Parameter:
                later.append(functools.partial(_deferred, grads, parent, vjp, g, node.op))
                continue
            dx = _checked(vjp(g), parent, node.op)
            flowing[parent] = flowing[parent] + dx if parent in flowing else dx
        if isinstance(node, Node):
            node.edges = None


def _seed(y: Tensor, dy: Array | None) -> Array:
    if dy is None:
        if y.size != 1:
            raise SpecError(f"backward of shape {y.shape} needs dy; only a scalar has the default 1")
        return np.ones_like(y.data)
    if np.shape(dy) != y.shape:
        raise SpecError(f"dy has shape {np.shape(dy)}, y has {y.shape}")
    return dy if hasattr(dy, "dtype") else np.asarray(dy, y.dtype)


def _deferred(grads: Gradients, leaf: Tensor, vjp: Vjp, g: Array, op: str) -> None:
    grads.add(leaf, _checked(vjp(g), leaf, op))


def _checked(dx: Array, parent: Node | Tensor, op: str) -> Array:
    if dx.shape != parent.shape:
        raise SpecError(f"the vjp of {op} returned {dx.shape} for an input of shape {parent.shape}")
    return dx


def _topological(y: Node | Tensor) -> list[Node | Tensor]:
    """Every node after all nodes it depends on; iterative (depth is unbounded) and deterministic (lists order it)."""
    order: list[Node | Tensor] = []
    seen: set[Node | Tensor] = set()
    stack: list[tuple[Node | Tensor, bool]] = [(y, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            if node.edges is None:
                raise SpecError(f"the graph under {node!r} was already used by an earlier backward")
            stack.append((node, True))
            stack.extend([(p, False) for p, _ in reversed(node.edges) if p not in seen])
    return order
