"""Two-stage progressive routing: a coarse softmax, then a refinement by the expert (article 4, section 2.1, text and code).

As printed, every expert has a gate, the softmax runs over all of them, every expert refines its own share and all results are
summed: nothing is selected, so the cost is that of a dense model. What an expert's refinement is, the code leaves open; here it
is a second vector of the expert's own, whose sigmoid may only lower the share. Choosing by the coarse shares (`router.ids`) and
weighting by the refined ones (`router.weights`) makes it routing.
"""

from __future__ import annotations

from typing import Any

from refimpl.autograd import nn_ops

from .marked import variant


@variant("coarse", what="coarse shares of all experts", claims="a4-17 a4-18", shape="B S E")
def coarse(x: Any, w: Any) -> Any:
    """c = softmax over the experts of each one's gate, x w_e.  x (B, S, D), w (E, D) -> (B, S, E)."""
    return nn_ops.softmax(nn_ops.linear(x, w))


@variant("refined", what="shares after the experts' refinement", claims="a4-17 a4-18", shape="B S E")
def refined(x: Any, c: Any, w: Any) -> Any:
    """r_e = c_e sigmoid(x w_e); they no longer sum to 1.  x (B, S, D), c (B, S, E), w (E, D) -> (B, S, E)."""
    return c * nn_ops.sigmoid(nn_ops.linear(x, w))
