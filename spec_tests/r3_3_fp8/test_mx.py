"""Block formats of Blackwell tensor cores: MXFP8, MXFP4, NVFP4. Scales, codes, and what recorded instructions made of them."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics.formats import E2M1, E4M3, E5M2, decode, encode, pack_e2m1, unpack_e2m1
from refimpl.layers.numerics.quantisation.mx import NVFP4, encode_e2m1_ties_down, quantize_mx, quantize_nvfp4
from refimpl.layers.numerics.quantisation.scales import decode_scales
from refimpl.spec_tests import golden
from refimpl.spec_tests.oracles import rational

f32 = np.float32


def power_at_least(x):
    """2^ceil(log2 x) of a positive Fraction."""
    p = Fraction(2) ** -127
    while p < x:
        p *= 2
    return p


def power_at_most(x):
    p = power_at_least(x)
    return p if p == x else p / 2


def mx_block(x, name, scale):
    """Codes and scale of one block in rational arithmetic; what lies above the largest code saturates."""
    top = rational.ladder(name)[-1]
    amax = max(abs(Fraction(float(v))) for v in x)
    s = power_at_least(amax / top) if scale == "up" else power_at_most(amax) / power_at_most(top)
    codes = []
    for v in x:
        code, beyond = rational.nearest(Fraction(float(v)) / s, name)
        codes.append(code - beyond | int(np.signbit(v)) << (rational.width(name) - 1))
    return codes, s


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1], ids=lambda f: f.name)
@pytest.mark.parametrize("scale", ["up", "down"])
def test_mx_blocks_are_those_of_the_loops(fmt, scale):
    """Catches: blocks of another size or axis, 2^ceil for 2^floor, emax of another format (8, 15, 2), no saturation."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 2, 80)) * np.exp2(rng.integers(-30, 30, size=(3, 2, 1)))).astype(f32)
    x[0, 0, 0] = 2**40  # a power of two
    q = quantize_mx(x, fmt, scale=scale)
    assert q.scale_codes.shape == (3, 2, 3)
    for at in np.ndindex(3, 2):
        for j in range(0, 80, 32):
            codes, s = mx_block(x[at][j : j + 32], fmt.name, scale)
            assert q.codes[at][j : j + 32].tolist() == codes
            assert Fraction(float(decode_scales(q.scale_codes[at])[j // 32])) == s


def test_the_ocp_scale_saturates_and_the_other_does_not():
    """Catches: the two recipes exchanged. 500 with s = 2^(8 - 8) is cut to 448; with s = 2 it is 250, to 256."""
    x = np.zeros((1, 32), f32)
    x[0, 0] = 500
    assert quantize_mx(x, scale="down").dequantize()[0, 0] == 448
    assert quantize_mx(x, scale="up").dequantize()[0, 0] == 512
    x[0, 0] = 448
    assert [quantize_mx(x, scale=s).scales.item() for s in ("up", "down")] == [1, 1]


def test_a_block_of_zeros_and_the_smallest_scale():
    """Catches: log2 of zero, and a scale below 2^-127, which UE8M0 does not have."""
    x = np.zeros((2, 32), f32)
    x[1, 3] = 1e-40
    for scale in ("up", "down"):
        q = quantize_mx(x, E4M3, scale=scale)
        assert q.scales[0, 0] == 1 and 2.0**-127 <= q.scales[1, 0] <= 2.0**-126
        assert np.isfinite(q.dequantize()).all()


# ---- NVFP4


def test_nvfp4_follows_its_recipe_value_by_value():
    """Catches: a global scale that forgets 448 or 6, block scales that are not E4M3, blocks of 32.

    One float32 operation at a time, codes by rational arithmetic.
    """
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(4, 72)) * np.exp2(rng.integers(-6, 6, size=(4, 1)))).astype(f32)
    q = quantize_nvfp4(x)
    encoding = f32(f32(2688) / np.abs(x).max())
    g = f32(f32(1) / encoding)
    assert q.tensor_scale == g and q.scales.shape == (4, 5)
    for i, j in np.ndindex(4, 5):
        block = x[i, j * 16 : j * 16 + 16]
        wanted = f32(f32(np.abs(block).max() / f32(6)) * encoding)
        code, _ = rational.nearest(Fraction(float(wanted)), "e4m3fn")
        assert q.scales[i, j] == code
        s = f32(f32(float(rational.value(code, "e4m3fn"))) * g)
        for v, c in zip(block, q.codes[i, j * 16 : j * 16 + 16], strict=True):
            nearest, beyond = rational.nearest(Fraction(float(f32(v * f32(f32(1) / s)))), "e2m1fn")
            assert c == nearest - beyond | int(np.signbit(v)) << 3


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(0, 70), spread=st.floats(0, 8))
def test_nvfp4_errs_by_a_code_and_a_scale(seed, k, spread):
    """Catches: a scale applied twice or not. E2M1 is off by 1 of 6 at most, its E4M3 scale by 2^-4 or half of 2^-9."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(3, k)) * np.exp2(rng.normal(size=(3, 1)) * spread)).astype(f32)
    q = quantize_nvfp4(x)
    blocks = np.pad(np.abs(x), ((0, 0), (0, -k % 16))).reshape(3, -(-k // 16), 16).max(-1, initial=0)
    bound = np.repeat(blocks * (1.001 / 6 + 2**-4) + 6 * 2**-10 * q.tensor_scale, 16, axis=1)[:, :k]
    assert np.all(np.abs(q.dequantize() - x) <= bound)


def test_nvfp4_with_a_given_scale_saturates():
    """Catches: a calibrated tensor scale that is replaced, or values beyond it that wrap."""
    x = np.array([[1.0, 1e6] + [0.0] * 30], f32)
    q = quantize_nvfp4(x, tensor_scale=1.0)
    assert q.tensor_scale == 1 and q.dequantize()[0, :3].tolist() == [0, 2688, 0]
    zero = quantize_nvfp4(np.zeros((2, 20), f32))
    assert not zero.dequantize().any() and not zero.scales.any()


@pytest.mark.parametrize("largest", [2.0**-149, 2.0**-130, 2.0**-116, 2687 * 2.0**-118, 2688 * 2.0**-118])
def test_a_tiny_tensor_keeps_a_scale_with_a_reciprocal(largest):
    """Catches 1 / (s g) beyond float32, infinite codes and NaN for zeros: with s = 2^-9, g must be 2^-118 at least."""
    q = quantize_nvfp4(f32([[largest] + [0] * 15]))
    assert q.tensor_scale == f32(2.0**-118)
    step = 2.0**-118 * 2.0**-9  # of the smallest scale, with codes up to 6; its own rounding is within 1 / 16
    assert abs(float(q.dequantize()[0, 0]) - largest) <= max(3 * step, largest / 8)


def test_tensors_are_the_same_if_they_are_the_same_object():
    """Catches == that compares arrays and then asks whether the array of answers is true."""
    for make in (quantize_nvfp4, quantize_mx):
        q, again = make(X), make(X)
        assert q == q and q != again and len({q, again}) == 2


def test_ties_of_deepgemm_go_down():
    """Catches: calling DeepGEMM's FP4 helper nearest-even: at every other midpoint it takes the smaller neighbour."""
    middle = f32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert encode_e2m1_ties_down(middle).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert encode(middle, E2M1, overflow="saturate").tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert encode_e2m1_ties_down(f32([-0.1, -0.0, -0.75, 9, -9])).tolist() == [0, 0, 9, 7, 15]
    x = np.random.default_rng(2).normal(size=5000).astype(f32) * 3
    same = encode_e2m1_ties_down(x) == encode(x, E2M1, overflow="saturate")
    assert same[np.abs(x) > 0.25].all()  # below: -0, which DeepGEMM does not write


