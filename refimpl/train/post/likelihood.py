"""Log-probabilities of tokens as differentiable functions of the logits: what every loss of this room is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.autograd import ops
from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array, data_of
from refimpl.layers.config import Config
from refimpl.layers.loss import IGNORE
from refimpl.model import ForCausalLM
from refimpl.train.data import Batch


def logits_of(c: Config, held: Mapping[str, Any], batch: Batch) -> Any:
    """Logits of a model that holds these weights, arrays or leaves.  batch (B, S) -> (B, S, V)."""
    model = ForCausalLM.from_weights(c, held)
    return model(model.inputs(**batch.inputs())).logits


def log_softmax(z: Any) -> Any:
    """z - log sum e^z over the last axis.  z (..., V) -> (..., V)."""
    e = z - data_of(z).max(axis=-1, keepdims=True)
    return e - ops.log(ops.sum(ops.exp(e), axis=-1, keepdims=True))


def log_sigmoid(x: Any) -> Any:
    """log 1 / (1 + e^-x), as the first of log softmax [x, 0]: no overflow, and slope 1/2 at 0.  x (*) -> (*)."""
    x = x[..., None]
    return log_softmax(ops.concat([x, np.zeros_like(data_of(x))]))[..., 0]


def counted(labels: Array) -> Array:
    """1 where a position foretells a label that counts, 0 at -100.  labels (B, S) -> (B, S-1)."""
    return labels[:, 1:] != IGNORE


def token_logp(logits: Any, labels: Array) -> Any:
    """log p(labels[:, i+1] | ..i), and 0 where that label is -100.  logits (B, S, V), labels (B, S) -> (B, S-1)."""
    require(logits.shape[:2] == labels.shape, f"logits {logits.shape} are not for labels {labels.shape}")
    counts = counted(labels)
    ids = np.where(counts, labels[:, 1:], 0)[..., None]
    return ops.take_along(log_softmax(logits[:, :-1]), ids)[..., 0] * counts.astype(logits.dtype)
