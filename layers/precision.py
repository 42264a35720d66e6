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
from refimpl.autograd.tensor import Array, Tensor, data_of
from refimpl.layers.numerics.formats import E5M6, to_bf16

from .fp8 import FREE_POWER_OF_TWO, POWER_OF_TWO, Fp8
from .gemm import PLAIN, Kernel, using
from .stage import STAGES, Stage

ROUND: dict[str, Callable[[Array], Array]] = {"bf16": to_bf16}
"""Format name -> rounding; a format that is absent here (fp32) leaves values alone."""


def rounded(x: Any, fmt: str) -> Any:
    """x in a format; integers and formats without a rounding pass. The gradient goes straight through.  x (*) -> (*)."""
    to = ROUND.get(fmt)
    if to is None or data_of(x).dtype.kind != "f":
        return x
    y = ops.round_through(x, to=to)
    if isinstance(x, Tensor) and (saved := x.saved):
        y.saved = lambda: to(saved())
    return y


Table = tuple[tuple[str, Any], ...]
"""(pattern, value) pairs; the first pattern that matches a name counts."""


def lookup(table: Table, name: str, default: Any) -> Any:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in table if fnmatchcase(name, pattern)), default)


@dataclass(frozen=True)
class Plan:
    """`dtype` carries the values; `outputs` maps stages to the format of their output, `gemms` stages to the kernel of their
    matrix product, `weights` checkpoint names to the format a weight is held in. What no pattern matches is left alone.
    """

    name: str
    dtype: Any
    outputs: Table = ()
    gemms: Table = ()
    weights: Table = ()

    def format(self, stage: str) -> str:
        """The format of a stage's output: `fp64`, `fp32` or a key of ROUND."""
        fmt: str = lookup(self.outputs, stage, "fp64" if np.dtype(self.dtype).itemsize == 8 else "fp32")
        return fmt

    def kernel(self, stage: str) -> Kernel:
        """The kernel of a stage's matrix product."""
        kernel: Kernel = lookup(self.gemms, stage, PLAIN)
        return kernel

    def weight(self, name: str, w: Array) -> Array:
        """A weight as this plan holds it."""
        to = ROUND.get(lookup(self.weights, name, ""))
        w = w if w.dtype == self.dtype else w.astype(self.dtype)
        return to(w) if to else w

    def watches(self, stage: str) -> bool:
        """Whether a stage is another one under this plan than without."""
        return self.format(stage) not in ("fp32", "fp64") or self.kernel(stage) is not PLAIN

    def __call__(self, stage: Stage, run: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
        """As an observer of stages: choose the kernel, round what comes out."""
        with using(self.kernel(stage.name)):
            return rounded(run(*args, **static), self.format(stage.name))


FLOAT64 = Plan("float64", np.float64)
"""Truth."""
FLOAT32 = Plan("float32", np.float32)
"""Every stage in float32."""

_KEPT: Table = tuple(
    (pattern, "fp32")
    for pattern in ("mask", "mla.rope_tables", "router.*", "mla.scores*", "loss.*", "cache.positions", "optim.*")
)
_BF16_WEIGHTS: Table = (("*e_score_correction_bias", "fp32"), ("*", "bf16"))
BF16 = Plan("bf16", np.float32, (*_KEPT, ("*", "bf16")), weights=_BF16_WEIGHTS)
"""bfloat16 weights and stage outputs; rope tables, router, attention scores and losses in float32 (R 3.3.1, and DeepSeek's
V3.2 inference code)."""


def fp8_plan(name: str = "fp8", **kernel: Any) -> Plan:
    """The report's FP8 recipe on top of BF16 (R 3.3): which products, in which tiles, what waits for backward in which format.

    `kernel` goes to every `Fp8`: another `mode` (accumulation), another `gradient_tile`. Embedding, head, router, norms,
    attention and the MTP projection stay in bf16; weights of FP8 products are quantised from their float32 masters.
    """

    def gemm(**more: Any) -> Fp8:
        return Fp8(**(more | kernel))

    gemms: Table = (
        ("attn_out", gemm(inputs=POWER_OF_TWO, kept=E5M6)),  # R 3.3.3, special case (1)
        ("moe.gate", gemm(inputs=POWER_OF_TWO)),  # what dispatch sends
        ("moe.up", gemm(inputs=POWER_OF_TWO)),
        ("moe.act", gemm(recompute=True)),  # R 3.3.3, special case (2)
        ("shared.act", gemm(recompute=True)),
        ("moe.down", gemm(gradients=FREE_POWER_OF_TWO)),  # what dispatch sends in backward
        *[
            (pattern, gemm())
            for pattern in (
                "mla.q_a",
                "mla.q",
                "mla.kv_a",
                "mla.kv_b",
                "mlp.gate",
                "mlp.up",
                "mlp.down",
                "shared.*",
                "moe.shared",
            )
        ],
    )
    weights: Table = (("*eh_proj.weight", "bf16"), ("*_proj*.weight", "fp32"), *_BF16_WEIGHTS)
    return Plan(name, np.float32, BF16.outputs, gemms, weights)


FP8 = fp8_plan()
"""The recipe with exact accumulation."""
FP8_HOPPER = fp8_plan("fp8_hopper", mode="deepgemm_sm90")
"""The recipe on Hopper's tensor cores, promoted every 128 terms, bit for bit."""
FP8_UE8M0 = fp8_plan("fp8_ue8m0", inputs=POWER_OF_TWO, gradients=FREE_POWER_OF_TWO, weights=FREE_POWER_OF_TWO)
"""The recipe with every scale a power of two: DeepSeek-V3.1's `scale_fmt`."""
PLANS = {p.name: p for p in (FLOAT64, FLOAT32, BF16, FP8, FP8_HOPPER, FP8_UE8M0)}
"""Plan by name."""


def plan(name: str) -> Plan:
    """The plan of this name; SpecError lists them."""
    if name not in PLANS:
        raise SpecError(f"precision {name!r}; known: {', '.join(PLANS)}")
    return PLANS[name]


def describe(p: Plan) -> list[str]:
    """The plan as a table: every stage, the format of its output, the arithmetic of its product; then how weights are held."""
    rows = [f"{'stage':<22}{'output':<8}product", *[_row(p, name) for name in STAGES]]
    held = ", ".join(f"{pattern} {fmt}" for pattern, fmt in p.weights) or f"* {np.dtype(p.dtype).name}"
    return [f"plan {p.name}, values in {np.dtype(p.dtype).name}", "", *rows, "", f"weights: {held}"]


def _row(p: Plan, stage: str) -> str:
    kernel = p.kernel(stage)
    product = kernel.describe() if isinstance(kernel, Fp8) else ""
    return f"{stage:<22}{p.format(stage):<8}{product}".rstrip()
