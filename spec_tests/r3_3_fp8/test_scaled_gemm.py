"""R 3.3.2: FP8 GEMMs with scales per tile, promoted to float32 every N_C = 128, under the names of their kernels."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics import MODES, Quantized, mxf8f6f4, quantize, scaled_gemm, tensor_core_matmul
from refimpl.layers.numerics.formats import E2M1, E5M2
from refimpl.layers.numerics.tensor_cores.gemm import fma32
from refimpl.spec_tests import golden
from refimpl.spec_tests.cases.tensor_core import as_bits
from refimpl.spec_tests.oracles import tensor_core as oracle

ORDERS = {
    "deepgemm_sm90": "gemm_out_deepgemm_fma",
    "triton_sm90_wgmma": "gemm_out_triton_fma",
    "triton_sm90_wgmma_unfused": "gemm_out_unfused",
}
UE8M0 = "deepgemm_ue8m0"  # scales that are powers of two


def recorded():
    """The recorded GEMM: activations in 1 x 128, weights in 128 x 128."""
    z = golden.arrays("hopper_e4m3")
    a = Quantized(z["gemm_a"], z["gemm_sa"].view(np.float32), (1, 128), name="a")
    b = Quantized(np.ascontiguousarray(z["gemm_b"].T), z["gemm_sb"].view(np.float32)[None], (128, 128), name="b")
    return a, b


def gaussian(m=40, n=200, k=384, seed=0, dialect="deepseek_v3", tile_b=128):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(m, k)).astype(np.float32), rng.normal(size=(n, k)).astype(np.float32)
    return quantize(x, dialect=dialect, name="x"), quantize(w, tile_b, dialect=dialect, name="w")


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def fused(x, y, z):
    """RN32(x y + z) in rational numbers."""
    exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
    if exact == 0:
        return np.float32(0)
    return np.float32(oracle.rounded(exact, 23, -126, 127, True))


# ------------------------------------------------------------------------------------------------------ fma and modes


@settings(max_examples=300, deadline=None)
@given(
    x=st.floats(-(2.0**60), 2.0**60, width=32),
    y=st.floats(-(2.0**60), 2.0**60, width=32),
    z=st.floats(-(2.0**100), 2.0**100, width=32),
    near=st.integers(-3, 3),
)
def test_fma_is_one_rounding(x, y, z, near):
    """Catches the sum rounded to float64 first. `near` puts the addend within ulps of minus the product."""
    x, y, z = np.float32(x), np.float32(y), np.float32(z)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        beside = -(x * y)
        for _ in range(abs(near)):
            beside = np.nextafter(beside, np.float32(np.inf if near > 0 else -np.inf))
    for addend in [z] + ([beside] if np.isfinite(beside) else []):
        found = fma32(np.array([x]), np.array([y]), np.array([addend]))[0]
        assert float(found) == float(fused(x, y, addend))


def test_fma_where_float64_rounds_twice():
    """Catches float32(float64(x * y) + z): a random test passes that, this value does not."""
    x, z = np.array([1 + 2.0**-12], np.float32), np.array([2.0**-60], np.float32)
    assert as_bits(fma32(x, x, z))[0] == 0x3F801001
    assert as_bits(np.float32(x.astype(np.float64) * x + z))[0] == 0x3F801000


@settings(max_examples=200, deadline=None)
@given(
    k=st.integers(-60, 60),
    i=st.integers(0, 2**11 - 1),
    signs=st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3),
    tie=st.booleans(),
    beside=st.sampled_from([2.0**-60, *(2.0**-q * (1 + d * 2.0**-20) for q in (51, 52, 53) for d in (-1, 1))]),
)
def test_fma_rounds_once_wherever_the_tie_is(k, i, signs, tie, beside):
    """A product half way between two float32, or on one, and an addend that float64 loses, wholly or but for two of its last
    places; any size, any signs. Catches a correction the wrong way below 1 or for negative sums, and one by two places.
    """
    product_sign, y_sign, z_sign = signs
    x = np.array([product_sign * y_sign * (1 + (2 * i + 1) * 2.0**-12) * 2.0 ** (k // 2)], np.float32)
    y = np.array([y_sign * (1 + 2.0**-12 if tie else 1) * 2.0 ** (k - k // 2)], np.float32)
    z = np.array([z_sign * beside * 2.0**k], np.float32)
    assert float(fma32(x, y, z)[0]) == float(fused(x[0], y[0], z[0]))


def test_fma_keeps_infinities_and_nan():
    """Catches bits moved in an infinity, which makes it NaN."""
    x = np.array([np.inf, -np.inf, 2.0**127, np.nan], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        found = fma32(x, np.float32(2) * np.ones(4, np.float32), np.ones(4, np.float32))
    np.testing.assert_array_equal(found, np.array([np.inf, -np.inf, np.inf, np.nan], np.float32))


@pytest.mark.parametrize("mode", ORDERS)
def test_the_recorded_gemm_in_each_order_of_scales(mode):
    """Catches the order of the scales, fma or not, transposed scales, and promotion at another interval."""
    c = scaled_gemm(*recorded(), mode=mode)
    np.testing.assert_array_equal(as_bits(c), golden.arrays("hopper_e4m3")[ORDERS[mode]])


def test_half_of_the_float32_results_differ_between_kernels_and_no_bfloat16():
    """Catches a mode that is another one's alias; and says why BF16-level comparison does not show the difference."""
    deepgemm, triton, unfused = (scaled_gemm(*recorded(), mode=mode) for mode in ORDERS)
    assert np.mean(deepgemm != triton) == pytest.approx(0.54, abs=0.01)
    assert np.mean(triton != unfused) == pytest.approx(0.50, abs=0.01)
    bf16 = [c.astype(ml_dtypes.bfloat16).view(np.uint16) for c in (deepgemm, triton, unfused)]
    np.testing.assert_array_equal(bf16[0], bf16[1])
    np.testing.assert_array_equal(bf16[1], bf16[2])


