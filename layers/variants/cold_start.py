"""A cold start of the experts: 2 at first, then more and more until all are there (article 2, section 1.1, text).

The article gives no schedule; here the number grows in equal steps. A locked expert's logit is -inf, so that its affinity is 0,
it is chosen by none and learns nothing: in V3's terms its bias would have to catch up from the first step on which it is there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd import ops
from refimpl.autograd.errors import require
from refimpl.autograd.tensor import data_of

from .marked import variant


def unlocked(step: int, *, n_experts: int, steps: int, start: int = 2) -> int:
    """How many experts there are at a step: `start` at step 0, all from step `steps` on, never fewer than before."""
    require(
        0 < start <= n_experts and steps > 0 and step >= 0,
        f"cold start: {start} of {n_experts}, {step} of {steps} steps",
    )
    return start + (n_experts - start) * min(step, steps) // steps


@variant(
    "cold_start", what="affinities before the sigmoid, of the experts unlocked so far", claims="a2-08", shape="B S E"
)
def cold_start(z: Any, *, step: int, steps: int, start: int = 2, k: int = 2) -> Any:
    """z, and -inf for experts that are still locked, the last ones first; k are chosen, so k must be there.
    z (B, S, E) -> (B, S, E).
    """
    there = unlocked(step, n_experts=z.shape[-1], steps=steps, start=start)
    require(there >= k, f"variant.cold_start: {k} experts a token, but only {there} unlocked at step {step}")
    locked = np.arange(z.shape[-1], like=data_of(z)) >= there
    return ops.add(z, np.where(locked, z.dtype.type(-np.inf), z.dtype.type(0)))
