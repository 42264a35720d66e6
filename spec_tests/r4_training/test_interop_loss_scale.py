"""torch.amp.GradScaler's sequence (scale, unscale, clip, step, update) beside ours: scales, skipped steps, weights.

`pip install torch==2.13.0`, then `pytest` this file. The objective is a least-squares fit in float32 with AdamW; gradients of some
steps are made infinite or NaN on both sides. 2e-6 is float32's rounding over 40 steps of order 1.
"""

import math

import numpy as np
import pytest

from refimpl.layers.neighbours import LossScale
from refimpl.train import AdamW, Recipe, State
from refimpl.train.optimizer import global_norm
from refimpl.train.training import descend

BAD = {4: math.inf, 5: math.nan, 6: -math.inf, 19: math.inf}
STEPS, INTERVAL = 40, 5


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    pytest.importorskip("torch", reason="comes with the extra 'interop'; CI runs these tests with it")


def problem():
    rng = np.random.default_rng(8)
    return rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=(STEPS, 6, 5)).astype(np.float32)


def in_torch():
    """[(scale after the step, norm before clipping or infinite)], and the weights."""
    import torch

    start, inputs = problem()
    w = torch.nn.Parameter(torch.tensor(start))
    adam = torch.optim.AdamW([w], lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    scaler, seen = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=INTERVAL), []
    for i in range(STEPS):
        adam.zero_grad()
        scaler.scale((torch.tensor(inputs[i]) @ w.T).square().sum()).backward()
        if i in BAD:
            w.grad[1, 2] = BAD[i]
        scaler.unscale_(adam)
        norm = float(torch.nn.utils.clip_grad_norm_([w], 0.5))
        scaler.step(adam)
        scaler.update()
        seen.append((scaler.get_scale(), norm if math.isfinite(norm) else math.inf))
    return seen, w.detach().numpy()


def ours():
    start, inputs = problem()
    state, scale, seen = State({"w": start}), LossScale(scale=2.0**10, interval=INTERVAL), []
    recipe = Recipe(opt=AdamW(lr=0.05), max_norm=0.5)
    for i in range(STEPS):
        g = np.float32(scale.scale) * 2 * (inputs[i] @ state.weights["w"].T).T @ inputs[i]
        if i in BAD:
            g[1, 2] = BAD[i]
        true, norm = scale.unscale({"w": g}), math.inf
        if true is not None:
            norm = global_norm(true)
            state = descend(state, true, recipe, norm)
        scale = scale.update(true is None)
        seen.append((scale.scale, norm))
    return seen, state.weights["w"]


def test_the_same_steps_are_skipped_and_the_same_scale_is_reached():
    """Catches growth or backoff at another step, a skipped step that counts, clipping of scaled gradients."""
    (theirs, w), (mine, v) = in_torch(), ours()
    assert [s for s, _ in mine] == [s for s, _ in theirs]
    assert [i for i, (_, n) in enumerate(mine) if n == math.inf] == list(BAD)
    np.testing.assert_allclose([n for _, n in mine], [n for _, n in theirs], rtol=2e-6)
    np.testing.assert_allclose(v, w, rtol=2e-6, atol=2e-6)
    assert len({s for s, _ in mine}) >= 4  # it went down and up
