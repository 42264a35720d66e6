"""A training step under a dynamic loss scale (`LossScale`). Described in articles, not in V3.

V3's FP8 has scales of its own, and its gradients are BF16 and float32, which have the range. Here the loss is multiplied by the
scale, so every gradient is; they are divided by it before they are clipped, because the limit of the norm is for true gradients.
Where one is infinite or NaN, nothing is trained: weights, moments, the step's number and the balancing bias stay, the scale is
halved. As long as nothing overflows or gets subnormal, a scale that is a power of two changes no bit of a step.

`step` leaves what overflows to the caller, who goes on with other tokens as `torch.amp.GradScaler` has it; `until_finite` takes the
same tokens again, so a run's steps, schedules and place in its data stay the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.neighbours import LossScale

from .half import Half
from .training import Found, Recipe, Report, State, gradients, update


def step(
    c: Config,
    state: State,
    scale: LossScale,
    tokens: Array,
    recipe: Recipe,
    *,
    found: Callable[..., Found] = gradients,
    in_place: bool = False,
    **rows: Array,
) -> tuple[State, LossScale, Report]:
    """`refimpl.train.step` on tokens (B, S) under a scale -> the new state, the scale of the next step, what was seen. A skipped
    step gives the old state, and a norm that is infinite.

    `found`: another way to the same gradients (`memory.gradients`); `rows`: labels, valid, documents, as there.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        loss, grads, load, seen = found(c, state, tokens, recipe, scale=scale.scale, **rows)
    if isinstance(recipe.plan, Half):
        grads = {n: recipe.plan.gradient(n, g) for n, g in grads.items()}
    true = scale.unscale(grads)
    if true is None:
        return state, scale.update(True), Report(state.adam.t, loss, math.inf, load, seen)
    new, report = update(c, state, loss, true, load, replace(recipe, loss_scale=None), seen, in_place=in_place)
    return new, scale.update(False), report


def until_finite(
    c: Config, state: State, scale: LossScale, tokens: Array, recipe: Recipe, **how: Any
) -> tuple[State, LossScale, Report]:
    """`step` on the same tokens under half the scale, and half of that, until nothing overflows; the report has the scale.

    A loss that is no number, and gradients that overflow without a scale, are not cured so: they are reported as they are.
    """
    while True:
        new, after, report = step(c, state, scale, tokens, recipe, **how)
        if math.isfinite(report.norm) or not math.isfinite(report.loss) or scale.scale <= 1.0:
            return new, after, replace(report, step=state.adam.t + 1, loss_scale=scale.scale)
        scale = after
