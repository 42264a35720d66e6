"""Logits that were recorded behind their softmax: log p = logits - lse(logits), or p, are compared as what they are.

Which they are is told by their rows alone, whose log-sum-exp is 0. They cannot be turned back, but the exact logits can be turned
likewise.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refimpl.autograd.tensor import Array

_NEAR = 0.1
"""How far a log-sum-exp of rounded log-probabilities may be from 0; of logits it is several units from it."""
_ROOM = 3.0
"""How much larger than logits log p may be: rounding moves a row by 0.9 u, so 3 of these and the logits' own are within 4 u."""
_VANISHED = -16.0
"""Where float16 has no p any more; float32 and bfloat16 lose it at -103."""


def as_logits(x: Array, exact: Array) -> Iterator[tuple[str, Array]]:
    """What to declare, and logits x (..., V) of it. exact (..., V): ours."""
    if not exact.ndim or not x.size or not np.isfinite(exact).all():
        return
    log_p = exact - _lse(exact)
    if _are_log_p(x):
        yield "logits are log-softmaxes: record them before it", _moved(x, log_p, log_p, exact)
    elif float(x.min()) >= 0 and bool((np.abs(x.sum(axis=-1, dtype=np.float64) - 1) < _NEAR).all()):
        known = np.where((x > 0) | (log_p > _VANISHED), x, np.exp(log_p))
        yield (
            "logits are softmax probabilities: record them before the softmax",
            _moved(np.log(known), log_p, np.ones_like(log_p), exact),
        )


def _are_log_p(x: Array) -> bool:
    """Of all rows, of which the first tells of most that are not."""
    rows = x.reshape(-1, x.shape[-1])
    return float(rows[0].max()) <= _NEAR and bool((np.abs(_lse(rows)) < _NEAR).all())


def _moved(log_p: Array, ours: Array, rounded: Array, exact: Array) -> Array:
    """The logits that are off as log p is. Where what was rounded is larger than they are, so are its roundings, which say nothing
    of a logit: one of ROOM times its row's size counts as one of its size. A constant of a row, as rounding the largest logit
    makes one, is what a softmax forgets.
    """
    off = log_p - ours
    off -= off.mean(axis=-1, keepdims=True)
    size, of = (np.linalg.norm(a, axis=-1, keepdims=True) for a in (exact, rounded))
    return np.asarray(exact + off * np.minimum(1, _ROOM * size / of))


def _lse(x: Array) -> Array:
    """log sum e^x of rows, as columns.  x (..., V) -> (..., 1)."""
    top = x.max(axis=-1, keepdims=True)
    return np.asarray(top + np.log(np.exp(x - top, dtype=np.float64).sum(axis=-1, keepdims=True)))
