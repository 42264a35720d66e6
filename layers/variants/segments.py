"""Segment recurrence with cached states (Transformer-XL): the named form of article 1's "recursive attention" (section 2, text).

A long text is read in segments. Each layer keeps its inputs of the tokens before, and its keys and values come from those and
from its own; its queries only from its own. What is kept is a constant: no gradient flows into an earlier segment, though the
weights learn from how they read the memory. V3's rotary scores depend on distances only, so Transformer-XL's relative encodings
have nothing to add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from refimpl.autograd import ops
from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array, data_of

from .marked import variant

Layer = Callable[[Any, Any], Any]
"""(memory (B, P, D) or None, x (B, S, D)) -> y (B, S, D). With MLA, whose `entries` of the memory are the cache `past` of x."""


@variant(
    "segment_memory",
    what="a layer's inputs that the next segment sees",
    claims="a1-18",
    source="Dai et al. 2019, section 3.2 (arXiv 1901.02860)",
    shape="B T D",
)
def segment_memory(memory: Array | None, x: Any, *, length: int) -> Array:
    """SG([memory; x]), the last `length` of them; a constant.  memory (B, P, D) or None, x (B, S, D) -> (B, T, D)."""
    require(length >= 0, f"variant.segment_memory: a memory of {length} tokens")
    held = data_of(x) if memory is None else ops.concat([memory, data_of(x)], axis=1)
    return held[:, max(held.shape[1] - length, 0) :]


def segment(
    layers: Sequence[Layer], memories: Sequence[Array | None], x: Any, *, length: int
) -> tuple[Any, list[Array]]:
    """One segment through all layers.  x (B, S, D) -> y (B, S, D), each layer's memory for the next segment."""
    after = []
    for layer, memory in zip(layers, memories, strict=True):
        after.append(segment_memory(memory, x, length=length))
        x = layer(memory, x)
    return x, after
