"""INT8 quantisation-aware training (Jacob et al. 2018, arXiv 1712.05877) as a precision plan. Described in articles, not in V3.

Forward, the linear layers see activations on an INT8 grid with a scale per token and weights on one with a scale per output;
backward, the rounding is passed straight through (Bengio et al. 2013, arXiv 1308.3432). Masters stay float32:
`Recipe(plan=INT8_QAT)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.gemm import PLAIN
from refimpl.layers.neighbours import amax_scale, fake_quant
from refimpl.layers.precision import Plan


def on_grid(x: Any, bits: int) -> Any:
    """x on the integer grid of its rows.  x (..., D) -> (..., D); dx = dy: the largest entry sets the scale, so none is clipped."""
    return fake_quant.fn(x, amax_scale.fn(x, bits=bits), bits=bits)


@dataclass(frozen=True)
class FakeInt8:
    """The kernel of a linear layer whose two operands are on integer grids of `bits` bits."""

    bits: int = 8

    def linear(self, x: Any, w: Any, b: Any) -> Any:
        """y = q(x) q(w)T + b.  x (..., D), w (F, D), b (F,) or None -> y (..., F)."""
        return PLAIN.linear(on_grid(x, self.bits), on_grid(w, self.bits), b)

    def grouped_linear(self, rows: Any, ids: Array, *ws: Any) -> Any:
        """y[m] = q(rows[m]) q(w_e(m))T.  rows (M, D) sorted by expert, ids (..., K), E times w (F, D) -> y (M, F)."""
        return PLAIN.grouped_linear(on_grid(rows, self.bits), ids, *[on_grid(w, self.bits) for w in ws])

    def swiglu(self, gate: Any, up: Any) -> Any:
        """silu(gate) up, not quantised.  gate (*), up (*) -> (*)."""
        return PLAIN.swiglu(gate, up)


_LINEAR = ("attn_out", "mla.q_a", "mla.q", "mla.kv_a", "mla.kv_b", "mlp.*", "shared.*", "moe.*")
"""The products that V3 makes in FP8; embedding, head, router, norms and attention cores stay as they are."""


def int_plan(bits: int = 8) -> Plan:
    """Linear layers on grids of `bits` bits, everything else in float32."""
    return Plan(f"int{bits}-qat", np.float32, gemms=tuple([(stage, FakeInt8(bits)) for stage in _LINEAR]))


INT8_QAT = int_plan()
