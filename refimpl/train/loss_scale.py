"""A training step under a dynamic loss scale (`LossScale`). Described in articles, not in V3.

V3's FP8 has scales of its own, and its gradients are BF16 and float32, which have the range. Here the loss is multiplied by the
scale, so every gradient is; they are divided by it before they are clipped, because the limit of the norm is for true gradients.
Where one is infinite or NaN, nothing is trained: weights, moments, the step's number and the balancing bias stay, the scale is
halved. As long as nothing overflows or gets subnormal, a scale that is a power of two changes no bit of a step.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.neighbours import LossScale

from .half import Half
from .training import Recipe, Report, State, gradients, update


def step(
    c: Config, state: State, scale: LossScale, tokens: Array, recipe: Recipe, *, labels: Array | None = None
) -> tuple[State, LossScale, Report]:
    """`refimpl.train.step` on tokens (B, S) under a scale -> the new state, the scale of the next step, what was seen. A skipped
    step gives the old state, and a norm that is infinite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        loss, grads, load, seen = gradients(c, state, tokens, recipe, labels=labels, scale=scale.scale)
    if isinstance(recipe.plan, Half):
        grads = {n: recipe.plan.gradient(n, g) for n, g in grads.items()}
    true = scale.unscale(grads)
    if true is None:
        return state, scale.update(True), Report(state.adam.t, loss, math.inf, load, seen)
    new, report = update(c, state, loss, true, load, replace(recipe, loss_scale=None), seen)
    return new, scale.update(False), report
