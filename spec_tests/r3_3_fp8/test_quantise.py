"""R 3.3.2: fine-grained quantisation. Tiles of 1 x 128, 128 x 1 and 128 x 128, ragged edges, scales, and back."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics.formats import BF16, E4M3, E5M2, E5M6, INT8
from refimpl.layers.numerics.quantisation.quantise import (
    DIALECTS,
    Dialect,
    Quantized,
    quantize,
    quantize_with,
    tile_scales,
)
from refimpl.spec_tests import golden
from refimpl.spec_tests.oracles import rational

f32 = np.float32
POWERS = [name for name, d in DIALECTS.items() if d.power_of_two]
each_dialect = pytest.mark.parametrize("dialect", DIALECTS)
TILES = [(1, 4), (4, 1), (4, 4), (3, 5), (1, 100), (100, 1)]


def bits_of(x):
    return np.asarray(x, f32).view(np.uint32)


# ---- An oracle of scalars and loops


def scale_and_value(amax, d, largest):
    """(scale, function of x that is rounded to a code) of one tile, one float32 operation at a time."""
    amax, largest = f32(amax), f32(largest)
    if d.clamp is not None and d.clamps == "amax":
        amax = max(amax, f32(d.clamp))
    elif amax == 0 and d.clamp is None:
        amax = largest
    s = f32(amax / largest) if d.scale == "amax / max" else f32(amax * f32(f32(1) / largest))
    if d.clamps == "scale":
        s = max(s, f32(d.clamp))
    if d.power_of_two == "log2":
        s = f32(2.0 ** float(np.ceil(f32(np.log2(float(s))))))
    elif d.power_of_two:
        power = Fraction(2) ** -126
        while power < Fraction(float(s)):
            power *= 2
        s = f32(float(power))
    if d.quotient == "x / s" or d.power_of_two:
        return s, lambda x: f32(f32(x) / s)
    factor = f32(f32(1) / s) if d.quotient == "x * (1 / s)" else f32(largest / amax)
    return s, lambda x: f32(f32(x) * factor)


def looped(x, tile, d, name):
    """Codes and scales, one tile and one element at a time, codes by rational arithmetic."""
    (m, k), (r, c) = x.shape, tile
    codes, scales = np.zeros((m, k), int), np.zeros((-(-m // r), -(-k // c)), f32)
    largest = float(rational.ladder(name)[-1])
    for i in range(0, m, r):
        for j in range(0, k, c):
            part = [(p, q) for p in range(i, min(i + r, m)) for q in range(j, min(j + c, k))]
            s, rounded = scale_and_value(max(abs(x[at]) for at in part), d, largest)
            scales[i // r, j // c] = s
            for at in part:
                code, beyond = rational.nearest(Fraction(float(rounded(x[at]))), name)
                assert not beyond
                codes[at] = code | int(np.signbit(x[at])) << (rational.width(name) - 1)
    return codes, scales


@each_dialect
@pytest.mark.parametrize("tile", TILES)
def test_codes_and_scales_are_those_of_the_loops(dialect, tile):
    """Catches: amax over the wrong axis, an edge tile cut or padded wrongly, one float32 operation more or less."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(7, 11)) * np.exp2(rng.integers(-8, 8, size=(7, 1)))).astype(f32)
    x[5] *= f32(1e-9)  # below the clamp
    q = quantize(x, tile, dialect=dialect)
    codes, scales = looped(x, tile, DIALECTS[dialect], "e4m3fn")
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(bits_of(q.scales), bits_of(scales))
    np.testing.assert_array_equal(bits_of(tile_scales(x, tile, dialect=dialect)), bits_of(scales))


@pytest.mark.parametrize("fmt", [E5M2, E5M6], ids=lambda f: f.name)
@pytest.mark.parametrize("dialect", ["deepseek_v3", "tilekernels", "tilekernels_ue8m0"])
def test_other_formats_scale_to_their_own_largest_value(fmt, dialect):
    """Catches: 448 for E5M6, whose scale is max(amax, 1e-4) / 65024."""
    x = np.random.default_rng(1).normal(size=(3, 9)).astype(f32)
    q = quantize(x, (1, 4), dialect=dialect, fmt=fmt)
    codes, scales = looped(x, (1, 4), DIALECTS[dialect], fmt.name)
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.scales, scales)
    assert q.codes.dtype == fmt.container


