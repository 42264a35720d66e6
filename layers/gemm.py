"""The seam between a stage and the arithmetic of its matrix product.

Stages call `linear` and `grouped_linear` from here. Which kernel runs is the precision plan's choice for the stage that
is running; without a plan it is the plain product. Router, head, norms and attention cores do not come here: they stay
in higher precision (R 3.3.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from refimpl.autograd import expert_ops, nn_ops
from refimpl.autograd.tensor import Array


class Kernel(Protocol):
    """The three products of a linear layer, forward and both gradients, in some arithmetic."""

    def linear(self, x: Any, w: Any, b: Any) -> Any:
        """y = x wT + b.  x (..., D), w (F, D), b (F,) or None -> y (..., F)."""

    def grouped_linear(self, rows: Any, ids: Array, *ws: Any) -> Any:
        """y[m] = rows[m] w_e(m)T.  rows (M, D) sorted by expert, ids (..., K), E times w (F, D) -> y (M, F)."""

    def swiglu(self, gate: Any, up: Any) -> Any:
        """silu(gate) up, with what the kernel keeps of its inputs for backward.  gate (*), up (*) -> (*)."""


class Plain:
    """The product as NumPy's BLAS makes it."""

    linear = staticmethod(nn_ops.linear)
    grouped_linear = staticmethod(expert_ops.grouped_linear)
    swiglu = staticmethod(nn_ops.swiglu)


PLAIN: Kernel = Plain()
_kernel: ContextVar[Kernel] = ContextVar("kernel", default=PLAIN)


@contextmanager
def using(kernel: Kernel) -> Iterator[None]:
    """Run the stage inside with this kernel."""
    token = _kernel.set(kernel)
    try:
        yield
    finally:
        _kernel.reset(token)


def linear(x: Any, w: Any, b: Any = None) -> Any:
    """y = x wT (+ b) by the kernel in force.  x (..., D), w (F, D), b (F,) or None -> y (..., F)."""
    return _kernel.get().linear(x, w, b)


def grouped_linear(rows: Any, ids: Array, *ws: Any) -> Any:
    """y[m] = rows[m] w_e(m)T by the kernel in force.  rows (M, D), ids (..., K), E times w (F, D) -> y (M, F)."""
    return _kernel.get().grouped_linear(rows, ids, *ws)


def swiglu(gate: Any, up: Any) -> Any:
    """silu(gate) up by the kernel in force.  gate (*), up (*) -> (*)."""
    return _kernel.get().swiglu(gate, up)
