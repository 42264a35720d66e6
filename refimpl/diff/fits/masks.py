"""Who sees whom: a window of keys that nobody asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import STAGES

from ..corpus import Mutant
from ..wide import MASKED
from .evidence import Evidence, guess


def window(ev: Evidence) -> Iterator[Mutant]:
    """Keys further back than a number of places are hidden, in scores or in the mask."""
    name = ev.call.stage
    if name not in ("mask", "mla.scores", "mla.scores_absorbed") or not ev.whole:
        return
    queries, keys = ev.e.shape[-2:]
    back = np.arange(queries)[:, None] + keys - queries - np.arange(keys)
    seen = ((ev.x > MASKED) & (ev.e > MASKED)).any(axis=tuple(range(ev.e.ndim - 2)))
    if not seen.any():
        return
    furthest = int(back[seen].max())

    def fn(*args: Any, **static: Any) -> Array:
        return np.where(back <= furthest, STAGES[name].fn(*args, **static), -np.inf)

    yield guess(f"keys more than {furthest} places back are masked", name, fn)
