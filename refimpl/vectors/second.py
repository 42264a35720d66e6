"""A second computation of every vector, written differently from the stages: loops over single numbers for what a stage gives,
slopes of the forward pass for gradients. A vector that it contradicts is not written.

What is left of it in the index a reader can repeat: `dot`, the sum of all numbers, each times a weight that its place gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.conformance.stages import arguments
from refimpl.diff.lanes import Lane, Recorded
from refimpl.diff.program import replaced, standing
from refimpl.layers.fp8_parts import CODES, SCALE
from refimpl.layers.precision import FLOAT64
from refimpl.layers.stage import Call

from . import loops, loops_fp8
from . import loops_attention as attention
from . import loops_experts as experts
from .read_vectors import place_weights

STEP = 2.0**-14
"""Of a slope, of the size of what is moved: truncation and rounding both stay below 1e-10."""
_LINEAR = ("mla.q_a", "mla.kv_a", "mlp.gate", "mlp.up", "mlp.down", "shared.gate", "shared.up", "moe.shared")
_NORMS = ("attn_norm", "ffn_norm", "final_norm", "mla.q_a_norm", "mla.c_kv", "mtp.hnorm", "mtp.enorm", "mtp.norm")
SECOND: dict[str, Callable[..., Array]] = {
    **dict.fromkeys((*_LINEAR, "logits", "router.logits", "mtp.proj", "attn_out"), loops.linear),
    **dict.fromkeys(("mla.q", "mla.kv_b"), loops.by_head),
    **dict.fromkeys(_NORMS, loops.norm),
    **dict.fromkeys(("resid", "resid_mid", "moe.out"), loops.add),
    **dict.fromkeys(("mlp.act", "shared.act", "moe.act"), loops.swiglu),
    **dict.fromkeys(("moe.gate", "moe.up", "moe.down"), experts.grouped),
    **dict.fromkeys(("embed", "mtp.emb"), loops.looked_up),
    **dict.fromkeys(("cache.c_kv", "cache.k_rope", "cache.positions", "cache.documents"), loops.behind),
    **dict.fromkeys(("mtp.hidden", "mtp.positions", "mtp.valid", "mtp.documents"), loops.but_last),
    **dict.fromkeys(("mla.q_rope", "mla.k_rope"), attention.rotated),
    "cache.valid": loops.valid_behind,
    "mtp.cat": loops.beside,
    "mask": attention.mask,
    "mla.rope_tables": attention.rope_tables,
    "mla.scores": attention.scores,
    "mla.scores_absorbed": attention.scores_absorbed,
    "mla.probs": attention.softmax,
    "mla.ctx": attention.ctx,
    "mla.q_absorbed": attention.q_absorbed,
    "mla.ctx_latent": attention.ctx_latent,
    "mla.ctx_absorbed": attention.ctx_absorbed,
    "router.scores": experts.router_scores,
    "router.choice": experts.choice,
    "router.group_scores": experts.group_scores,
    "router.groups": experts.groups,
    "router.ids": experts.ids,
    "router.weights": experts.router_weights,
    "router.counts": experts.counts,
    "router.bias_update": experts.bias_update,
    "moe.rows": experts.dispatched,
    "moe.routed": experts.combined,
    "loss.main": loops.loss_main,
    "loss.mtp": loops.loss_mtp,
    "loss.total": loops.loss_total,
    "loss.seq_aux": experts.seq_aux,
    "optim.grad_norm": loops.grad_norm,
    "optim.clip": loops.clip,
    "optim.exp_avg": loops.exp_avg,
    "optim.exp_avg_sq": loops.exp_avg_sq,
    "optim.step": loops.adamw,
}
"""Stage -> the same, written differently; takes its arguments by name."""


def second(call: Call, r: Recorded) -> tuple[str, Array | float]:
    """How, and the output again; of a gradient its `dot`."""
    if call.tap.startswith(("bwd/", "grad/")):
        return "slope", slope(call, r)
    inputs, settings = arguments(call, r, FLOAT64)
    given = list(inputs.values())
    if call.stage in (SCALE, CODES):
        return "loops", loops_fp8.PARTS[call.stage](*given, **settings)
    if "how" in settings:
        given, settings = loops_fp8.as_numbers(given, settings)
    return "loops", SECOND[call.stage](*given, **settings)


def slope(call: Call, r: Recorded) -> float:
    """d/dt of what the readers of a tap make of it, weighted by their outputs' gradients, the tap moved by t times the place
    weights: central differences of fourth order.
    """
    lane, name = Lane(FLOAT64), call.static["name"]
    given = [lane.value(a, call, r) for a in call.args]
    parts: list[float] = []
    for reader, values in zip(call.static["readers"], given, strict=True):
        n = len(reader.args)
        parts.append(_slope(reader, values[:n], values[n], name))
    return math.fsum(parts)


def _slope(reader: Call, values: tuple[Any, ...], dy: Any, name: str) -> float:
    moved = next(standing(reader.args, values, name))
    finite = moved[np.isfinite(moved)]
    size = math.sqrt(float(np.mean(finite * finite))) or 1.0
    direction = place_weights(moved.size).reshape(moved.shape)

    def at(t: float) -> float:
        y = reader.of.fn(*replaced(reader.args, values, name, lambda v: v + t * direction), **reader.static)
        return math.fsum(np.ravel(np.where(np.isfinite(y), y, 0) * dy).tolist())

    h = STEP * size
    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
