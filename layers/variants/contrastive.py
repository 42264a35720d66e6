"""A CLIP-style head over features of images and of texts, which article 3 adds to V3 (section 3.3, text and code).

The printed code never calls V3. It takes a softmax over the texts of one image, and there is one text: the answer is 1 for any
image and any text. It does not normalise the features either, which CLIP's own logits are made of. In training a batch is its
own set of wrong answers: every image must find its text among all, every text its image.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.autograd import nn_ops, ops
from refimpl.autograd.errors import require
from refimpl.autograd.tensor import data_of

from .marked import variant

_CLIP = "Radford et al. 2021, figure 3 (arXiv 2103.00020)"
FIRST = math.log(1 / 0.07)
"""The learned scale at the start of training, as a logarithm (section 2.5)."""
MOST = math.log(100)
"""More than 100 the logits are never scaled by (section 2.5)."""


def unit_rows(x: Any) -> Any:
    """x / |x| per row.  x (B, D) -> (B, D)."""
    return x * ops.power(ops.sum(x * x, axis=-1, keepdims=True), p=-0.5)


@variant("clip_logits", what="similarity of every image to every text", claims="a3-22 a3-23", source=_CLIP, shape="B B")
def clip_logits(image: Any, text: Any, log_scale: Any) -> Any:
    """min(e^t, 100) cos(image_i, text_j), t learned.  image (B, D), text (B, D), log_scale () -> (B, B)."""
    t = ops.neg(ops.maximum(ops.neg(log_scale), -MOST))
    return ops.matmul(unit_rows(image), ops.transpose(unit_rows(text))) * ops.exp(t)


@variant("clip_loss", what="symmetric contrastive loss (InfoNCE)", claims="a3-22 a3-23", source=_CLIP, shape="")
def clip_loss(logits: Any) -> Any:
    """Half the cross-entropy of images among texts plus half that of texts among images, pairs on the diagonal.
    logits (B, B) -> ().
    """
    require(logits.shape[0] == logits.shape[1], f"variant.clip_loss: pairs were expected, not shape {logits.shape}")
    pairs = np.arange(logits.shape[0], like=data_of(logits)).astype(np.int64)
    return (nn_ops.nll(logits, pairs) + nn_ops.nll(ops.transpose(logits), pairs)) * 0.5