def test_with_power_of_two_scales_the_order_does_not_matter():
    """Catches a scale applied before truncation: c = RN(c + D 2^j) in all three orders."""
    a, b = gaussian(dialect=UE8M0)
    first, *others = (as_bits(scaled_gemm(a, b, mode=mode)) for mode in ORDERS)
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_every_mode_is_its_statement():
    """Catches a table whose words and numbers part; the scalar text of each mode, one output at a time."""
    a, b = gaussian(m=6, n=5, k=300, dialect=UE8M0)
    for mode, how in MODES.items():
        c = scaled_gemm(a, b, mode=mode)
        assert c.dtype == (np.float64 if mode == "exact" else np.float32)
        assert how.name == mode and how.says
        for m, n in np.ndindex(c.shape):
            assert float(c[m, n]) == stated(mode, a, b, m, n), (mode, m, n)


def in_steps_of_mma(codes):
    """Each 32 of k in the order in which Triton's registers feed two mma.sync of 16."""
    codes = codes + [0] * (-len(codes) % 32)
    order = sorted(range(32), key=lambda k: (k % 4 > 1, k))
    return [codes[first + k] for first in range(0, len(codes), 32) for k in order]


def stated(mode, a, b, m, n):
    """One output by the words of MODES, with scalars; scales are powers of two, so that "exact" is exact."""
    x, y = (q.codes[i].view(ml_dtypes.float8_e4m3fn).astype(np.float32) for q, i in ((a, m), (b, n)))
    acc, total = np.float32(0), Fraction(0)
    sa, sb = a.scales[m], b.scales[n // 128]
    if mode == "deepgemm_sm100":
        shift = [round(np.log2(float(sa[k // 128]) * float(sb[k // 128]))) for k in range(0, len(x), 32)]
        bits = oracle.dot(a.codes[m].tolist(), b.codes[n].tolist(), 0, "blackwell", "e4m3", scale=shift)
        return float(np.uint32(bits).view(np.float32))
    for g, k in enumerate(range(0, len(x), 128)):
        part = slice(k, k + 128)
        if mode == "exact":
            products = zip(x[part], y[part], strict=True)
            total += (
                sum((Fraction(float(p)) * Fraction(float(q)) for p, q in products), Fraction(0))
                * Fraction(float(sa[g]))
                * Fraction(float(sb[g]))
            )
            continue
        if mode == "fp32":
            d = np.float32(0)
            for p, q in zip(x[part], y[part], strict=True):
                d = np.float32(d + np.float32(p * q))
        elif mode == "triton_sm90_mma":
            half = [in_steps_of_mma(v[part].astype(np.float16).view(np.uint16).tolist()) for v in (x, y)]
            d = np.uint32(oracle.dot(*half, 0, "hopper", "f16")).view(np.float32)
        else:
            codes = a.codes[m, part].tolist(), b.codes[n, part].tolist()
            d = np.uint32(oracle.dot(*codes, 0, "hopper", "e4m3")).view(np.float32)
        acc = np.float32(acc + np.float32(d * np.float32(sa[g] * sb[g])))
    return float(total) if mode == "exact" else float(acc)


def test_mma_sync_loses_nothing_where_wgmma_does():
    """Catches DeepSeek's Triton kernel taken for one arithmetic: BLOCK_M decides between F = 13 and F = 25."""
    a, b = gaussian(k=1024)
    true = scaled_gemm(a, b, mode="exact")
    error = {m: rms(scaled_gemm(a, b, mode=m) - true) / rms(true) for m in MODES if m != "deepgemm_sm100"}
    assert 1e-4 < error["triton_sm90_wgmma"] < 1.6e-4
    assert error["triton_sm90_mma"] < 2e-7 and error["fp32"] < 4e-7


# ---------------------------------------------------------------------------------------------------------- promotion


def test_promotion_is_what_keeps_long_sums_of_one_sign():
    """R 3.3.2: catches promotion that does nothing. Same-sign data at K = 7168: one chain loses 11 %, N_C = 128 0.06 %."""
    rng = np.random.default_rng(0)
    x, w = (np.abs(rng.normal(size=(rows, 7168))).astype(np.float32) for rows in (8, 64))
    a, b = quantize(x, (8, 7168)), quantize(w, (64, 7168))  # one scale each, so that one chain is possible
    true = scaled_gemm(a, b, mode="exact")

    def loss(interval):
        return float(np.mean(1 - scaled_gemm(a, b, interval=interval) / true))

    assert loss(7168) == pytest.approx(0.11, abs=0.01)
    assert loss(128) == pytest.approx(6.3e-4, abs=0.4e-4)
    assert loss(32) < loss(128) < loss(512) < loss(7168)


def test_the_report_s_two_percent_at_4096():
    """R 3.3.2: "a maximum relative error of nearly 2 %" at K = 4096 without promotion; Gaussian data, error against the
    largest output. Catches a chain that rounds instead of truncating (0.1 %).
    """
    rng = np.random.default_rng(1)
    x, w = (rng.uniform(0, 1, size=(rows, 4096)).astype(np.float32) for rows in (16, 64))
    a, b = quantize(x, (16, 4096)), quantize(w, (64, 4096))
    true = scaled_gemm(a, b, mode="exact")
    without = np.abs(scaled_gemm(a, b, interval=4096) - true).max() / np.abs(true).max()
    assert 0.01 < without < 0.08
    assert np.abs(scaled_gemm(a, b, interval=128) - true).max() / np.abs(true).max() < 0.001


@pytest.mark.parametrize("interval", [32, 64, 96])
def test_an_interval_shorter_than_the_tile(interval):
    """Catches an interval that is ignored, or scales of the next tile; 96 leaves 32 at the end of each tile."""
    a, b = gaussian(m=4, n=3, k=256, tile_b=(1, 128))
    c = np.zeros((4, 3), np.float32)
    for k in range(0, 256, 128):
        for start in range(k, k + 128, interval):
            part = slice(start, min(start + interval, k + 128))
            d = tensor_core_matmul(a.codes[:, part], b.codes[:, part], np.float32(0), arch="hopper", fmt="e4m3")
            sigma = (a.scales[:, k // 128, None] * b.scales[:, k // 128]).astype(np.float32)
            c = fma32(sigma, d, c)
    np.testing.assert_array_equal(as_bits(scaled_gemm(a, b, interval=interval)), as_bits(c))


# ------------------------------------------------------------------------------------------------------ shapes, errors


@pytest.mark.parametrize("mode", [m for m in MODES if m != "deepgemm_sm100"])
def test_ragged_tiles(mode):
    """Catches 576 rows as 4 blocks, a short last tile scaled by its neighbour, and scales of the wrong axis."""
    a, b = gaussian(m=3, n=130, k=200)
    c = scaled_gemm(a, b, mode=mode)
    for n in (0, 127, 128, 129):
        row = Quantized(b.codes[n : n + 1], b.scales[n // 128 : n // 128 + 1], (1, 128), name="row")
        np.testing.assert_array_equal(scaled_gemm(a, row, mode=mode)[:, 0], c[:, n])
    padded = [np.pad(q.codes, ((0, 0), (0, 56))) for q in (a, b)]
    full = [Quantized(p, q.scales, q.tile) for p, q in zip(padded, (a, b), strict=True)]
    np.testing.assert_array_equal(scaled_gemm(*full, mode=mode), c)


def test_deepgemm_sm100_is_one_chain_of_mxf8f6f4():
    """Catches a promotion that Blackwell's kernel does not have, and scales of 128 not repeated per 32."""
    a, b = gaussian(m=20, n=140, k=300, dialect=UE8M0)
    sa = np.repeat(a.scale_codes, 4, axis=1)[:, :10]
    sb = np.repeat(np.repeat(b.scale_codes, 128, axis=0), 4, axis=1)[:140, :10]
    expected = mxf8f6f4(a.codes, b.codes, np.zeros((20, 140), np.float32), sa, sb)
    np.testing.assert_array_equal(as_bits(scaled_gemm(a, b, mode="deepgemm_sm100")), as_bits(expected))
    assert np.mean(expected != scaled_gemm(a, b)) > 0.5


def test_the_order_of_k_in_triton_s_mma_sync_shows_where_bits_are_lost():
    """Catches steps of 16 consecutive k: FP8 registers hold four k, and an FP16 mma.sync takes two of each."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 0x7F, (2, 30, 128)).astype(np.uint8)  # all sizes: F = 25 loses bits
    a, b = (Quantized(q, np.ones((30, 1), np.float32), (1, 128)) for q in codes)
    half = [q.view(ml_dtypes.float8_e4m3fn).astype(np.float16) for q in codes]
    consecutive = tensor_core_matmul(*half, np.float32(0), arch="hopper", fmt="f16")
    c = scaled_gemm(a, b, mode="triton_sm90_mma")
    assert 0.2 < np.mean(c != consecutive) < 1
    order = [*range(128)]
    order.sort(key=lambda k: (k // 32, k % 4 > 1))
    ordered = tensor_core_matmul(half[0][:, order], half[1][:, order], np.float32(0), arch="hopper", fmt="f16")
    np.testing.assert_array_equal(c, ordered)


def test_leading_axes_of_the_activations():
    """Catches tokens that take each other's scales."""
    a, b = gaussian(m=12)
    batched = Quantized(a.codes.reshape(3, 4, -1), a.scales.reshape(3, 4, -1), (1, 128))
    c = scaled_gemm(batched, b)
    assert c.shape == (3, 4, 200)
    np.testing.assert_array_equal(c.reshape(12, 200), scaled_gemm(a, b))


def test_wgrad_operands_in_columns_are_turned():
    """Catches a Wgrad that multiplies along the wrong axis: dW = dYᵀ X with both in 128 x 1 (R 3.3.2)."""
    rng = np.random.default_rng(3)
    dy, x = rng.normal(size=(256, 10)).astype(np.float32), rng.normal(size=(256, 12)).astype(np.float32)
    a, b = quantize(dy, (128, 1)).T, quantize(x, (128, 1)).T
    left, right = a.dequantize().astype(float), b.dequantize().astype(float)  # each rounded to float32
    tolerance = 2.0**-23 * np.abs(left) @ np.abs(right).T
    assert (np.abs(scaled_gemm(a, b, mode="exact") - left @ right.T) <= tolerance).all()


def test_e5m2_codes():
    """Catches E4M3 assumed for every FP8 code."""
    rng = np.random.default_rng(4)
    a, b = (quantize(rng.normal(size=(9, 256)).astype(np.float32), fmt=E5M2) for _ in "ab")
    true = a.dequantize().astype(float) @ b.dequantize().astype(float).T
    for mode in MODES:
        if mode != "deepgemm_sm100":
            np.testing.assert_allclose(scaled_gemm(a, b, mode=mode), true, atol=1e-3 * np.abs(true).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "deepgemm"}, "mode 'deepgemm'; known: deepgemm_sm90"),
        ({"interval": 256}, "interval 256; expected at most 128, the tile along k"),
        ({"interval": 0}, "interval 0; expected at most 128"),
        ({"mode": "deepgemm_sm100"}, "x scales\\[0, 0\\] is .*; expected a power of two"),
        ({"b": gaussian(k=256)[1]}, "x \\(40, 384\\) and w \\(200, 256\\): K differs"),
        ({"b": quantize(np.ones((200, 384), np.float32), (1, 64), name="w")}, "x has tiles of 128 along k, w of 64"),
        ({"b": quantize(np.ones((200, 384), np.float32), 128, fmt=E5M2, name="w")}, "x is e4m3fn, w is e5m2; expected"),
    ],
)
def test_operands_that_do_not_fit_are_refused_by_name(change, message):
    """Catches broadcasting of scales, and a promotion that spans tiles of different scale."""
    a, b = gaussian()
    call = {"a": a, "b": b} | change
    with pytest.raises(SpecError, match=message):
        scaled_gemm(call.pop("a"), call.pop("b"), **call)


def test_four_bit_codes_have_their_own_instructions():
    """Catches MXFP4 fed to an FP8 kernel."""
    x = quantize(np.ones((4, 128), np.float32), fmt=E2M1)
    with pytest.raises(SpecError, match="x has format e2m1fn; expected e4m3fn or e5m2"):
        scaled_gemm(x, x)
