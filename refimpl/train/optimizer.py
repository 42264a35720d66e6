"""AdamW as R 4.2 uses it (beta1 0.9, beta2 0.95, weight decay 0.1, gradients clipped to global norm 1.0)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers import adamw as stages
from refimpl.layers.numerics.formats import to_bf16

BLOCK = 1 << 15
"""Elements of a gradient that are squared at once."""


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay on every parameter, or without the norms' gains: `decays="matrices"`. Which, and eps, is not published
    (R 4.2 is silent); 1e-8 is PyTorch's. V3 keeps both moments in bfloat16, masters and gradients in float32 (R 3.3.3):
    `moments="bf16"`.
    """

    lr: float = 2.2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    moments: Literal["fp32", "bf16"] = "fp32"
    decays: Literal["all", "matrices"] = "all"

    def decay(self, name: str) -> float:
        """The weight decay of a parameter, by its checkpoint name."""
        return stages.decay_of(name, self.weight_decay, self.decays)


@dataclass(frozen=True)
class AdamState:
    """First and second moments by parameter name, and the number of steps taken."""

    m: Mapping[str, Array] = field(default_factory=dict)
    v: Mapping[str, Array] = field(default_factory=dict)
    t: int = 0


def global_norm(grads: Mapping[str, Array]) -> float:
    """sqrt of the sum of squares over all gradients, in float64, a block at a time: no gradient is held twice as wide."""
    return float(np.sqrt(sum([_squares(g.reshape(-1)) for g in grads.values()])))


def _squares(g: Array) -> float:
    total = 0.0
    for i in range(0, len(g), BLOCK):
        part = g[i : i + BLOCK].astype(np.float64)
        total += float(part @ part)
    return total


def clipping(norm: float, max_norm: float) -> float:
    """min(1, max_norm / (norm + 1e-6)), what gradients of this norm are multiplied by."""
    return min(1.0, max_norm / (norm + 1e-6))


def clip(grads: Mapping[str, Array], *, max_norm: float = 1.0) -> tuple[dict[str, Array], float]:
    """g min(1, max_norm / (norm + 1e-6)) as torch.nn.utils.clip_grad_norm_ does -> clipped gradients, norm before."""
    norm = global_norm(grads)
    return scaled(grads, clipping(norm, max_norm)), norm


def scaled(grads: Mapping[str, Array], scale: float) -> dict[str, Array]:
    """Every gradient times `scale`."""
    return {n: g * np.asarray(scale, g.dtype) for n, g in grads.items()}


def adamw(
    params: Mapping[str, Array], grads: Mapping[str, Array], state: AdamState, opt: AdamW
) -> tuple[dict[str, Array], AdamState]:
    """One step: p (1 - lr wd) - lr m^ / (sqrt(v^) + eps), with bias-corrected moments -> new parameters, new state.

    Nothing is changed in place. SpecError if gradients and parameters do not have the same names.
    """
    require(
        set(grads) == set(params),
        f"gradients without parameter or the other way: {sorted(set(grads) ^ set(params))[:3]}",
    )
    (b1, b2), t = opt.betas, state.t + 1
    m = {n: stages.exp_avg.fn(g, state.m.get(n), beta=b1) for n, g in grads.items()}
    v = {n: stages.exp_avg_sq.fn(g, state.v.get(n), beta=b2) for n, g in grads.items()}

    if opt.moments == "bf16":
        m, v = ({n: to_bf16(x) for n, x in moment.items()} for moment in (m, v))

    settings = {"lr": opt.lr, "beta1": b1, "beta2": b2, "eps": opt.eps, "steps": t}
    new = {n: stages.step.fn(p, m[n], v[n], decay=opt.decay(n), **settings) for n, p in params.items()}
    return new, replace(state, m=m, v=v, t=t)
