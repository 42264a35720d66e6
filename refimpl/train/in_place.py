"""Clipping and AdamW over the arrays themselves: the bits of `clip` and `adamw`, a block of elements at a time.

`adamw` is the text: it keeps the old state beside the new one and takes a dozen passes through memory. Here masters and
moments are overwritten while a block of each lies in the core's cache, so a step needs no memory beyond gradients and a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers.numerics.formats import to_bf16

from .optimizer import AdamState, AdamW

BLOCK = 1 << 15  # elements: four arrays and two of scratch in 768 KiB


def adamw_over(
    params: dict[str, Array], grads: Mapping[str, Array], state: AdamState, opt: AdamW, *, scale: float
) -> tuple[dict[str, Array], AdamState]:
    """`adamw` of the gradients times `scale`, written over `params` and the moments of `state`; the gradients stay.

    -> parameters and state, of the same arrays: only what cannot be written to, or is not contiguous, is copied first.
    SpecError if gradients and parameters do not have the same names.
    """
    require(
        set(grads) == set(params),
        f"gradients without parameter or the other way: {sorted(set(grads) ^ set(params))[:3]}",
    )
    found = {n: _own(p) for n, p in params.items()}
    m, v = ({n: _own(held[n]) if n in held else np.zeros_like(found[n]) for n in grads} for held in (state.m, state.v))
    for n, g in grads.items():
        p, g, first, second = (np.reshape(a, -1) for a in (found[n], g, m[n], v[n]))
        for i in range(0, g.size, BLOCK):
            at = slice(i, i + BLOCK)
            _block(p[at], g[at], first[at], second[at], opt, state.t + 1, opt.decay(n), scale)
    return found, replace(state, m=m, v=v, t=state.t + 1)


def _own(x: Array) -> Array:
    """x, or a copy of it, that can be written to through a flat view."""
    return np.require(x, requirements=["C", "W"])


def _block(p: Array, g: Array, m: Array, v: Array, opt: AdamW, t: int, decay: float, scale: float) -> None:
    """The lines of `adamw`, each product and sum in its order: another order would round otherwise."""
    b1, b2 = opt.betas
    g = g * np.asarray(scale, g.dtype)
    a = (1 - b1) * g
    m *= b1
    m += a
    np.multiply(1 - b2, g, out=a)
    a *= g
    v *= b2
    v += a
    if opt.moments == "bf16":
        m[:], v[:] = to_bf16(m), to_bf16(v)
    np.divide(v, 1 - b2**t, out=a)
    np.sqrt(a, out=a)
    a += opt.eps
    np.multiply(opt.lr / (1 - b1**t), m, out=g)
    g /= a
    p *= 1 - opt.lr * decay
    p -= g
