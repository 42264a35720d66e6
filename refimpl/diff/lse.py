"""The log-sum-exp of every query's scores, which a fused kernel gives beside its output: a tap of its own where it was recorded.

Kernels that merge parts of a sequence keep it, in natural units or, as FlashInfer does, in those of base 2; some keep it in the
units of the products before they are scaled. The scores behind it are never rounded, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call, Stage

LSE = "mla.lse"
LN2 = float(np.log(2))


def _lse(s: Array) -> Array:
    """log sum_t e^s over the keys; -inf for a query that sees none.  s (B, H, S, T) -> (B, S, H)."""
    top = s.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        y = np.log(np.exp(s - top).sum(axis=-1)) + top[..., 0]
    return np.asarray(y.swapaxes(1, 2))


STAGE = Stage(
    LSE, _lse, "log-sum-exp of every query's scores", "R eq 10, the softmax's denominator", "value", "B S H", LSE
)


def with_lse(program: list[Call], recorded: Collection[str]) -> list[Call]:
    """The program with a call for the log-sum-exp behind the scores of every layer where it was recorded."""
    found: list[Call] = []
    for call in program:
        found.append(call)
        tap = call.tap.removesuffix("mla.scores") + LSE
        if call.tap.endswith("/mla.scores") and call.own is None and tap in recorded:
            found.append(Call(LSE, tap, (call.tap,), {}, STAGE))
    return found


def in_other_units(x: Array, scale: float) -> list[tuple[str, Array]]:
    """What to declare, and the tap in natural units of scaled scores."""
    two, raw = "log-sum-exp to base 2", "log-sum-exp divided by the softmax scale"
    kind = x.dtype.type
    return [
        (two, x * kind(LN2)),
        (raw, x * kind(scale)),
        (f"{two}, divided by the softmax scale", x * kind(LN2 * scale)),
    ]
