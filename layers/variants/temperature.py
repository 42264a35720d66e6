"""A gate with a temperature: what article 2 prints under the title of Gumbel-softmax (section 1.1, code).

There is no noise in the printed code and no load. A softmax of logits over a positive temperature keeps their order, so the two
experts that are taken next are the same at any temperature; only their weights are sharper or flatter. The code breaks off
there.
"""

from __future__ import annotations

from typing import Any

from refimpl.autograd import nn_ops
from refimpl.autograd.errors import require

from .marked import variant


@variant("temperature", what="affinities by a softmax over a temperature", claims="a2-07", shape="B S E")
def temperature(z: Any, *, tau: float) -> Any:
    """softmax(z / tau), then V3's own choice and weights (`router.ids`, `router.weights`).  z (B, S, E) -> (B, S, E)."""
    require(tau > 0, f"variant.temperature: tau must be positive, not {tau}")
    return nn_ops.softmax(z / tau)
