"""FP16 with a dynamic loss scale (described in articles, not in V3): nothing changes but what would be lost."""

import math

import numpy as np
import pytest

from refimpl.autograd import SpecError, Tensor, backward
from refimpl.layers import STAGES, observing
from refimpl.layers.neighbours import LossScale
from refimpl.layers.precision import BF16, FLOAT32
from refimpl.spec_tests.cases.small_models import SMALL, some_tokens
from refimpl.train import AdamW, Recipe, State, init, loss_scale, parallel, step
from refimpl.train.half import HALF, to_half
from refimpl.train.recipe.reading import load
from refimpl.train.training import gradients

WEIGHTS = init(SMALL, std=0.1)
TOKENS = [some_tokens(2, 9, seed=s) for s in range(4)]
RECIPE = Recipe(HALF, AdamW(lr=1e-3), max_norm=0.3, aux_weight=1e-3)


def same(a, b):
    """Whether two states are the same bits, step number and moments too."""
    assert a.adam.t == b.adam.t and a.weights.keys() == b.weights.keys()
    for mine, other in ((a.weights, b.weights), (a.adam.m, b.adam.m), (a.adam.v, b.adam.v)):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name])


@pytest.mark.parametrize("plan", [FLOAT32, BF16], ids=lambda p: p.name)
@pytest.mark.parametrize("scale", [2.0**-3, 2.0**16])
def test_a_power_of_two_changes_no_bit(plan, scale):
    """Catches gradients clipped before they are unscaled (the norm here is above the limit), a scale forgotten, a scaled loss
    in the report: three steps in which nothing overflows.
    """
    recipe = Recipe(plan, AdamW(lr=1e-3), max_norm=0.3, aux_weight=1e-3)
    plain = scaled = State(WEIGHTS)
    held = LossScale(scale=scale)
    for tokens in TOKENS[:3]:
        plain, expected = step(SMALL, plain, tokens, recipe)
        scaled, held, report = loss_scale.step(SMALL, scaled, held, tokens, recipe)
        assert expected.norm > recipe.max_norm
        assert (report.loss, report.norm, report.step) == (expected.loss, expected.norm, expected.step)
    same(scaled, plain)
    assert held.scale == scale and held.good == 3


def test_another_scale_changes_only_roundings():
    """Catches a scale that is divided by twice, or multiplied by: 1000 is no power of two, so the last bits may move."""
    plain, _ = step(SMALL, State(WEIGHTS), TOKENS[0], Recipe(FLOAT32))
    scaled, _, _ = loss_scale.step(SMALL, State(WEIGHTS), LossScale(scale=1000.0), TOKENS[0], Recipe(FLOAT32))
    moved = [np.abs(plain.weights[n] - w).max() for n, w in scaled.weights.items()]
    # Adam moves every weight by about lr = 2.2e-4 whatever the gradient's size; near 0 its sign may turn
    assert np.median(moved) < 1e-6 and max(moved) > 0


def test_an_overflow_trains_nothing_and_halves_the_scale_until_it_is_gone():
    """Catches a step that is half done (a bias moved, a step counted, a moment spoiled), and a scale that never comes down."""
    start = state = State(WEIGHTS)
    scale, skipped = LossScale(scale=2.0**40), 0
    while state is start:
        before = scale
        state, scale, report = loss_scale.step(SMALL, state, scale, TOKENS[0], RECIPE)
        if state is start:
            skipped += 1
            assert scale == LossScale(scale=before.scale / 2) and report.norm == math.inf
            assert math.isfinite(report.loss) and report.step == 0
    assert skipped > 10 and scale.scale < 2.0**30
    assert state.adam.t == 1 and math.isfinite(report.norm)
    assert all(np.isfinite(w).all() for w in state.weights.values())


def test_a_nan_is_skipped_too():
    """Catches a check for infinities alone."""
    spoiled = dict(WEIGHTS) | {"model.norm.weight": np.full_like(WEIGHTS["model.norm.weight"], np.nan)}
    state = State(spoiled)
    after, scale, report = loss_scale.step(SMALL, state, LossScale(scale=8.0), TOKENS[0], Recipe(FLOAT32))
    assert after is state and scale.scale == 4.0 and math.isnan(report.loss)


