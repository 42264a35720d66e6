"""Rotary position embedding and YaRN (R 2.1.1 eqs 4 and 8, 4.3)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import nn_ops
from refimpl.layers import PRESETS, mla, rope
from refimpl.layers.rope import RopeScaling, inv_freq, mscale

V3 = RopeScaling()
PLAIN = PRESETS["deepseek-v3"].replace(rope_scaling=None)


def tables(positions, yarn=None, dim=8, theta=100.0, dtype=np.float64):
    positions = np.atleast_2d(positions)
    return rope.rope_tables(positions, dim=dim, theta=theta, yarn=yarn, dtype=dtype)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_the_frequencies_that_runs_share_cannot_be_written_to():
    """Catches a caller that scales the remembered array in place, and so every later run's positions."""
    for yarn in (None, V3):
        assert inv_freq(8, 100.0, yarn) is inv_freq(8, 100.0, yarn)
        with pytest.raises(ValueError, match="read-only"):
            inv_freq(8, 100.0, yarn)[0] = 1


# ---- Constants of the released models, computed by hand in float64 from R 4.3


@pytest.mark.parametrize(
    ("what", "ours", "golden"),
    [
        ("192^-0.5", PLAIN.softmax_scale, 0.07216878364870322),
        ("m, 671B", mscale(40, 1.0), 1.3688879454113936),
        ("m^2, 671B", V3.softmax_factor, 1.8738542070926265),
        ("m^2, 16B", RopeScaling(mscale_all_dim=0.707).softmax_factor, 1.5896261651208736),
        ("m^2 at 0.70", RopeScaling(mscale_all_dim=0.70).softmax_factor, 1.5831214985481723),
        ("scale, 671B", PRESETS["deepseek-v3"].softmax_scale, 0.1352337788608801),
        ("scale, 236B", PRESETS["deepseek-v2"].softmax_scale, 0.1352337788608801),
        ("scale, 16B", PRESETS["deepseek-v2-lite"].softmax_scale, 0.1147213867929261),
        ("cos, sin factor, 671B", V3.attention_factor, 1.0),
        ("cos, sin factor, 16B", PRESETS["deepseek-v2-lite"].yarn.attention_factor, 1.0),
    ],
)
def test_constant(what, ours, golden):
    """Catches m applied once or not at all, to half of the logit, or from the wrong mscale."""
    assert abs(ours / golden - 1) < 1e-15


@pytest.mark.parametrize(
    ("i", "golden"),
    [
        (0, 1.0),
        (1, 7.498942093e-01),
        (10, 5.623413252e-02),
        (11, 3.900692657e-02),
        (12, 2.687936011e-02),
        (16, 5.5e-03),
        (20, 7.905694150e-04),
        (22, 1.778279410e-04),
        (23, 3.333803580e-05),
        (31, 3.333803580e-06),
    ],
)
def test_frequency_of_v3(i, golden):
    """Catches a ramp with other ends or the wrong way round; ten digits are printed."""
    assert abs(inv_freq(64, 10000.0, V3)[i] / golden - 1) < 1e-9


def test_channels_up_to_10_are_untouched_and_from_23_on_slowed_40_times():
    """Catches ramp ends off by one: corr(32) = 10.47 is floored, corr(1) = 22.51 is raised."""
    plain, slowed = inv_freq(64, 10000.0, None), inv_freq(64, 10000.0, V3)
    np.testing.assert_array_equal(slowed[:11], plain[:11])
    np.testing.assert_array_equal(slowed[23:], plain[23:] / 40)
    assert np.all(slowed[11:23] < plain[11:23]) and np.all(slowed[11:23] > plain[11:23] / 40)


def test_missing_mscale_all_dim_scales_cos_and_sin_instead():
    """Catches one rule for both spellings: without mscale_all_dim, cos and sin carry m (HF, vLLM)."""
    s = RopeScaling(mscale=1.0, mscale_all_dim=None)
    assert (s.softmax_factor, s.attention_factor) == (1.0, mscale(40, 1.0))
    table, plain = tables([3], s), tables([3], V3)
    np.testing.assert_allclose(table, plain * 1.3688879454113936, rtol=1e-15)


def test_a_factor_of_one_changes_nothing():
    """Catches ln(1) mishandled, and a blend that does not return to the plain frequencies."""
    assert mscale(1.0, 1.0) == 1.0
    same = inv_freq(64, 10000.0, RopeScaling(factor=1.0))
    np.testing.assert_allclose(same, inv_freq(64, 10000.0, None), rtol=1e-15)


