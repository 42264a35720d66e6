"""What a task loses: cross-entropy of an answer's tokens, or the squared error of a number read off one position."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd import nn_ops, ops
from refimpl.autograd.tensor import Array
from refimpl.layers.loss import IGNORE


def cross_entropy(logits: Any, labels: Array, *, count: int) -> Any:
    """- sum log p(labels[:, i+1] | ..i) / count over labels that are not -100.  logits (B, S, V), labels (B, S) -> ()."""
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    return nn_ops.nll(rows, labels[:, 1:].reshape(-1), denominator=float(count))


def regression(hidden: Any, targets: Array, w: Any, b: Any, *, count: int) -> Any:
    """sum (h w + b - target)^2 / count over positions whose target is a number, not NaN.  hidden (B, S, D) after the final norm,
    targets (B, S), w (D,), b () -> ().
    """
    at = np.flatnonzero(~np.isnan(targets))
    off = predictions(hidden, at, w, b) - targets.reshape(-1)[at].astype(hidden.dtype)
    return ops.sum(off * off) / float(count)


def predictions(hidden: Any, at: Array, w: Any, b: Any) -> Any:
    """h w + b at positions `at` (N,) of the B S positions.  hidden (B, S, D), w (D,), b () -> (N,)."""
    rows = ops.take_rows(hidden.reshape(-1, hidden.shape[-1]), at)
    return ops.sum(rows * w, axis=-1) + b


def counted(labels: Array, targets: Array) -> int:
    """Over how much a task's loss is a mean: its labels that count, or its numbers.  labels, targets (B, S)."""
    return int(np.sum(labels[:, 1:] != IGNORE) + np.sum(~np.isnan(targets)))
