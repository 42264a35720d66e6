"""Rows of different lengths as one array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.autograd.tensor import Array


def padded(rows: Sequence[Array]) -> tuple[Array, Array]:
    """Rows (S_b, ...) side by side, zeros behind the short ones; 1 where a row has an entry.  -> (B, S, ...), (B, S) int."""
    size = np.array([len(r) for r in rows])
    out = np.zeros((len(rows), size.max(), *rows[0].shape[1:]), rows[0].dtype)
    for b, r in enumerate(rows):
        out[b, : len(r)] = r
    return out, (np.arange(size.max()) < size[:, None]).astype(np.int64)