def test_int8_scales_to_127():
    """Catches: 128, which the largest element would overflow, and codes without their sign."""
    x = np.float32([[1.0, -2.0, 0.5, 0.0]])
    q = quantize(x, (1, 4), fmt=INT8)
    assert q.scales.item() == f32(2) / f32(127)
    assert q.codes.view(np.int8).tolist() == [[64, -127, 32, 0]]  # 63.5 and 31.75 to the nearest, ties to even


def test_the_recorded_gemm_is_quantised_alike():
    """Catches: any deviation from the recorded codes and scales, 1 x 128 with the clamp and 128 x all without."""
    g = golden.arrays("hopper_e4m3")
    a = quantize(g["gemm_x"], (1, 128))
    np.testing.assert_array_equal(a.codes, g["gemm_a"])
    np.testing.assert_array_equal(bits_of(a.scales), g["gemm_sa"])
    w = quantize(g["gemm_w"], 128, dialect="deepseek_v3_unclamped")
    np.testing.assert_array_equal(w.codes, g["gemm_b"])
    np.testing.assert_array_equal(bits_of(w.scales[:, 0]), g["gemm_sb"])


# ---- Properties


matrices = st.builds(
    lambda seed, m, k, e: (np.random.default_rng(seed).normal(size=(m, k)) * 2.0**e).astype(f32),
    st.integers(0, 2**32 - 1),
    st.integers(0, 9),
    st.integers(0, 9),
    st.floats(-140, 110),
)
tiles = st.tuples(st.integers(1, 5), st.integers(1, 5))
dialects = st.sampled_from(list(DIALECTS))


@settings(max_examples=150, deadline=None)
@given(x=matrices, tile=tiles, dialect=dialects, fmt=st.sampled_from([E4M3, E5M2, E5M6, INT8]))
def test_the_round_trip_errs_by_half_a_code(x, tile, dialect, fmt):
    """Catches: overflow at the top code, another tile's scale, wrong tiles on the way back.

    A code of x / s is off by half of 2^-M of x / s, or of the smallest subnormal: with INT8 always by half of 1. The
    factor 1.00001 is for the float32 operations, where there are at most four.
    """
    q = quantize(x, tile, dialect=dialect, fmt=fmt)
    s = np.repeat(np.repeat(q.scales, tile[0], 0), tile[1], 1)[: x.shape[0], : x.shape[1]].astype(float)
    relative = np.abs(x.astype(float)) * 2.0 ** -(fmt.mantissa + 1) if fmt.exponent else 0
    bound = 1.00001 * np.maximum(relative, s * fmt.tiny / 2) + 2.0**-149
    if fmt is INT8:
        bound = bound + np.abs(x) * 2.0**-22
    assert np.all(np.abs(q.dequantize().astype(float) - x) <= bound)


@settings(max_examples=100, deadline=None)
@given(x=matrices, dialect=dialects)
def test_order_is_kept_within_a_tile(x, dialect):
    """Catches: a sign or an exponent that is lost for some codes."""
    x = np.sort(x, axis=1)
    q = quantize(x, (1, 9), dialect=dialect)
    assert np.all(np.diff(q.dequantize(), axis=1) >= 0)


@settings(max_examples=100, deadline=None)
@given(x=matrices, tile=tiles, dialect=dialects, power=st.integers(-20, 20))
def test_a_power_of_two_moves_to_the_scale(x, tile, dialect, power):
    """Catches: anything absolute in the quantiser but the clamp, which is kept out of the way here."""
    how = DIALECTS[dialect]
    how = Dialect(None, "amax", how.scale, how.power_of_two if how.power_of_two == "bits" else None, how.quotient)
    x = np.where(np.abs(x) < 2.0**-70, f32(0), np.clip(x, -1e30, 1e30))
    a, b = quantize(x, tile, dialect=how), quantize(x * f32(2.0**power), tile, dialect=how)
    zero = tile_scales((x != 0).astype(f32), tile, dialect="deepseek_v3_unclamped") == 1  # it is 1 / 448 elsewhere
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(np.where(zero, 1, a.scales * f32(2.0**power)), b.scales)