# ---- Recorded instructions


@pytest.mark.parametrize(
    ("name", "fmt", "block", "ulps"), [("mxfp8", E4M3, 32, 64), ("mxfp4", E2M1, 32, 2), ("nvfp4", E2M1, 16, 2)]
)
def test_decoded_blocks_give_the_recorded_dot_products(name, fmt, block, ulps):
    """Catches: nibbles, scales or blocks read otherwise than a tensor core does (recorded from mmasim 2.1.1).

    d is c plus the products, each cut below 2^-25 (MXFP8) or 2^-35 of the largest, then cut to float32: the tolerance is
    that many units in the last place of the largest addend, 33 addends at most.
    """
    g = {k: v for k, v in golden.arrays("tensorcore_other").items() if k.startswith(name)}
    scale = E4M3 if name == "nvfp4" else None
    compared = 0
    for a, b, c, sa, sb, d in zip(*(g[f"{name}_{k}"] for k in ("a", "b", "c", "sa", "sb", "d")), strict=True):
        va, vb = decode(a, fmt).astype(float), decode(b, fmt).astype(float)
        xa, xb = (scale_values(s, scale) for s in (sa, sb))
        products = va * vb * np.repeat(xa * xb, block)[: len(va)]
        c, d = float(c.view(f32)), float(d.view(f32))
        if not np.isfinite([*products, c]).all():
            assert not np.isfinite(d)
            continue
        exact = float(sum(map(Fraction, products.tolist()), Fraction(c)))
        if abs(exact) < 3e38:
            size = np.abs(np.append(products, c)).max()
            assert abs(d - exact) <= ulps * 2.0**-24 * size + 2.0**-23 * abs(exact) + 2.0**-149
            compared += 1
    assert compared > 200


