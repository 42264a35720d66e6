"""Cross-entropy of the main model and of the MTP modules (R eqs 24-25). Labels are shifted inside; -100 is ignored."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd import nn_ops
from refimpl.autograd.tensor import Array

from .stage import stage

IGNORE = -100
"""The label that does not count."""


@stage("loss.main", what="next-token cross-entropy", eq="R 2.2 (next-token cross-entropy)", shape="")
def main(logits: Any, labels: Array) -> Any:
    """Mean of -log p(labels[:, i+1] | ..i) over labels that count.  logits (B, S, V), labels (B, S) int -> ()."""
    return nn_ops.nll(_rows(logits), labels[:, 1:].reshape(-1))


@stage("loss.mtp", what="cross-entropy of one MTP module", eq="R eq 24", shape="", tap="mtp.loss")
def mtp(logits: Any, labels: Array, *, depth: int, mean: str) -> Any:
    """L^k: -log p^k(labels[:, i+k+1]) summed, over the number of main labels ("length") or of its own ("valid").
    logits (B, S-k, V), labels (B, S) int -> ().
    """
    denominator = None if mean == "valid" else float(max(np.sum(labels[:, 1:] != IGNORE), 1))
    return nn_ops.nll(_rows(logits), labels[:, depth + 1 :].reshape(-1), denominator=denominator)


@stage("loss.total", what="what is minimised", eq="R eq 25 and 17", shape="")
def total(main: Any, mtp: tuple[Any, ...], aux: tuple[Any, ...], *, mtp_weight: float) -> Any:
    """main + mtp_weight mean_k L^k + sum of the layers' balance losses (all scalars) -> ()."""
    for part in mtp:
        main = main + part * (mtp_weight / len(mtp))
    for part in aux:
        main = main + part
    return main


def _rows(logits: Any) -> Any:
    """All but the last position, as rows: (B, S, V) -> (B (S-1), V)."""
    return logits[:, :-1].reshape(-1, logits.shape[-1])
