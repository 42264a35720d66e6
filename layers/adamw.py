"""A step of AdamW as stages, so that a trace of a training step can hold what its optimiser did (R 4.2).

Rounding is no part of it: in which dtype moments and masters are kept (R 3.3.3: bfloat16 and float32) is the run's.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from refimpl.autograd.tensor import Array

from .stage import stage

_CLIPPED = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to a norm before it divides by it."""


def decay_of(name: str, weight_decay: float, decays: Literal["all", "matrices"]) -> float:
    """The weight decay of a parameter, by its checkpoint name: a rank's shard of a matrix is flat, so shapes do not tell."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    return 0.0 if decays == "matrices" and "norm" in module else weight_decay


@stage(
    "optim.grad_norm", what="norm of all gradients, before clipping", eq="R 4.2 (clipping)", shape="", tap="grad_norm"
)
def grad_norm(*grads: Array) -> Any:
    """sqrt of the sum of all gradients' squares.  N times grad (*) -> ()."""
    total = np.zeros(())
    for g in grads:
        total = total + (g.astype(np.float64) ** 2).sum()
    return np.sqrt(total)


@stage("optim.clip", what="clipped gradient", eq="R 4.2 (clipping norm 1.0)", shape="F D", tap="weight.clipped")
def clip(g: Array, norm: Any, *, max_norm: float | None) -> Any:
    """g min(1, max_norm / (norm + 1e-6)), the norm over all gradients; None: unclipped.  g (*), norm () -> (*)."""
    return g if max_norm is None else g * np.asarray(np.minimum(1.0, max_norm / (norm + _CLIPPED)), g.dtype)


@stage("optim.exp_avg", what="first moment after the step", eq="R 4.2 (AdamW)", shape="F D", tap="weight.exp_avg")
def exp_avg(g: Array, before: Array | None, *, beta: float) -> Any:
    """m = beta m_before + (1 - beta) g, from 0 (None).  g (*), before (*) or None -> (*)."""
    return beta * (0 if before is None else before) + (1 - beta) * g


@stage(
    "optim.exp_avg_sq", what="second moment after the step", eq="R 4.2 (AdamW)", shape="F D", tap="weight.exp_avg_sq"
)
def exp_avg_sq(g: Array, before: Array | None, *, beta: float) -> Any:
    """v = beta v_before + (1 - beta) g^2, from 0 (None).  g (*), before (*) or None -> (*)."""
    return beta * (0 if before is None else before) + (1 - beta) * g * g


@stage("optim.step", what="weight after the step", eq="R 4.2 (AdamW)", shape="F D", tap="weight")
def step(
    w: Array, m: Array, v: Array, *, lr: float, beta1: float, beta2: float, eps: float, decay: float, steps: int
) -> Any:
    """(1 - lr decay) w - lr m^ / (sqrt(v^) + eps), m^ = m / (1 - beta1^steps), v^ = v / (1 - beta2^steps).
    w (*), m (*), v (*) -> (*).
    """
    denominator = np.sqrt(v / (1 - beta2**steps)) + eps
    return w * (1 - lr * decay) - (lr / (1 - beta1**steps)) * m / denominator


@stage(
    "optim.before",
    what="moment before the step (likewise exp_avg_sq)",
    eq="R 4.2 (AdamW)",
    shape="F D",
    tap="weight.exp_avg.before",
    compare="given",
)
def before(like: Array) -> Any:
    """What a trace alone can say: nothing else is known.  like (*) -> (*)."""
    return np.full_like(like, np.nan)