def scale_values(codes, fmt):
    codes = np.atleast_1d(codes)
    if fmt is None:
        return np.where(codes == 255, np.nan, np.exp2(codes.astype(float) - 127))
    return decode(codes & 0x7F, fmt).astype(float)  # the sign of an E4M3 scale is not read


def test_packed_fp4_is_the_same_tensor():
    """Catches: the first code in the high nibble."""
    q = quantize_nvfp4(np.random.default_rng(3).normal(size=(4, 64)).astype(f32))
    assert pack_e2m1(q.codes)[0, 0] == q.codes[0, 0] + 16 * q.codes[0, 1]
    np.testing.assert_array_equal(
        NVFP4(unpack_e2m1(pack_e2m1(q.codes)), q.scales, q.tensor_scale).dequantize(), q.dequantize()
    )


# ---- What is refused

X = np.ones((2, 40), f32)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: quantize_mx(np.where(X, np.nan, X), name="up"), r"up: block \(0, 0\) = row 0, columns 0:32 holds NaN"),
        (lambda: quantize_mx(np.full((1, 2), np.inf), scale="down", name="up"), "up: block .* holds NaN or Inf"),
        (lambda: quantize_mx(X, scale="even"), "scale='even'; expected 'up' or 'down'"),
        (lambda: quantize_mx(f32(1), scale="down"), "blocks tile a matrix"),
        (
            lambda: quantize_nvfp4(np.where(X, np.nan, X), name="up"),
            r"up: block \(0, 0\) = row 0, columns 0:16 holds NaN",
        ),
        (lambda: quantize_nvfp4(X, tensor_scale=0.0, name="up"), "up tensor_scale=0.0; expected finite and positive"),
        (
            lambda: quantize_nvfp4(X, tensor_scale=2.0**-119, name="up"),
            r"expected finite and positive, at least 2\^-118",
        ),
        (lambda: quantize_nvfp4(np.ones((2, 4), np.uint8), name="up"), "up has dtype uint8"),
        (lambda: nvfp4(scales=np.zeros((2, 2), np.uint8)), r"up scales have shape \(2, 2\); expected \(2, 3\)"),
        (lambda: nvfp4(scales=np.full((2, 3), 127, np.uint8)), r"up scale code\[0, 0\] is 127.0: NaN or negative"),
        (lambda: nvfp4(scales=np.full((2, 3), 129, np.uint8)), "NaN or negative"),
        (lambda: nvfp4(scales=np.ones((2, 3), f32)), "up scales has dtype float32"),
        (lambda: nvfp4(codes=np.full((2, 40), 16, np.uint8)), "up codes holds 16"),
        (lambda: nvfp4(tensor_scale=f32(np.nan)), "up tensor scale is nan"),
        (lambda: nvfp4(tensor_scale=f32(0)), "up tensor scale is 0.0"),
    ],
)
def test_blocks_that_are_none_are_refused_by_name(make, says):
    """Catches: packed nibbles taken for codes, float scales taken for E4M3 codes, NaN spread over a block."""
    with pytest.raises(SpecError, match=says):
        make()


def nvfp4(**changed):
    q = quantize_nvfp4(X)
    return NVFP4(**{"codes": q.codes, "scales": q.scales, "tensor_scale": q.tensor_scale, "name": "up"} | changed)
