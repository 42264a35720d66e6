"""A confidence threshold with hand-off (article 1, section 5, text): what one model is not sure of, another answers.

The article hands over to people and says neither what the score is nor where the threshold lies. Here the score is the
probability of the likeliest token; whether it means anything is what `calibration` measures.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd import nn_ops, ops
from refimpl.autograd.errors import require
from refimpl.autograd.ops import Result
from refimpl.autograd.tensor import Array, data_of, primitive

from .marked import variant


@variant(
    "confidence",
    what="probability of the likeliest token",
    claims="a1-58",
    source="Hendrycks and Gimpel 2017 (arXiv 1610.02136)",
    shape="B S",
)
def confidence(logits: Any) -> Any:
    """max_v softmax(logits)_v.  logits (B, S, V) -> (B, S)."""
    best: Array = data_of(logits).argmax(axis=-1)[..., None]
    return ops.take_along(nn_ops.softmax(logits), best)[..., 0]


@variant("handoff", what="logits of the model that answers", claims="a1-58", shape="B S V")
def handoff(first: Any, second: Any, confidence: Any, *, threshold: float) -> Any:
    """The first model's logits where its confidence reaches the threshold, else the second's; no gradient through the choice.
    first (B, S, V), second (B, S, V), confidence (B, S) -> (B, S, V).
    """
    require(0 <= threshold <= 1, f"variant.handoff: the threshold is a probability, not {threshold}")
    return _either(first, second, data_of(confidence)[..., None] >= threshold)


@primitive
def _either(a: Array, b: Array, first: Array) -> Result:
    """y = a where `first`, else b.  a (B, S, V), b (B, S, V), first (B, S, 1) -> y (B, S, V)."""

    def vjp_a(dy: Array) -> Array:
        return dy * first

    def vjp_b(dy: Array) -> Array:
        return dy * ~first

    return np.where(first, a, b), (vjp_a, vjp_b, None)
