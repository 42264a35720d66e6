"""The a-priori bound of a scaled GEMM: measured errors stay under it, and constructed ones come close to it."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics import MODES, Quantized, quantize, scaled_gemm, scaled_gemm_bound
from refimpl.layers.numerics.formats import E4M3, E5M2
from refimpl.layers.numerics.tensor_cores.bound import Bound, accumulation_bound
from refimpl.spec_tests.cases.tensor_core import cast

KINDS = ["gauss", "positive", "silu", "wide", "constant"]
UE8M0 = "deepgemm_ue8m0"


def data(rng, kind, shape):
    x = rng.normal(size=shape)
    x = {
        "gauss": lambda: x,
        "positive": lambda: np.abs(x),
        "silu": lambda: x / (1 + np.exp(-x)) * rng.normal(size=shape),
        "wide": lambda: x * 2.0 ** rng.integers(-14, 4, shape),
        "constant": lambda: np.full(shape, rng.uniform(1, 2)),
    }[kind]()
    return x.astype(np.float32)


def quantised(x, w, mode, fmt=E4M3, tile=128):
    dialect = UE8M0 if mode == "deepgemm_sm100" else "deepseek_v3"
    a, b = quantize(x, (1, tile), dialect=dialect, fmt=fmt), quantize(w, tile, dialect=dialect, fmt=fmt)
    return a, b, dialect == UE8M0


def ratios(kind, depth, mode, fmt=E4M3, tile=128, seed=0):
    """Largest error over bound: of quantisation and accumulation together, and of accumulation alone."""
    rng = np.random.default_rng(seed)
    x, w = data(rng, kind, (12, depth)), data(rng, kind, (150, depth))
    a, b, power_of_two = quantised(x, w, mode, fmt, tile)
    c, true = scaled_gemm(a, b, mode=mode), x.astype(float) @ w.astype(float).T
    bound = scaled_gemm_bound(depth, mode=mode, fmt=fmt, tile=tile, power_of_two=power_of_two)
    alone = accumulation_bound(depth, mode=mode, fmt=fmt, tile=tile)
    shape = ((1, tile), tile)
    values = [q.dequantize() for q in (a, b)]
    exact = np.abs(c - scaled_gemm(a, b, mode="exact"))
    return (
        (np.abs(c - true) / bound.elementwise(x, w, *shape)).max(),
        (exact / np.maximum(alone.elementwise(*values, *shape, clamp=0), 1e-300)).max(),
    )


# ------------------------------------------------------------------------------------------------------ it is a bound


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", [1, 31, 128, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_measured_errors_stay_under_the_bound(kind, depth, mode):
    """Catches a bound that forgets a rounding: the quantiser's, the alignment's, the output's, the promotion's."""
    both, accumulation = ratios(kind, depth, mode)
    assert both <= 1 and accumulation <= 1


@pytest.mark.parametrize("mode", [m for m in MODES if m != "deepgemm_sm100"])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    depth=st.integers(1, 300),
    tile=st.sampled_from([16, 128, 512]),
    fmt=st.sampled_from([E4M3, E5M2]),
)
def test_any_tile_and_format(mode, seed, kind, depth, tile, fmt):
    """Catches coefficients that hold for 128 and E4M3 only."""
    both, accumulation = ratios(kind, depth, mode, fmt, tile, seed)
    assert both <= 1 and accumulation <= 1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), one_chain=st.booleans())
def test_codes_that_make_truncation_lose_most(seed, one_chain):
    """Catches a bound that random data satisfy by luck: the first product large, all others just below its quantum."""
    depth, tile = (512, 512) if one_chain else (256, 128)
    size = np.random.default_rng(seed).uniform(1.6, 2, (3, depth))
    left, right = (Quantized(q, np.ones((3, depth // tile), np.float32), (1, tile)) for q in just_below(size, tile))
    error = np.abs(scaled_gemm(left, right, interval=tile) - scaled_gemm(left, right, mode="exact"))
    values = left.dequantize(), right.dequantize()
    bound = accumulation_bound(depth, tile=tile, interval=tile).elementwise(*values, (1, tile), (1, tile), clamp=0)
    assert (error <= bound).all() and (error > bound / 2).all()


def just_below(size, tile):
    """Codes whose products are 8 first in each tile, then size / 2 quanta each: below one for a size below 2."""
    x, y = size * 2.0**-5, np.full(size.shape, 2.0**-6)
    x[:, ::tile], y[:, ::tile] = 8.0, 1.0
    return cast(x, "e4m3"), cast(y, "e4m3")


# ----------------------------------------------------------------------------------------------------- it is not idle


def test_constructed_truncation_comes_within_a_factor_of_1_2():
    """Catches a bound that is far too large. 127 products of 15/16 quantum beside one that sets it, all lost; the bound
    allows 128 quanta and four truncated outputs.
    """
    codes = just_below(np.full((1, 128), 1.875), 128)
    a, b = (Quantized(q, np.ones((1, 1), np.float32), (1, 128)) for q in codes)
    error = np.abs(scaled_gemm(a, b) - scaled_gemm(a, b, mode="exact"))[0, 0]
    bound = accumulation_bound(128).elementwise(a.dequantize(), b.dequantize(), (1, 128), (1, 128), clamp=0)[0, 0]
    assert 1 / 1.2 < error / bound <= 1


def test_constructed_quantisation_comes_within_a_factor_of_1_1():
    """Catches u = 2^-3 for u = 2^-4: values at ties, all rounded the same way, 1.0625 to 1."""
    x = np.full((1, 128), 1.0625, np.float32)
    x[0, 0] = 448.0  # makes the scale 1
    a = quantize(x)
    error = np.abs(scaled_gemm(a, a, mode="exact") - x.astype(float) @ x.astype(float).T)[0, 0]
    bound = scaled_gemm_bound(128, mode="exact").elementwise(x[:, 1:], x[:, 1:], (1, 128), (1, 128))[0, 0]
    assert a.scales[0, 0] == 1 and 1 / 1.1 < error / bound <= 1.0


@pytest.mark.parametrize("kind", ["gauss", "positive"])
def test_random_data_come_within_a_stated_factor(kind):
    """Catches a bound that grows without reason: a factor of 60 at K = 128 for both parts of V3's arithmetic, and 1000
    for accumulation of signed data at K = 2048, where errors cancel like 1 / sqrt(K) and truncation like one side only.
    """
    both, accumulation = ratios(kind, 128, "deepgemm_sm90")
    assert both > 1 / 60 and accumulation > (1 / 400 if kind == "gauss" else 1 / 25)
    both, accumulation = ratios(kind, 2048, "deepgemm_sm90")
    assert both > 1 / 60 and accumulation > (1 / 1500 if kind == "gauss" else 1 / 40)


def test_promotion_keeps_the_bound_from_growing_with_k():
    """R 3.3.2: catches a bound without the interval: with N_C = 128 it is 1.6 % at any K, without it 52 % at 4096."""
    with_promotion = [accumulation_bound(k).relative for k in (128, 4096, 7168)]
    assert max(with_promotion) < 1.001 * min(with_promotion) < 0.0162
    assert accumulation_bound(4096, tile=4096, interval=4096).relative == pytest.approx(128 * 33 * 2.0**-13, rel=1e-3)
    assert accumulation_bound(4096, mode="triton_sm90_mma").relative < 1e-4


def gamma(n, bits):
    """n u / (1 - n u): what n roundings of unit u = 2^-bits make together at most (Higham, lemma 3.1)."""
    return Fraction(n, 2**bits - n)


HAND = {  # mode -> (one interval of 128, its absolute part over 2^-F, roundings per promotion, bits of those)
    "deepgemm_sm90": (Fraction(128 + 4, 2**13), Fraction(2, 2**6 * 448), 1, 24),  # F 13, 4 steps of 32, 13 bits kept
    "triton_sm90_wgmma": (Fraction(128 + 4, 2**13), Fraction(2, 2**6 * 448), 1, 24),
    "triton_sm90_wgmma_unfused": (Fraction(128 + 4, 2**13), Fraction(2, 2**6 * 448), 2, 24),
    "triton_sm90_mma": (Fraction(128, 2**25) + Fraction(8, 2**23), Fraction(2, 2**6 * 448), 1, 24),  # 8 steps of 16
    "fp32": (gamma(128, 24), 0, 2, 24),
    "exact": (0, 0, 2, 53),
}


@pytest.mark.parametrize("mode", HAND)
def test_the_coefficients_by_hand(mode):
    """K = 300 is three intervals, in fractions. Catches a step too few, a unit of another format, a sum for a product."""
    inner, lost, once, bits = HAND[mode]
    outer = gamma(3 + once, bits)
    found = accumulation_bound(300, mode=mode)
    assert found.relative == pytest.approx(float(inner * (1 + outer) + outer), rel=1e-14, abs=0)
    fraction_bits = 25 if mode == "triton_sm90_mma" else 13
    assert found.absolute == pytest.approx(float(Fraction(lost, 2**fraction_bits) * (1 + outer)), rel=1e-14, abs=0)


@given(st.fractions(0, 1), st.fractions(0, 1), st.fractions(0, Fraction(1, 4)), st.fractions(0, Fraction(1, 4)))
def test_the_bound_of_quantised_values_holds_for_the_values_before(relative, absolute, u, eta):
    """|x| = A = |w| = B = 1, each off by u |x| + eta A in the worst direction: the bound is met exactly. Catches u once."""
    found = Bound(float(relative), float(absolute)).after(float(u), float(eta))
    worst = (1 + u + eta) ** 2 * (1 + relative) - 1 + absolute * (1 + eta) ** 2
    assert found.relative + found.absolute == pytest.approx(float(worst), rel=1e-12, abs=1e-15)
    assert found.relative == pytest.approx(float((1 + u) ** 2 * (1 + relative) - 1), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "bf16"}, "mode 'bf16'; known"),
        ({"depth": 0}, "K 0, tile 128"),
        ({"tile": 0}, "tile 0"),
        ({"interval": -1}, "interval -1"),
    ],
)
def test_nonsense_is_refused(change, message):
    """Catches a bound of 0 for a GEMM that does not exist."""
    call = {"depth": 128} | change
    with pytest.raises(SpecError, match=message):
        accumulation_bound(call.pop("depth"), **call)
