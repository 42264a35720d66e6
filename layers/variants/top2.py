"""Top-2 gates by mask: with ones, as article 1 prints it (section 1, code), and repaired, with probabilities.

The printed router asks for the two largest logits, puts ones at their places and divides by the number of ones. What is largest
decides who is in and is then forgotten (the values that topk returns, logits called probabilities, are not used): both experts
get 1/2, and nothing depends on the logits any more, so the gate cannot learn. (Its scatter along axis 1 is right for rows (N,
E) only.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd import nn_ops, ops
from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array, data_of
from refimpl.layers.router import top_k

from .marked import variant


def among_best(z: Array, k: int) -> Array:
    """Whether an expert is among the k best of its token.  z (..., E) -> (..., E) bool."""
    require(0 < k <= z.shape[-1], f"the best {k} of {z.shape[-1]} experts were asked for")
    return (top_k(z, k)[..., None] == np.arange(z.shape[-1], like=z)).any(axis=-2)


@variant("top2_ones", what="gate of ones over their number", claims="a1-11 a3-07", shape="B S E")
def top2_ones(z: Any, *, k: int = 2) -> Array:
    """m / sum m with m = 1 at the k largest logits, so 1/k each whatever they are; no gradient.  z (B, S, E) -> (B, S, E)."""
    z = data_of(z)
    m = among_best(z, k).astype(z.dtype)
    return m / m.sum(axis=-1, keepdims=True)


@variant(
    "top2_renormalised",
    what="gate of probabilities, renormalised over the best",
    claims="a1-11 a3-07",
    source="Shazeer et al. 2017, eqs 3-5 (arXiv 1701.06538), without its noise",
    shape="B S E",
)
def top2_renormalised(z: Any, *, k: int = 2) -> Any:
    """p m / sum p m with p = softmax(z) and m = 1 at the k largest; the repaired form, which learns.  z (B, S, E) -> (B, S, E)."""
    kept = nn_ops.softmax(z) * among_best(data_of(z), k).astype(z.dtype)
    return kept / ops.sum(kept, axis=-1, keepdims=True)
