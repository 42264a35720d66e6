"""Block-scaled FP8 weights: what weight_scale_inv means, ragged edges, and what must be refused."""

import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics import block_scales, dequantize_blocks, quantize_blocks

E4M3 = ml_dtypes.float8_e4m3fn


def e4m3_value(code):
    """The value of an E4M3 code from the format's definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


VALUES = np.array([e4m3_value(c) for c in range(256)])


def random_codes(rng, shape):
    return rng.choice([c for c in range(256) if c & 127 != 127], size=shape).astype(np.uint8)


def looped(codes, scale, block):
    """w = code * scale of its block, one element at a time, in float64."""
    w = np.empty(codes.shape)
    for o in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            w[o, i] = VALUES[codes[o, i]] * float(scale[o // block, i // block])
    return w


# ----------------------------------------------------------------------------------- dequantisation


def kv_a_like(rng):
    """576 rows as kv_a_proj_with_mqa has: 4.5 blocks; 200 columns: 1.56 blocks."""
    return random_codes(rng, (576, 200)), rng.uniform(1e-3, 2e-3, size=(5, 2)).astype(np.float32)


def test_scale_inv_multiplies_its_block_also_at_ragged_edges():
    """Catches: dividing by scale_inv (its name), scales per row, a last block of the wrong rows."""
    codes, scale = kv_a_like(np.random.default_rng(0))
    w = dequantize_blocks(codes.view(E4M3), scale)
    assert w.dtype == np.float32
    # one float32 rounding of an exact product
    np.testing.assert_array_equal(w, looped(codes, scale, 128).astype(np.float32))


@pytest.mark.parametrize("wrong", [116, 125])
def test_block_size_inferred_from_the_scale_shape_is_wrong(wrong):
    """Catches F01/F02: ceil(576 / 5) = 116 (TensorRT-LLM #14793) and 125 have 5 x 2 blocks as well.

    No shape check can tell them apart, so the size must be given: 128, or what the config says.
    """
    codes, scale = kv_a_like(np.random.default_rng(1))
    right = dequantize_blocks(codes.view(E4M3), scale)
    mistaken = dequantize_blocks(codes.view(E4M3), scale, wrong)  # accepted: the shapes agree
    assert np.array_equal(mistaken, looped(codes, scale, wrong).astype(np.float32))
    assert np.mean(mistaken != right) > 0.05


def test_blocks_need_not_be_square():
    """Catches: rows and columns of weight_block_size exchanged."""
    rng = np.random.default_rng(2)
    codes, scale = random_codes(rng, (10, 9)), rng.uniform(1, 2, size=(5, 2)).astype(np.float32)
    w = dequantize_blocks(codes.view(E4M3), scale, (2, 5))
    expected = VALUES[codes] * np.kron(scale, np.ones((2, 5)))[:10, :9]
    np.testing.assert_array_equal(w, expected.astype(np.float32))


@pytest.mark.parametrize("shape", [(2, 5), (5, 1), (4, 2), (5, 2, 1), (10,)])
def test_scales_of_another_shape_are_refused(shape):
    """Catches F06: the grid transposed or floored, which broadcasting or indexing would hide."""
    codes, _ = kv_a_like(np.random.default_rng(3))
    with pytest.raises(SpecError, match=re.escape(f"shape {shape}; expected (5, 2)")):
        dequantize_blocks(codes.view(E4M3), np.ones(shape, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -1e-3, 1e37, 1e300])
def test_impossible_scales_are_refused_by_block(bad):
    """Catches: NaN, overflow or zeros that spread silently through a 671B model."""
    codes, scale = kv_a_like(np.random.default_rng(4))
    scale = scale.astype(np.float64)
    scale[4, 1] = bad
    with pytest.raises(SpecError, match=r"block \(4, 1\) = rows 512:576, columns 128:200"):
        dequantize_blocks(codes.view(E4M3), scale)


@pytest.mark.parametrize(
    ("codes", "block", "says"),
    [
        (np.ones((2, 2), np.uint8), 128, "dtype uint8"),
        (np.ones((2, 2), np.float32), 128, "dtype float32"),
        (np.ones(4, E4M3), 128, "blocks tile a matrix"),
        (np.ones((2, 2), E4M3), 0, "must be positive"),
    ],
)
def test_what_is_no_block_quantised_matrix_is_refused(codes, block, says):
    """Catches: dequantising twice, or integer codes taken for values."""
    with pytest.raises(SpecError, match=says):
        dequantize_blocks(codes, np.ones((1, 1), np.float32), block)


def test_e5m2_and_power_of_two_scales_are_understood():
    """Catches: E5M2 codes looked up in E4M3's table; E8M0 scales read as integers."""
    codes = np.array([[0x3C, 0xC0]], np.uint8).view(ml_dtypes.float8_e5m2)  # 1, -2
    scale = np.array([[130]], np.uint8).view(ml_dtypes.float8_e8m0fnu)  # 2^3
    assert dequantize_blocks(codes, scale).tolist() == [[8, -16]]
    with pytest.raises(SpecError, match=r"at most 5\.93e\+33"):  # E5M2's largest code is 57344
        dequantize_blocks(codes, np.array([[1e34]]))


@pytest.mark.parametrize("scale", [2.0**-149, 1.1754943e-38, 3e-38, 1.3e-4, 1.0, 127.9, 128.0, 128.1, 7e35])
@pytest.mark.parametrize("rows", [7, 8, 9])
def test_every_code_times_any_scale_is_rounded_once(scale, rows):
    """Catches: subnormal codes or products flushed to 0 or rounded twice, a sign in the wrong bit, -0 lost, an exponent pushed to
    infinity, NaN codes read as 480, a ragged tile: moved bits (from 8 rows a tile on) and the table agree with the definition."""
    codes = np.resize(np.arange(256, dtype=np.uint8), (2 * rows + 1, 259))
    finite = np.where((codes & 127) == 127, 0, codes).astype(np.uint8)
    scales = np.full((3, 3), scale, np.float32)
    for some, has_nan in ((finite, False), (codes, True), (np.where(codes == 255, 0, codes).astype(np.uint8), True)):
        w = dequantize_blocks(some.view(E4M3), scales, (rows, 128))
        with np.errstate(under="ignore"):
            expected = (VALUES[some] * float(np.float32(scale))).astype(np.float32)  # exact in float64
        assert np.isnan(w).any() == has_nan
        np.testing.assert_array_equal(w.view(np.int32)[~np.isnan(w)], expected.view(np.int32)[~np.isnan(expected)])


def test_memory_beside_the_result_is_a_row_of_blocks():
    """Catches: a float64 or repeated-scale copy of the whole matrix."""
    codes = np.ones((4096, 1024), E4M3)
    scale = np.ones((32, 8), np.float32)
    tracemalloc.start()
    w = dequantize_blocks(codes, scale)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < w.nbytes + 4 * 128 * 1024 * 4  # the result and at most four rows of blocks


# ------------------------------------------------------------------------------------- quantisation


def test_codes_are_the_nearest_to_w_over_amax_over_448():
    """Catches: truncation, a scale of amax / 240 or 1 / amax, amax per row, ragged blocks mis-cut."""
    rng = np.random.default_rng(5)
    w = rng.normal(size=(20, 13)).astype(np.float32)
    codes, scale = quantize_blocks(w, 8)
    assert codes.shape == w.shape and scale.shape == (3, 2)
    finite = VALUES[~np.isnan(VALUES)]
    for o in range(20):
        for i in range(13):
            block = w[o // 8 * 8 : o // 8 * 8 + 8, i // 8 * 8 : i // 8 * 8 + 8]
            s = np.abs(block).max() / np.float32(448)
            assert scale[o // 8, i // 8] == s
            got = VALUES[codes.view(np.uint8)[o, i]]
            # no code is nearer (by more than the rounding of the float32 division)
            assert abs(got - w[o, i] / s) <= np.abs(finite - w[o, i] / s).min() + 448 * 2.0**-23


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(1, 17),
    st.floats(-150, 125),
    st.sampled_from([None, "ue8m0"]),
)
def test_round_trip_error_is_half_a_code(seed, rows, cols, block, magnitude, scale_fmt):
    """Catches: overflow to NaN at the top code, loss of small blocks, ragged and empty matrices.

    E4M3 rounds w/s by at most 2^-4 of it (3 mantissa bits) or 2^-10 (spacing of subnormals 2^-9);
    the factor 1.001 is for the float32 division and multiplication.
    """
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(rows, cols)) * 2.0**magnitude
    w = np.clip(w, -3e38, 3e38).astype(np.float32)
    codes, scale = quantize_blocks(w, block, scale_fmt=scale_fmt)
    back = dequantize_blocks(codes, scale, block).astype(np.float64)
    s = np.kron(scale.astype(np.float64), np.ones((block, block)))[:rows, :cols]
    bound = 1.001 * np.maximum(np.abs(w.astype(np.float64)) * 2.0**-4, s * 2.0**-10)
    assert np.all(np.abs(back - w) <= bound + 2.0**-149)


def test_largest_element_of_every_block_gets_the_largest_code():
    """Catches: a scale with headroom, which wastes the format's top."""
    codes, _ = quantize_blocks(np.random.default_rng(6).normal(size=(300, 300)))
    top = np.abs(codes.astype(np.float32))
    assert all(top[i : i + 128, j : j + 128].max() == 448 for i in (0, 128, 256) for j in (0, 128, 256))


def test_requantising_a_dequantised_matrix_changes_nothing():
    """Catches: a drift of weights through load and save."""
    codes, scale = quantize_blocks(np.random.default_rng(7).normal(size=(300, 200)))
    w = dequantize_blocks(codes, scale)
    again, scale_again = quantize_blocks(w)
    np.testing.assert_allclose(scale_again, scale, rtol=2**-23)  # amax * 448 / 448 rounds twice
    np.testing.assert_array_equal(again.view(np.uint8), codes.view(np.uint8))


def test_zero_blocks_stay_zero():
    """Catches F08 (lmdeploy #3652): 0 / 0 = NaN for a block of zeros."""
    w = np.ones((8, 8), np.float32)
    w[:4, :4] = 0
    codes, scale = quantize_blocks(w, 4)
    assert scale[0, 0] == 1
    assert np.array_equal(dequantize_blocks(codes, scale, 4), w)


def test_subnormal_blocks_do_not_divide_by_zero():
    """Catches: amax / 448 = 0 for amax below 448 * 2^-149, and x / 0 = Inf, which E4M3 makes NaN."""
    w = np.full((2, 2), 100 * 2.0**-149)
    codes, scale = quantize_blocks(w)
    assert scale[0, 0] == np.float32(2.0**-126)
    assert not dequantize_blocks(codes, scale).any()  # too small for a code, but finite


def test_power_of_two_scales_are_rounded_up_before_the_division():
    """Catches F09/F10: codes from the exact scale beside a rounded one (off by up to 2 silently)."""
    rng = np.random.default_rng(8)
    w = (rng.normal(size=(64, 64)) * np.exp(rng.normal(size=(64, 1)) * 3)).astype(np.float32)
    exact = block_scales(w, 16)
    codes, scale = quantize_blocks(w, 16, scale_fmt="ue8m0")
    assert np.all(np.log2(scale) % 1 == 0)
    assert np.all((exact <= scale) & (scale < 2 * exact))
    np.testing.assert_allclose(dequantize_blocks(codes, scale, 16), w, rtol=2**-4, atol=scale.max() / 500)


def test_a_scale_that_is_a_power_of_two_stays():
    """Catches: ceil(log2 s) + 1 for exact powers; 448 * 2^-5 / 448 is 2^-5."""
    assert block_scales(np.array([[14.0]]), scale_fmt="ue8m0").item() == 2.0**-5
    above = np.nextafter(np.float32(14), np.float32(15))
    assert block_scales(np.array([[above]]), scale_fmt="ue8m0").item() == 2.0**-4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_weights_that_are_not_finite_are_refused_by_block(bad):
    """Catches: one NaN that makes its whole block NaN through amax."""
    w = np.ones((20, 20))
    w[13, 3] = bad
    with pytest.raises(SpecError, match=r"block \(1, 0\) = rows 8:16, columns 0:8 holds NaN or Inf"):
        quantize_blocks(w, 8)
