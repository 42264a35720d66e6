"""The mean of the chosen experts: what article 4 prints as the routing of version 2.0 (section 1.1, code).

The code sums what the top 2 experts make of the input and divides by their number: the gate's scores say who, and not how much,
and the gate has no gradient. As printed it runs for one token only: with more, an expert is looked up by a row of numbers,
which is the name of none.
"""

from __future__ import annotations

from typing import Any

from refimpl.autograd.tensor import Array
from refimpl.layers.moe import routed

from .marked import variant


@variant("mean_of_chosen", what="mean of the chosen experts", claims="a4-06", shape="B S D")
def mean_of_chosen(down: Any, ids: Array) -> Any:
    """1/K sum_k FFN_k(x), in place of `moe.routed`.  down (M, D), ids (B, S, K) -> (B, S, D)."""
    return routed.fn(down, ids, None) / ids.shape[-1]
