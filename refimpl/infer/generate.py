"""Greedy generation with the latent cache: prefill once, then one absorbed step per token (R 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.model import Impl


def greedy(
    impl: Impl, prompt: Any, n: int, *, eos: int | None = None, on_token: Callable[[Array], None] | None = None
) -> Array:
    """The n most likely next tokens, each fed back.  prompt (B, S) -> (B, n) int; after `eos` a row repeats it.

    Ties go to the lower token id. `on_token` sees each step's tokens (B,) as they come.
    """
    cache = impl.new_cache()
    out = impl.forward(prompt, cache=cache)
    tokens: list[Array] = []
    while len(tokens) < n:
        token = np.argmax(out["logits"][:, -1], axis=-1)
        if eos is not None and tokens:
            token = np.where(tokens[-1] == eos, eos, token)
        tokens.append(token)
        if on_token:
            on_token(token)
        if len(tokens) < n:
            out = impl.step(token, cache)
    return np.stack(tokens, axis=1) if tokens else np.zeros((len(out["logits"]), 0), np.int64)