@each_dialect
def test_the_largest_element_of_a_tile_uses_the_format(dialect):
    """Catches: a scale with headroom. Powers of two leave up to one bit: the top code is then above half of 448."""
    x = np.random.default_rng(2).normal(size=(40, 300)).astype(f32)
    q = quantize(x, (1, 128), dialect=dialect)
    top = np.maximum.reduceat(np.abs(E4M3.values[q.codes]), [0, 128, 256], axis=1)
    assert np.all((top > 207) & (top <= 448)) if dialect in POWERS else np.all(top == 448)


@pytest.mark.parametrize("size", [2.0**-118, 2.0**-135, 2.0**-149])
def test_a_scale_is_never_subnormal(size):
    """Catches: amax / 448 with two bits left, or zero: x / s is then far above 448, or infinite. Unclamped dialects."""
    x = np.array([[1, -0.75, 0.5, 0]], f32) * f32(size)
    q = quantize(x, (1, 4), dialect="deepseek_v3_unclamped")
    assert q.scales.item() == f32(2.0**-126)
    assert np.abs(q.dequantize() - x).max() <= max(
        2.0**-136, size * 2.0**-4
    )  # half the smallest code, or of the last bit


def test_groups_of_wgrad_are_the_transposed_ones():
    """Catches: 128 x 1 tiles that are 1 x 128 of the wrong axis (R 3.3.2, Wgrad's operands)."""
    x = np.random.default_rng(3).normal(size=(300, 50)).astype(f32)
    down, across = quantize(x, (128, 1)), quantize(x.T, (1, 128))
    np.testing.assert_array_equal(down.codes, across.codes.T)
    np.testing.assert_array_equal(down.scales, across.scales.T)
    assert down.scales.shape == (3, 50) and across.T.tile == (128, 1)
    np.testing.assert_array_equal(across.T.dequantize(), down.dequantize())


def test_dgrad_reads_the_weight_transposed_without_rounding():
    """Catches: scales left where they were when the codes are turned."""
    w = np.random.default_rng(4).normal(size=(576, 200)).astype(f32)
    q = quantize(w, 128)
    np.testing.assert_array_equal(q.T.dequantize(), q.dequantize().T)
    again = quantize(np.ascontiguousarray(w.T), 128)
    np.testing.assert_array_equal(again.codes, q.T.codes)


@pytest.mark.parametrize("shape", [(300,), (2, 3, 300), (5, 0, 300), (3, 1, 129)])
def test_leading_axes_are_rows(shape):
    """Catches: tiles that run on from one token to the next."""
    x = np.random.default_rng(5).normal(size=shape).astype(f32)
    q, flat = quantize(x), quantize(x.reshape(-1, shape[-1]))
    assert q.shape == shape and q.scales.shape == (*shape[:-1], -(-shape[-1] // 128))
    np.testing.assert_array_equal(q.codes.reshape(flat.shape), flat.codes)
    np.testing.assert_array_equal(q.dequantize().reshape(flat.shape), flat.dequantize())


@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128), (1, 100)])
def test_a_long_matrix_is_its_rows(tile):
    """Catches: a piece of the work that starts in the middle of a tile, or ends one row early."""
    x = np.random.default_rng(6).normal(size=(1500, 257)).astype(f32)
    before = x.copy()
    q = quantize(x, tile)
    for i in range(0, 1500, 128):
        part = quantize(x[i : i + 128], tile)
        np.testing.assert_array_equal(part.codes, q.codes[i : i + 128])
    np.testing.assert_array_equal(x, before)  # and is left alone


def test_values_count_as_float32():
    """Catches: bfloat16 or float64 input that is divided in another precision."""
    x = np.random.default_rng(7).normal(size=(4, 256))
    narrow = x.astype(ml_dtypes.bfloat16)
    for a in (x, narrow, x.astype(np.float16)):
        q, expected = quantize(a), quantize(a.astype(f32))
        np.testing.assert_array_equal(q.codes, expected.codes)
        np.testing.assert_array_equal(q.scales, expected.scales)


