"""Precision plans: tables over stages that say how each stage's output is rounded. Rounding happens there and
nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from refimpl.autograd import ops
from refimpl.autograd.errors import SpecError
from refimpl.autograd.tensor import Array, data_of

from .numerics.rounding import to_bf16
from .stage import Stage

ROUND: dict[str, Callable[[Array], Array]] = {"bf16": to_bf16}
"""Format name -> rounding; a format that is absent here (fp32) leaves values alone."""


def rounded(x: Any, fmt: str) -> Any:
    """x in a format; integers and formats without a rounding pass. The gradient goes straight through.  x (*) ->
    (*).
    """
    to = ROUND.get(fmt)
    return x if to is None or data_of(x).dtype.kind != "f" else ops.round_through(x, to=to)


@dataclass(frozen=True)
class Plan:
    """`dtype` carries the values; `table` maps stage patterns to formats, the first match counts, no match: no
    rounding.
    """

    name: str
    dtype: Any
    weights: str
    table: tuple[tuple[str, str], ...] = ()

    def format(self, stage: str) -> str:
        """The format of a stage's output: `fp64`, `fp32` or a key of ROUND."""
        plain = "fp64" if np.dtype(self.dtype).itemsize == 8 else "fp32"
        return next((f for pattern, f in self.table if fnmatchcase(stage, pattern)), plain)

    def weight(self, name: str, w: Array) -> Array:
        """A weight as this plan holds it; the balancing bias is never rounded (R 3.3.1: kept in higher precision)."""
        w = w if w.dtype == self.dtype else w.astype(self.dtype)
        return ROUND[self.weights](w) if self.weights in ROUND and not name.endswith("_bias") else w

    def __call__(self, stage: Stage, run: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
        """As an observer of stages: round what comes out."""
        return rounded(run(*args, **static), self.format(stage.name))


FLOAT64 = Plan("float64", np.float64, "fp64")
"""Truth."""
FLOAT32 = Plan("float32", np.float32, "fp32")
"""Every stage in float32."""
BF16 = Plan(
    "bf16",
    np.float32,
    "bf16",
    (
        ("mask", "fp32"),
        ("mla.rope_tables", "fp32"),
        ("router.*", "fp32"),
        ("mla.scores*", "fp32"),
        ("loss.*", "fp32"),
        ("*", "bf16"),
    ),
)
"""bfloat16 weights and stage outputs; rope tables, router, attention scores and losses in float32 (R 3.3.1,
semantics of DeepSeek's V3.2 inference code)."""
PLANS = {p.name: p for p in (FLOAT64, FLOAT32, BF16)}
"""Plan by name."""


def plan(name: str) -> Plan:
    """The plan of this name; SpecError lists them."""
    if name not in PLANS:
        raise SpecError(f"precision {name!r}; known: {', '.join(PLANS)}")
    return PLANS[name]
