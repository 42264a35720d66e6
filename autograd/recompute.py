"""Recomputation: keep a segment's inputs instead of its insides, run it again in backward (R 3.2.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .nn_ops import once
from .tensor import Array, Parameter, Tensor, Vjp, backward, primitive


def recompute(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A pure function of arrays whose tape is rebuilt in backward: same value and gradients, memory of its inputs only.

    `fn(*arrays) -> y` must take every tensor it needs as an argument; weights too.
    """

    @primitive
    def segment(*args: Array) -> tuple[Array, tuple[Vjp | None, ...]]:
        @once
        def gradients(dy: Array) -> list[Array]:
            leaves = [Parameter(a) if _is_float(a) else a for a in args]
            y = fn(*leaves)
            grads = backward(y, dy) if isinstance(y, Tensor) else {}
            return [grads.get(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]

        def vjp(i: int) -> Vjp | None:
            def vjp_i(dy: Array) -> Array:
                g = gradients(dy)[i]
                return np.zeros_like(args[i]) if g is None else g

            return vjp_i if _is_float(args[i]) else None

        return fn(*args), tuple([vjp(i) for i in range(len(args))])

    return segment


def _is_float(a: Any) -> bool:
    return getattr(a, "dtype", None) is not None and a.dtype.kind == "f"
