"""Sliding window attention, which article 1 says lowers V3's use of memory (section 2, text), as a mask that MLA can run under.

What is outside the window is never looked at again, so a cache of `window` entries is enough: that is the saving. V3 attends to
everything and saves by the size of an entry instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array

from .distance import distances
from .marked import variant


@variant(
    "sliding_window",
    what="additive attention mask with a window",
    claims="a1-20 a1-21",
    source="Beltagy et al. 2020, section 3.1 (arXiv 2004.05150), backwards only",
    shape="B 1 S T",
    compare="exact",
)
def sliding_window(mask: Any, *, window: int) -> Array:
    """-inf for keys `window` places back and further: a query sees itself and the window - 1 before it.
    mask (B, 1, S, T) -> (B, 1, S, T).
    """
    require(window >= 1, f"variant.sliding_window: a window of {window} sees nothing")
    return np.where(distances(mask) >= window, mask.dtype.type(-np.inf), mask)