# ---- Back


def test_dequantising_rounds_once_and_to_bfloat16_twice():
    """Catches: scale_inv that divides; code times scale in bfloat16 (weight_dequant: RN_bf16(RN_f32(code * scale)))."""
    rng = np.random.default_rng(8)
    codes = rng.integers(0, 127, size=(5, 7)).astype(np.uint8)
    scales = rng.uniform(1e-3, 2e-3, size=(3, 3)).astype(f32)
    q = Quantized(codes, scales, (2, 3))
    exact = E4M3.values[codes].astype(float) * np.kron(scales.astype(float), np.ones((2, 3)))[:5, :7]
    np.testing.assert_array_equal(q.dequantize(), exact.astype(f32))
    twice = exact.astype(f32).astype(ml_dtypes.bfloat16).astype(f32)
    np.testing.assert_array_equal(q.dequantize(bf16=True), twice)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0, 6),
    tile=st.sampled_from([(1, 8), (8, 1), (8, 8)]),
    fmt=st.sampled_from([E4M3, E5M6]),
)
def test_between_powers_of_two_only_underflow_is_lost(seed, spread, tile, fmt):
    """R 3.3.3: why the scales of activations that are quantised twice are powers of two. Catches: a scale that is not.

    A value of the first tiling has M + 1 bits; divided by another power of two it has them still, unless it falls
    among the subnormals of the new tile, where it may be off by half of the smallest.
    """
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(16, 24)) * np.exp2(rng.normal(size=(16, 24)) * spread)).astype(f32)
    first = quantize(x, (1, 8), dialect="tilekernels_ue8m0", fmt=fmt)
    second = first.requantize(tile, "tilekernels_ue8m0")
    old, new = first.dequantize(), second.dequantize()
    s = np.repeat(np.repeat(second.scales, tile[0], 0), tile[1], 1)
    normal = np.abs(old) >= s * 2.0**fmt.min_exponent
    np.testing.assert_array_equal(old[normal], new[normal])
    assert np.all(np.abs(old - new) <= s * fmt.tiny / 2)


def test_with_float32_scales_the_second_quantisation_rounds_again():
    """Catches: taking the line above for true of every scale: here most values move."""
    x = np.random.default_rng(9).normal(size=(256, 256)).astype(f32)
    first = quantize(x)
    second = first.requantize((128, 1))
    moved = np.mean(first.dequantize() != second.dequantize())
    assert moved > 0.5
    assert second.tile == (128, 1) and second.fmt is E4M3
    np.testing.assert_array_equal(first.requantize((1, 128)).codes, first.codes)  # the same tiles: nothing moves


def test_with_given_scales_overflow_is_as_said():
    """Catches: scales of somebody else that are used, but not checked, or replaced by our own."""
    x = np.float32([[1, -600, 449, 464.5]])
    one = np.float32([[1]])
    assert quantize_with(x, one, (1, 4), overflow="saturate").dequantize().tolist() == [[1, -448, 448, 448]]
    back = quantize_with(x, one, (1, 4), overflow="overflow").dequantize()
    np.testing.assert_array_equal(back, [[1, np.nan, 448, np.nan]])
    with pytest.raises(SpecError, match=r"up / scale\[0, 1\] = -600.0"):
        quantize_with(x, one, (1, 4), overflow="refuse", name="up")
    q = quantize(x, (1, 4))
    np.testing.assert_array_equal(quantize_with(x, q.scales, (1, 4), overflow="refuse").codes, q.codes)


# ---- What is refused


def broken(x, at, value):
    x = x.copy()
    x[at] = value
    return x


ONES = np.ones((300, 200), f32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("tile", "says"),
    [
        ((1, 128), r"kv_a: block \(290, 1\) = row 290, columns 128:200 holds NaN or Inf"),
        ((128, 128), r"kv_a: block \(2, 1\) = rows 256:300, columns 128:200 holds NaN or Inf"),
        ((128, 1), r"kv_a: block \(2, 150\) = rows 256:300, columns 150:151 holds NaN or Inf"),
    ],
)
def test_values_that_are_not_finite_are_refused_by_block(value, tile, says):
    """Catches: one NaN that spoils its tile through amax, or an infinity that makes all others zero."""
    with pytest.raises(SpecError, match=says):
        quantize(broken(ONES, (290, 150), value), tile, name="kv_a")


