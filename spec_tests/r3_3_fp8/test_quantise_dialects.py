"""Where DeepSeek's own implementations of block FP8 differ, row by row (49 to 57 of the comparison this follows), each with
the size of the difference. Sources: DeepSeek-V3 inference/kernel.py (9b4e978) and its history, DeepSeek-V3.2-Exp
inference/kernel.py (3b99a53), DeepGEMM utils/math.py (54e2261), TileKernels quant/common.py (36d9e45), DeepEP (dd758ca),
FlashMLA tests/quant.py (9241ae3), SGLang requant_weight_ue8m0.
"""

import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics.formats import E4M3, decode, to_bf16
from refimpl.layers.numerics.quantisation.quantise import DIALECTS, quantize, quantize_with
from refimpl.spec_tests import golden

f32 = np.float32


def activations(rows=512, *, bf16=True, seed=0):
    """Gaussian rows of very different size, as bfloat16 values unless said otherwise."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(rows, 1024)) * np.exp2(rng.uniform(-4, 4, size=(rows, 1)))).astype(f32)
    return to_bf16(x) if bf16 else x


def error(x, q):
    """Relative root mean square error of a quantised tensor."""
    d = q.dequantize().astype(float) - x
    return np.sqrt(np.sum(d * d) / np.sum(x.astype(float) ** 2))


def codes_that_differ(x, one, other):
    a, b = quantize(x, dialect=one), quantize(x, dialect=other)
    off = np.abs(a.codes.astype(int) - b.codes)
    assert off.max() <= 1, "neighbouring codes at most"
    return off.sum()


def test_row_49_the_clamp_of_amax():
    """Floor 1e-4 under amax since 2025-08-27; none before, when a tile of zeros gave 0 / 0; FlashMLA floors the scale.

    Catches: NaN for zero tiles (F08), the floor under the scale where it belongs under amax, a floor of 1e-6 or 1e-12.
    """
    zero, tiny = np.zeros((1, 128), f32), np.full((1, 128), 1e-6, f32)
    v3, none, flash = ("deepseek_v3", "deepseek_v3_unclamped", "flashmla")
    assert quantize(zero, dialect=v3).scales.item() == f32(1e-4) / f32(448) == f32(2.2321429e-07)
    assert quantize(zero, dialect=none).scales.item() == 1
    assert quantize(zero, dialect=flash).scales.item() == 2.0**-13  # 1e-4 rounded up
    for name in DIALECTS:
        assert not quantize(zero, dialect=name).codes.any()
    assert quantize(tiny, dialect=none).codes[0, 0] == E4M3.max_code
    assert decode(quantize(tiny, dialect=v3).codes, E4M3)[0, 0] == 4.5  # 1e-6 / 2.2e-7 = 4.48
    assert not quantize(np.full((1, 128), 2.1e-10, f32), dialect=v3).codes.any()  # below 2^-10 * 1e-4 / 448
    below = np.full((1, 128), 0.0447, f32)  # 1e-4 * 448 = 0.0448
    assert quantize(below, dialect=flash).scales == 2.0**-13 < quantize(below * f32(2), dialect=flash).scales
    small = np.random.default_rng(1).normal(size=(8, 128)).astype(f32) * f32(1e-6)
    assert error(small, quantize(small, dialect=flash)) > 2 * error(small, quantize(small, dialect=v3))


def test_row_50_the_quotient():
    """x / s (kernel.py), x * (1 / s) (DeepGEMM), x * (448 / amax) (TileKernels, DeepEP), and s = amax * RN(1 / 448) (V3.2).

    Catches: one form taken for another. On bfloat16 activations, whose ratios hit ties, one code in some thousand moves.
    """
    x = activations(2048)
    for other in ("deepgemm", "tilekernels", "deepseek_v32"):
        share = codes_that_differ(x, "deepseek_v3", other) / x.size
        assert 5e-5 < share < 3e-3, (other, share)
    assert codes_that_differ(activations(2048, bf16=False), "deepseek_v3", "deepgemm") / x.size < 5e-6
    a, b = (quantize(x, dialect=name).scales for name in ("deepseek_v3", "deepseek_v32"))
    assert 0.05 < np.mean(a != b) < 0.6 and np.abs(a.view(np.int32) - b.view(np.int32)).max() == 1


@pytest.mark.parametrize("dialect", ["deepseek_v3", "deepgemm", "tilekernels"])
def test_row_50_each_form_on_one_tie(dialect):
    """Catches: the same, on one value that can be followed by hand: a code that the form alone decides."""
    x, amax = find_tie(dialect)
    s = amax / f32(448)
    by_hand = {"deepseek_v3": x / s, "deepgemm": x * (f32(1) / s), "tilekernels": x * (f32(448) / amax)}
    others = {name: encode_one(v) for name, v in by_hand.items()}
    assert quantize(np.array([[amax, x]]), (1, 2), dialect=dialect).codes[0, 1] == others.pop(dialect)
    assert len(set(others.values()) | {encode_one(by_hand[dialect])}) == 2


def encode_one(y):
    """E4M3 code of a value in [256, 448], where the spacing is 32: nearest, ties to even."""
    return int(E4M3.max_code - 6 + np.rint(np.float64(y) / 32) - 8)


def find_tie(dialect):
    """(x, amax), both bfloat16, on which this form and another disagree, searched near the ties of [256, 448]."""
    for k in range(1, 2000):
        amax = to_bf16(np.array([1 + k / 128 % 1], f32))[0]
        s = amax / f32(448)
        for tie in (272, 304, 336, 368, 400, 432):
            x = to_bf16(np.array([s * f32(tie)]))[0]
            forms = {"deepseek_v3": x / s, "deepgemm": x * (f32(1) / s), "tilekernels": x * (f32(448) / amax)}
            mine = encode_one(forms.pop(dialect))
            if any(encode_one(v) != mine for v in forms.values()):
                return x, amax
    raise AssertionError("no tie found")


def test_row_51_power_of_two_scales():
    """FP32 scales in V3; 2^ceil(log2 s) from V3.1 on, and for some tensors in training (R 3.3.3).

    Catches: rounding to the nearest power, or down. Up to one bit of range is lost, and nothing overflows.
    """
    x = activations()
    exact, power = quantize(x, dialect="deepseek_v3"), quantize(x, dialect="deepseek_v32_ue8m0")
    ratio = power.scales / exact.scales
    assert np.all((ratio >= 1) & (ratio < 2)) and ratio.max() > 1.9
    assert power.scale_codes.dtype == np.uint8
    assert 0.9 < error(x, power) / error(x, exact) < 1.2


def test_row_52_log2_or_bits():
    """kernel.py takes log2 and ceil in float32, all others the bits. Catches: calling the two the same (F13).

    Just above a power of two the log2 form keeps the power, so the largest element is above 448 before it is rounded.
    """
    s = np.nextafter(f32(2.0**-6), f32(1))
    x = np.array([[s * f32(448), 0]], f32)
    assert x[0, 0] / f32(448) == s
    bits, log2 = (quantize(x, (1, 2), dialect=d) for d in ("deepseek_v32_ue8m0", "deepseek_v31"))
    assert (bits.scales.item(), log2.scales.item()) == (2.0**-5, 2.0**-6)
    assert (decode(bits.codes, E4M3)[0, 0], decode(log2.codes, E4M3)[0, 0]) == (224, 448)
    away = activations()
    np.testing.assert_array_equal(*(quantize(away, dialect=d).scales for d in ("deepseek_v31", "deepgemm_ue8m0")))


def test_row_53_ue8m0_in_one_linear_and_not_in_another():
    """V3's model.py hands scale_fmt on in Linear, not in the column and row parallel ones; V3.2 does so everywhere.

    Catches: a UE8M0 kernel given the unrounded scales: they have no codes, and cutting their bits off is off by up to 2.
    """
    x = activations(64)
    plain, parallel = quantize(x, dialect="deepseek_v31"), quantize(x, dialect="deepseek_v3")
    assert np.array_equal(np.exp2(plain.scale_codes - 127.0), plain.scales)
    with pytest.raises(SpecError, match="expected a power of two"):
        _ = parallel.scale_codes
    cut = (parallel.scales.view(np.uint32) >> 23 << 23).view(f32)
    wrong = quantize_with(x, cut, overflow="saturate")
    assert np.max(parallel.scales / cut) > 1.9 and error(x, wrong) > 3 * error(x, parallel)


def test_row_54_activations_quantised_or_not():
    """kernel.py's default gemm_impl is bf16: weights are dequantised, activations stay; FP8 engines quantise them.

    Catches: comparing one with the other: E4M3 keeps 4 bits of each activation, bfloat16 all of its 8.
    """
    x = activations(bf16=False)
    fp8, kept = error(x, quantize(x)), np.sqrt(np.mean((to_bf16(x) - x) ** 2) / np.mean(x**2))
    assert 0.02 < fp8 < 0.04 and 0.0012 < kept < 0.0022  # uniform error: 2^-4 / sqrt(3) and 2^-9 / sqrt(3), at most


def test_row_55_what_the_accumulation_adds():
    """FP32 sums per 128 (kernel.py as written), or 14 bits in the tensor core and then FP32, in three recorded orders.

    Catches: codes or scales that do not belong to the recorded products; a tolerance on FP8 GEMMs that is too tight for
    hardware. Sums are exact in float64 up to 2^-53.
    """
    g = golden.arrays("hopper_e4m3")
    a, b = decode(g["gemm_a"], E4M3).astype(float), decode(g["gemm_b"], E4M3).astype(float)
    exact = np.einsum("mgk,gkn->gmn", a.reshape(24, 8, 128), b.reshape(8, 128, 32))
    hopper = g["gemm_partials"].view(f32).astype(float)
    assert np.mean(hopper == exact) < 0.2
    size = np.einsum("mgk,gkn->gmn", np.abs(a).reshape(24, 8, 128), np.abs(b).reshape(8, 128, 32))
    assert np.all(np.abs(hopper - exact) <= size * 2.0**-9)  # truncation, four steps of 33 addends
    bias = np.mean((hopper - exact) * np.sign(exact))
    assert bias < 0  # toward zero
    orders = [g[f"gemm_out_{name}"] for name in ("deepgemm_fma", "triton_fma", "unfused")]
    assert all(0.4 < np.mean(orders[i] != orders[j]) < 0.65 for i, j in ((0, 1), (1, 2)))
    stored = [to_bf16(o.view(f32)) for o in orders]
    assert np.array_equal(stored[0], stored[1]) and np.array_equal(stored[1], stored[2])


def test_row_56_overflow_of_a_foreign_scale():
    """V3.2 clamps to +-448 before the cast, the others trust amax; a bare cast gives NaN (ml_dtypes, torch before 2.12).

    Catches: an overflow rule that is not said. With its own scale no dialect overflows: encode refuses it there.
    """
    x = activations(64)
    stale = quantize(x * f32(0.5)).scales  # of an earlier step, say
    saturated, cast = (quantize_with(x, stale, overflow=how) for how in ("saturate", "overflow"))
    assert np.isfinite(saturated.dequantize()).all() and saturated.codes.max() & 0x7F == E4M3.max_code
    lost = np.isnan(cast.dequantize())
    assert 0.05 < lost.mean() < 0.3
    np.testing.assert_array_equal(saturated.codes[~lost], cast.codes[~lost])
    for dialect in DIALECTS:
        quantize(x, dialect=dialect)


def test_row_57_weights_requantised_to_powers_of_two():
    """SGLang rescales V3's weights for kernels that take only UE8M0. Catches: new scales beside the old codes (F10).

    The second rounding costs about half again, as two independent errors do; new scales alone cost the ratio itself.
    """
    w = (np.random.default_rng(5).normal(size=(512, 384)) * 0.02).astype(f32)
    stored = quantize(w, 128, dialect="deepseek_v3_unclamped")
    again = stored.requantize(128, "deepgemm_ue8m0")
    np.testing.assert_array_equal(again.scales, np.exp2(np.ceil(np.log2(stored.scales))))
    assert 1.2 < error(w, again) / error(w, stored) < 1.7
