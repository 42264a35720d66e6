"""Whether a confidence means what it says: of answers given with 0.8, are 8 in 10 right? What a threshold of `handoff` rests on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array

from .marked import variant

_GUO = "Guo et al. 2017, eqs 2-3 (arXiv 1706.04599)"


@dataclass(frozen=True)
class Curve:
    """The calibration curve: per bin of equal width the number of answers, their mean confidence, the part that is right (0, 0
    where there are none).
    """

    count: Array
    confidence: Array
    accuracy: Array


def curve(confidence: Array, right: Array, *, bins: int = 15) -> Curve:
    """Bins ((i-1)/n, i/n], as the source has them; 0 is in the first.  confidence (*), right (*) of 0 and 1."""
    return Curve(*_binned(confidence, right, bins))


def _binned(confidence: Array, right: Array, bins: int) -> tuple[Array, Array, Array]:
    """A curve's three arrays."""
    require(bins >= 1 and confidence.size > 0, f"a calibration curve of {bins} bins over {confidence.size} answers")
    require(confidence.shape == right.shape, f"confidence has shape {confidence.shape}, right has {right.shape}")
    c, r = confidence.reshape(-1).astype(np.float64), right.reshape(-1).astype(np.float64)
    require(bool(np.all((c >= 0) & (c <= 1 + 1e-6))), "a confidence is a probability, between 0 and 1")
    at = np.clip(np.ceil(c * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(at, minlength=bins)
    some = np.maximum(count, 1)
    said, were_right = (np.bincount(at, weights=x, minlength=bins) / some for x in (c, r))
    return count, said, were_right


@variant("ece", what="expected calibration error", claims="a1-58", source=_GUO, shape="")
def ece(confidence: Array, right: Array, *, bins: int = 15) -> Array:
    """sum over bins of |right - confidence| times the bin's part of all answers.  confidence (B, S), right (B, S) -> ()."""
    count, said, were_right = _binned(confidence, right, bins)
    return np.asarray((np.abs(were_right - said) * count).sum() / count.sum())
