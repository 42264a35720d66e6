"""What tensor-parallel ranks of an engine hold of one tensor, put together: by the names that SGLang and vLLM give their modules.

A product by columns (q_b_proj, gate_up_proj, ...) leaves each rank its heads or channels, one after the other; a product by rows
(o_proj, down_proj) a part of a sum, until the all-reduce, which different versions take at different places. So where all ranks
hold the same bits, that is the whole; parts of a sum, or of other heads, never are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers.stage import STAGES

from .tapmap import Part

How = Literal["whole", "replicas", "columns", "heads", "halves", "sum"]
_OUTPUTS: dict[str, How] = dict.fromkeys(("q_b_proj", "q_proj", "kv_b_proj"), "columns")
_OUTPUTS |= dict.fromkeys(("o_proj", "down_proj", "mlp", "shared_experts", "experts"), "sum")
_OUTPUTS |= {"gate_up_proj": "halves"}
_INPUTS: dict[str, How] = dict.fromkeys(("o_proj", "down_proj"), "columns")
_SUMS = ("attn_out", "ffn_out", "mlp.down", "moe.down", "moe.routed", "moe.shared")
"""Taps that come out of a product by rows."""


def how_of(part: Part) -> How:
    """How ranks share what a module was given or gives, if they do not all hold it."""
    name = part.path.rpartition(".")[2]
    if part.input:
        return _INPUTS.get(name, "replicas")
    if name == "rotary_emb":
        return "heads" if part.item == "0" else "replicas"  # k has one head, which all hold
    if re.search(r"(^|\.)layers\.\d+$", part.path):
        return "sum" if part.item == "0" else "replicas"  # what its feed-forward gave; the residual
    return _OUTPUTS.get(name, "replicas")


def how_of_tap(tap: str) -> tuple[How, int]:
    """How ranks share what was dumped under a tap's name, and along which axis, counted from the last."""
    axes = next((s.shape.split() for s in STAGES.values() if s.tap == tap), [])
    if tap in _SUMS:
        return "sum", -1
    shared = next((a for a in ("H", "F") if a in axes), None)
    return ("columns", axes.index(shared) - len(axes)) if shared else ("replicas", -1)


def together(parts: Sequence[Array], how: How, axis: int = -1) -> tuple[Array, How]:
    """The tensor whose parts the ranks hold, lowest first, and how it was made. SpecError for parts that do not fit together."""
    first = parts[0]
    if all(p.shape == first.shape and p.tobytes() == first.tobytes() for p in parts[1:]):
        return first, "whole"
    shapes = " and ".join(map(str, dict.fromkeys(p.shape for p in parts)))
    require(len({(p.ndim, p.dtype) for p in parts}) == 1, f"ranks hold shapes {shapes}, or several dtypes")
    if how == "replicas":
        return first, "replicas"
    if how == "sum":
        require(len({p.shape for p in parts}) == 1, f"ranks hold shapes {shapes}, which are to be added")
        total = np.sum([p.astype(np.result_type(np.float32, p.dtype)) for p in parts], axis=0)
        return total.astype(first.dtype), "sum"
    axis = -2 if how == "heads" and first.ndim > 2 else axis
    require(-axis <= first.ndim, f"ranks hold shapes {shapes}, too few axes")
    rest = {p.shape[:axis] + p.shape[p.ndim + axis + 1 :] for p in parts}
    require(len(rest) == 1, f"ranks hold shapes {shapes}, which do not fit together along axis {axis}")
    if how == "halves":
        return np.concatenate([half for i in range(2) for half in [np.split(p, 2, -1)[i] for p in parts]], -1), "halves"
    return np.concatenate(parts, axis), how