def test_a_bad_token_of_a_batch_is_named_by_all_its_indices():
    """Catches: a row number of the flattened batch, which nobody can look up."""
    x = np.ones((2, 3, 200), f32)
    with pytest.raises(SpecError, match=r"x: block \(1, 2, 0\) = row 1, 2, columns 0:128 holds"):
        quantize(broken(x, (1, 2, 5), np.nan))
    with pytest.raises(SpecError, match=r"holds NaN or Inf"):
        quantize(np.full((2, 2), 1e300))  # beyond float32


@pytest.mark.parametrize("value", [0.0, -1e-3, np.nan, np.inf, 1e37])
def test_impossible_scales_are_refused_by_block(value):
    """Catches: division by zero, a sign that turns a tile round, overflow of the largest code."""
    q = quantize(ONES, (1, 128))
    says = r"up scale is not finite, positive and at most 7.6e\+35 for block \(3, 1\) = row 3, columns 128:200"
    with pytest.raises(SpecError, match=says):
        Quantized(q.codes, broken(q.scales, (3, 1), value), (1, 128), E4M3, "up")
    with pytest.raises(SpecError, match="up scale is not"):
        quantize_with(ONES, broken(q.scales, (3, 1), value), (1, 128), overflow="saturate", name="up")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda q: Quantized(q.codes, q.scales.T, (1, 128), E4M3, "up"),
            r"up scales have shape \(2, 300\); expected \(300, 2\)",
        ),
        (lambda q: Quantized(q.codes, q.scales, (1, 64), E4M3, "up"), r"expected \(300, 4\)"),
        (lambda q: Quantized(q.codes, q.scales, (128, 128), E4M3, "up"), r"expected \(3, 2\)"),
        (lambda q: Quantized(q.codes, q.scales.view(np.uint32), (1, 128), E4M3, "up"), "up scales have dtype uint32"),
        (lambda q: Quantized(q.codes, q.scales, (1, 128), E5M6, "up"), "up codes has dtype uint8; expected uint16"),
        (lambda q: Quantized(q.codes, q.scales, (0, 128), E4M3, "up"), "must be positive"),
        (lambda q: quantize(ONES, (1, 0)), "must be positive"),
        (lambda q: quantize(ONES, (1, 2.0)), "must be positive"),
        (
            lambda q: quantize(np.ones((2, 3, 4), f32), (2, 2), name="up"),
            r"up has shape \(2, 3, 4\); blocks tile a matrix",
        ),
        (lambda q: quantize(f32(1), name="up"), r"up has shape \(\)"),
        (lambda q: quantize(q.codes, name="up"), "up has dtype uint8; expected floating-point"),
        (lambda q: quantize(ONES, dialect="deepseek"), "dialect 'deepseek'; known: deepseek_v3,"),
        (lambda q: quantize(np.ones((2, 3, 4), f32), name="up").T, "only a matrix is transposed"),
        (lambda q: q.scale_codes, r"x scales\[0, 0\] is .*; expected a power of two"),
    ],
)
def test_wrong_tiles_and_scales_are_refused_by_name(make, says):
    """Catches: a tile size from another config, a transposed or packed grid of scales, codes quantised twice."""
    with pytest.raises(SpecError, match=says):
        make(quantize(ONES))


def test_scales_in_e8m0_and_bfloat16_are_numbers():
    """Catches: an E8M0 scale read as an integer, or refused although its dtype says what it is."""
    codes = np.full((1, 4), 0x38, np.uint8)  # 1.0
    for dtype in (ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16, np.float64):
        assert Quantized(codes, np.array([[8.0]]).astype(dtype), (1, 4)).dequantize().tolist() == [[8] * 4]
    assert Quantized(codes.view(E4M3.dtype), np.ones((1, 1), BF16.dtype), (1, 4)).codes.dtype == np.uint8