def test_equal_ramp_ends_make_a_step():
    """Catches 0/0: within 4 positions nothing turns 4 times, both ends are clamped to channel 0, and
    the ramp is a step behind it."""
    s = RopeScaling(original_max_position_embeddings=4, beta_fast=4, beta_slow=4)
    plain, slowed = inv_freq(8, 10000.0, None), inv_freq(8, 10000.0, s)
    np.testing.assert_array_equal(slowed, [plain[0], *(plain[1:] / 40)])


# ---- The rotation


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 100), st.booleans())
def test_scores_depend_on_the_distance_only(p, t, shift, interleaved):
    """Catches a rotation of q and k by different signs, frequencies or pairs. Angles up to 500 rad
    lose three digits of float64."""
    q, k = normal(1, 1, 8), normal(1, 1, 8, seed=1)

    def score(p, t):
        a, b = (nn_ops.rotate(v, tables(x), interleaved=interleaved) for v, x in ((q, p), (k, t)))
        return (a * b).sum()

    assert abs(score(p, t) - score(p + shift, t + shift)) < 1e-11


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_keeps_every_pair_s_length(interleaved):
    """Catches cos without sin, and a YaRN factor on cos and sin that V3 does not have."""
    x, table = normal(2, 5, 8), tables(np.arange(5), V3)
    y = nn_ops.rotate(x, table, interleaved=interleaved)
    pairs = np.s_[..., [0, 2, 4, 6]], np.s_[..., [1, 3, 5, 7]]
    a, b = pairs if interleaved else (np.s_[..., :4], np.s_[..., 4:])
    np.testing.assert_allclose(np.hypot(y[a], y[b]), np.hypot(x[a], x[b]), rtol=1e-14)
    np.testing.assert_array_equal(y[:, 0], x[:, 0])  # position 0 does not turn
    assert not np.allclose(y[:, 1], x[:, 1])


def test_half_layout_is_the_interleaved_one_permuted():
    """Catches layouts that are confused: permuting channels 0 2 4 .. 1 3 5 .. maps one on the other,
    to the bit."""
    x, table, order = normal(2, 5, 8), tables(np.arange(5)), [0, 2, 4, 6, 1, 3, 5, 7]
    interleaved = nn_ops.rotate(x, table, interleaved=True)
    half = nn_ops.rotate(x[..., order], table, interleaved=False)
    np.testing.assert_array_equal(interleaved[..., order], half)
    assert not np.allclose(nn_ops.rotate(x, table, interleaved=False), interleaved)


def test_a_query_turns_its_last_channels_only():
    """Catches a rotation of the nope channels, or of the first Dr instead of the last."""
    q, table = normal(1, 5, 3, 12), tables(np.arange(5))
    turned = mla.q_rope(q, table, interleaved=True)
    for h in range(3):
        expected = nn_ops.rotate(q[:, :, h, 4:], table, interleaved=True)
        np.testing.assert_array_equal(turned[:, :, h], expected)


def test_the_key_turns_behind_the_latent_and_is_not_normalised():
    """Catches kv_a_layernorm applied to the rope channels: ten times the input, ten times k_rope."""
    kv, table = normal(1, 5, 9 + 8), tables(np.arange(5))
    k = mla.k_rope(kv, table, interleaved=True)
    np.testing.assert_array_equal(k, nn_ops.rotate(kv[..., 9:], table, interleaved=True))
    np.testing.assert_allclose(mla.k_rope(10 * kv, table, interleaved=True), 10 * k, rtol=1e-14)
    latent, w = kv[..., :9], np.ones(9)
    np.testing.assert_allclose(mla.c_kv(kv, w, eps=1e-6), latent / np.sqrt((latent**2).mean(-1, keepdims=True) + 1e-6))


def test_positions_may_be_any_and_differ_by_row():
    """Catches tables indexed by 0..S-1 instead of the positions given."""
    table = tables(np.array([[5, 0, 7], [2, 2, 9]]))
    for b, row in enumerate([[5, 0, 7], [2, 2, 9]]):
        for s, p in enumerate(row):
            np.testing.assert_array_equal(table[:, b, s], tables([p])[:, 0, 0])


def test_float32_angles_err_by_what_the_docstring_says():
    """Catches angles formed in float64 and rounded after (no implementation does), or in bfloat16."""
    last = PRESETS["deepseek-v3"].max_position_embeddings - 1
    settings = {"yarn": V3, "dim": 64, "theta": 10000.0}
    narrow, wide = (tables([last], dtype=d, **settings) for d in (np.float32, np.float64))
    off = np.angle((narrow[0] + 1j * narrow[1]) / (wide[0] + 1j * wide[1]))
    assert narrow.dtype == np.float32
    assert 1e-4 < np.abs(off).max() < 0.008