def test_the_scale_grows_again_after_good_steps():
    """Catches a counter that an overflow does not reset, and growth one step early or late."""
    scale, seen = LossScale(scale=16.0, interval=3), []
    for overflowed in (False, False, True, False, False, False, False, False, False):
        scale = scale.update(overflowed)
        seen.append(scale.scale)
    assert seen == [16, 16, 8, 8, 8, 16, 16, 16, 32]


def test_without_a_scale_small_gradients_are_lost():
    """Catches a plan whose backward is not FP16: a gradient that is all zeros is there again with a scale."""

    def lost(scale):
        with np.errstate(over="ignore", invalid="ignore"):
            _, grads, *_ = gradients(SMALL, State(small), TOKENS[0], RECIPE, scale=scale)
        return {n: HALF.gradient(n, g) / np.float32(scale) for n, g in grads.items()}

    small = init(SMALL, std=0.006)
    name = "model.layers.0.self_attn.q_a_layernorm.weight"  # 3.6e-8 on average; what leads there is smaller
    truth = gradients(SMALL, State(small), TOKENS[0], Recipe(FLOAT32))[1][name]
    plain, scaled = lost(1.0)[name], lost(2.0**12)[name]
    assert np.abs(truth).min() > 0 and not plain.any()
    # FP16's rounding is 2^-11 = 5e-4; 1e-3 was measured, of some 50 roundings on the way
    assert np.linalg.norm(scaled - truth) < 5e-3 * np.linalg.norm(truth)


def test_weights_are_trained_by_gradients_that_were_fp16():
    """Catches gradients of weights left in float32, which FP16's products do not give (beta1 = 0: the first moment is one)."""
    recipe = Recipe(HALF, AdamW(betas=(0.0, 0.95)), max_norm=math.inf)
    state, _, _ = loss_scale.step(SMALL, State(WEIGHTS), LossScale(scale=2.0**8), TOKENS[0], recipe)
    for g in state.adam.m.values():
        np.testing.assert_array_equal(to_half(g * 2.0**8), g * 2.0**8)


def test_a_recipe_with_a_loss_scale_is_stepped_with_one():
    """Catches FP16 trained without its scale because another step was called: the shipped recipe, by all three."""
    recipe = load("article-fp16").recipe(0)
    for other in (
        lambda: step(SMALL, State(WEIGHTS), TOKENS[0], recipe),
        lambda: parallel.start(None, SMALL, WEIGHTS, recipe, None, None),  # refused before it looks for its ranks
    ):
        with pytest.raises(SpecError, match=r"trains under a loss scale: step by refimpl.train.loss_scale.step"):
            other()
    assert recipe.plan is HALF and recipe.loss_scale == 65536
    state, _, _ = loss_scale.step(SMALL, State(WEIGHTS), LossScale(recipe.loss_scale), TOKENS[0], recipe)
    assert state.adam.t == 1


# ---- The plan


def test_half_is_numpys_float16():
    """Catches a flush of subnormals, saturation in place of infinity, truncation: every FP16 number and the middle between two."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    np.testing.assert_array_equal(to_half(every), every)
    assert to_half(np.float32([65504, 65519.9, 65520, -1e6, 2.0**-24, 2.0**-25, 2.0**-25 * 1.01])).tolist() == [
        *[65504, 65504, math.inf, -math.inf],
        *[2.0**-24, 0, 2.0**-24],
    ]


def test_the_plan_rounds_both_ways():
    """Catches a gradient that goes straight through, as under BF16: 1e-9 is no FP16 number, 1e6 is infinite there."""
    x = Tensor(np.float32([[[1.0, 1 / 3, 70000.0]]]))
    with np.errstate(over="ignore"), observing(HALF):
        y = STAGES["resid"](x, np.zeros((1, 1, 3), np.float32))
        np.testing.assert_array_equal(y.data[0, 0], np.float32([1, np.float16(1 / 3), np.inf]))
        assert y.data.dtype == np.float32
        dx = backward(y, np.float32([[[1e-9, 1 / 3, 1e6]]]))[x]
    np.testing.assert_array_equal(dx[0, 0], np.float32([0, np.float16(1 / 3), np.inf]))


def test_what_bf16_keeps_in_float32_half_keeps_too():
    """Catches a router, a mask or a loss in FP16."""
    for name in STAGES:
        assert (HALF.format(name) == "fp16") == (BF16.format(name) == "bf16")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    third = np.float32([1 / 3])
    assert HALF.weight(bias, third) == third and HALF.weight("lm_head.weight", third) == np.float16(1 / 3)
