"""FP16 mixed precision as a plan (Micikevicius et al. 2018, arXiv 1710.03740). Described in articles, not in V3.

Weights, stage outputs and, unlike under BF16, all their gradients are FP16 numbers: infinite from 65,520 on, zero below 3e-8. What
BF16's plan leaves in float32 stays there, masters and optimiser too. Gradients that small need a loss scale (`loss_scale.step`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.autograd import ops
from refimpl.autograd.tensor import Array, data_of
from refimpl.layers.precision import BF16, Plan, lookup
from refimpl.layers.stage import Stage


def to_half(x: Array) -> Array:
    """The nearest FP16 numbers, in x's own dtype.  x (*) -> (*)."""
    with np.errstate(over="ignore"):  # an infinity is what the loss scale looks for
        return x.astype(np.float16).astype(x.dtype)


class Half(Plan):
    """A plan whose format `fp16` rounds forward and backward."""

    def weight(self, name: str, w: Array) -> Array:
        """A weight as this plan holds it."""
        return self.gradient(name, super().weight(name, w))

    def gradient(self, name: str, g: Array) -> Array:
        """The gradient of a weight: in the weight's own format."""
        return to_half(g) if lookup(self.weights, name, "") == "fp16" else g

    def __call__(self, stage: Stage, run: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
        """As an observer of stages: round what comes out, and its gradient. Overflow is for the caller to allow (np.errstate)."""
        y = run(*args, **static)
        if self.format(stage.name) != "fp16" or data_of(y).dtype.kind != "f":
            return y
        return ops.cast(ops.cast(y, dtype=np.float16), dtype=data_of(y).dtype)


def _for_bf16(table: Any) -> Any:
    return tuple([(pattern, "fp16" if fmt == "bf16" else fmt) for pattern, fmt in table])


HALF = Half("fp16", BF16.dtype, _for_bf16(BF16.outputs), weights=_for_bf16(BF16.weights))
"""FP16 wherever the plan BF16 has bfloat16."""
