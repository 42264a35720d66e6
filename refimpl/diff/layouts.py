"""Layouts that a candidate may legally choose, and how to bring its taps into ours (gauges)."""

from __future__ import annotations

import numpy as np

from refimpl.autograd.errors import SpecError
from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config

MASKED = -1e30
"""An additive mask may hold the lowest number of its dtype instead of -inf; what is below this counts as masked."""
ROPE_TAPS = ("mla.q_rope", "mla.k_rope", "cache.k_rope")
KNOWN = {"rope": ("interleaved", "half"), "mla": ("expanded", "absorbed", "auto")}


def canonical(tap: str, x: Array, layouts: dict[str, str], config: Config) -> Array:
    """The tap in our layout: rotated channels in the order of the config's pairs, masked scores as -inf.

    transformers reads interleaved pairs and writes the two halves one after the other; the same permutation of q and
    k leaves every score as it is, so this is a layout, not a bug (DeepSeek-V3 #938, transformers #39687).
    """
    for key, value in layouts.items():
        if value not in KNOWN.get(key, (value,)):
            raise SpecError(f"layout {key}={value!r}; known: {', '.join(KNOWN[key])}")
    if tap.endswith(("/mask", "/mla.scores")):
        return np.where(x.astype(np.float32) < MASKED, np.asarray(-np.inf, x.dtype), x)
    ours = "interleaved" if config.rope_interleave else "half"
    theirs = layouts.get("rope", ours)
    if theirs == ours or tap.rpartition("/")[2] not in ROPE_TAPS:
        return x
    half = x.shape[-1] // 2
    y = np.empty_like(x)
    if ours == "interleaved":
        y[..., 0::2], y[..., 1::2] = x[..., :half], x[..., half:]
    else:
        y[..., :half], y[..., half:] = x[..., 0::2], x[..., 1::2]
    return y
