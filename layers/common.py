"""Stages that are used around every block: embedding, norms, residual additions, the mask, the head (R 2.1, 4.2); and the
two bodies that many stages share, a norm and a linear layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd import nn_ops, ops
from refimpl.autograd.tensor import Array

from . import gemm
from .stage import stage


@stage("embed", what="token embeddings, the residual stream before layer 0", eq="R 2.1", shape="B S D")
def embed(tokens: Array, w: Any) -> Any:
    """x[b, s] = w[tokens[b, s]].  tokens (B, S) int, w (V, D) -> (B, S, D)."""
    return ops.take_rows(w, tokens)


def linear(x: Any, w: Any, b: Any = None) -> Any:
    """y = x wT (+ b).  x (B, S, D), w (F, D), b (F,) or None -> (B, S, F).

    The product is made by the kernel of the stage that runs (`gemm`).
    """
    return gemm.linear(x, w, b)


def rms_norm(x: Any, w: Any, *, eps: float) -> Any:
    """y = w x / sqrt(mean(x^2) + eps).  x (B, S, D), w (D,) -> (B, S, D)."""
    return nn_ops.rms_norm(x, w, eps=eps)


attn_norm = stage("attn_norm", what="input of attention", eq="R 4.2 (RMSNorm)", shape="B S D")(rms_norm)
ffn_norm = stage("ffn_norm", what="input of the feed-forward", eq="R 4.2 (RMSNorm)", shape="B S D")(rms_norm)
final_norm = stage("final_norm", what="input of the head, h^0", eq="R 4.2 (RMSNorm)", shape="B S D")(rms_norm)


def _add(x: Any, y: Any) -> Any:
    """x + y: the residual stream.  x (B, S, D), y (B, S, D) -> (B, S, D)."""
    return ops.add(x, y)


resid_mid = stage("resid_mid", what="residual stream after attention", eq="R fig. 2", shape="B S D")(_add)
resid = stage("resid", what="residual stream after the layer", eq="R fig. 2", shape="B S D")(_add)


@stage("logits", what="next-token logits", eq="R 2.2 (OutHead)", shape="B S V", compare="distribution")
def logits(x: Any, w: Any) -> Any:
    """x wT.  x (B, S, D), w (V, D) -> (B, S, V)."""
    return nn_ops.linear(x, w)


@stage(
    "mask",
    what="additive attention mask: who may see whom",
    eq="R 2.1.1 eq 10 (j <= t)",
    shape="B 1 S T",
    compare="exact",
)
def mask(
    positions: Array,
    valid: Array | None,
    documents: Array | None,
    key_documents: Array | None,
    *,
    past: int,
    dtype: Any,
) -> Array:
    """0 where query s may see key t, -inf elsewhere.  positions (B, S), valid (B, T), documents (B, S),
    key_documents (B, T) -> (B, 1, S, T) with T = past + S.

    A key is visible if it does not come later in the sequence (whatever the positions say: they only rotate), is not
    padding (valid 0), and belongs to the same document. Pre-training packs documents without separating them (R 4.1),
    fine-tuning separates them (R 5.1): both are a choice of `documents`. Real kernels never build this array, they skip
    blocks.
    """
    b, s = positions.shape
    seen = np.tri(s, past + s, past, dtype=bool, like=positions)[None].repeat(b, axis=0)  # (B, S, T)
    if valid is not None:
        seen &= (valid != 0)[:, None, :]
    if documents is not None:
        assert key_documents is not None
        seen &= key_documents[:, None, :] == documents[:, :, None]
    return np.where(seen, np.dtype(dtype).type(0), np.dtype(dtype).type(-np.inf))[:, None]
