"""Block-scaled tensor cores of Blackwell: mxf8f6f4, mxf4, nvf4, against recordings of a simulator and the oracle."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics import mxf4, mxf8f6f4, nvf4, tensor_core_matmul
from refimpl.layers.numerics.tensor_cores import block_scaled
from refimpl.spec_tests import golden
from refimpl.spec_tests.cases.tensor_core import KINDS, as_bits, operands
from refimpl.spec_tests.oracles import tensor_core as oracle

both = pytest.mark.parametrize("gemm", [block_scaled.mxf8f6f4, mxf8f6f4], ids=["integer", "fast"])
UNIT = 127  # the UE8M0 code of 1


def recorded(name):
    """a, b, c, scales and d of one instruction per row, as batches of 1 x 1 results."""
    z = golden.arrays("tensorcore_other")
    a, b, c, sa, sb, d = (z[f"{name}_{x}"] for x in ("a", "b", "c", "sa", "sb", "d"))
    c = c.view(np.float32)[:, None, None]
    return a[:, None], b[:, None], c, sa.reshape(len(a), 1, -1), sb.reshape(len(a), 1, -1), d


@both
def test_every_recorded_mxfp8_row(gemm):
    """Catches scales applied to the result or to c, the extreme scale codes 0, 254 and 255, and E without scales."""
    *arguments, d = recorded("mxfp8")
    np.testing.assert_array_equal(as_bits(gemm(*arguments))[:, 0, 0], d)


@pytest.mark.parametrize(("name", "gemm"), [("nvfp4", nvf4), ("mxfp4", mxf4)])
def test_every_recorded_fp4_row(name, gemm):
    """Catches F other than 35, exponents that include the group sum, and signs of UE4M3 scales."""
    *arguments, d = recorded(name)
    np.testing.assert_array_equal(as_bits(gemm(*arguments))[:, 0, 0], d)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "e2m1", "e3m2", "e2m3"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    scales=st.sampled_from([(0, 256), (0, 255), (120, 134), (0, 20)]),
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    k=st.integers(1, 200),
)
def test_mxf8f6f4_fast_is_integer_and_oracle(fmt, seed, kind, scales, m, n, k):
    """Catches overflow by scales of 2^254, zeros lifted by scales, NaN scales, and a last step that is short."""
    rng = np.random.default_rng(seed)
    a, b, c = operands(rng, fmt, kind, m, n, k)
    sa, sb = (rng.integers(*scales, (rows, -(-k // 32))).astype(np.uint8) for rows in (m, n))
    d = block_scaled.mxf8f6f4(a, b, c, sa, sb, fmt=fmt)
    np.testing.assert_array_equal(as_bits(mxf8f6f4(a, b, c, sa, sb, fmt=fmt)), as_bits(d))
    i, j = rng.integers(m), rng.integers(n)
    if 255 in sa[i] or 255 in sb[j]:
        expected = 0x7FFFFFFF
    else:
        shift = (sa[i].astype(int) + sb[j] - 2 * UNIT).tolist()
        bits = int(as_bits(c)[i, j])
        expected = oracle.dot(a[i].tolist(), b[j].tolist(), bits, "blackwell", fmt, scale=shift)
    assert int(as_bits(d)[i, j]) == expected


@pytest.mark.parametrize("gemm", [mxf4, nvf4])
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), density=st.sampled_from([0.1, 1.0]))
def test_fp4_is_the_oracle(gemm, seed, density):
    """Catches groups of 32, cancelled groups dropped from E, zero scales counted in E."""
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 16, (1, 64)) * (rng.random((1, 64)) < density) for _ in "ab")
    a, b = a.astype(np.uint8), b.astype(np.uint8)
    if rng.random() < 0.3:  # a group that cancels
        a[:, 8:16], b[:, 8:16] = a[:, :8], b[:, :8] ^ 8
    c = np.array([[rng.normal() * 2.0 ** rng.integers(-30, 30)]], np.float32)
    low, high = [(0, 256), (60, 190)][rng.integers(2)]
    sa, sb = (rng.integers(low, high, (1, 4)).astype(np.uint8) for _ in "ab")
    if gemm is mxf4:
        kind = ml_dtypes.float8_e8m0fnu
        value, exponent = lambda s: float(np.uint8(s).view(kind)), lambda s: int(s) - UNIT
    else:
        kind = ml_dtypes.float8_e4m3fn
        value = lambda s: abs(float(np.uint8(s).view(kind)))  # noqa: E731
        exponent = lambda s: oracle.exponent(value(s), "e4m3")  # noqa: E731
    d = gemm(a, b, c, sa, sb, **({"block": 16} if gemm is mxf4 else {}))
    expected = oracle.fp4_dot(a[0], b[0], int(as_bits(c)[0, 0]), sa[0], sb[0], value, exponent)
    assert int(as_bits(d)[0, 0]) == expected


def test_unit_scales_are_the_plain_instruction():
    """Catches a second arithmetic for the block-scaled form: with all scales 1, mxf8f6f4 is FP8 on Blackwell."""
    a, b, c = operands(np.random.default_rng(0), "e4m3", "finite", 20, 30, 100)
    ones = [np.full((rows, 4), UNIT, np.uint8) for rows in (20, 30)]
    plain = tensor_core_matmul(a, b, c, arch="blackwell", fmt="e4m3")
    np.testing.assert_array_equal(as_bits(mxf8f6f4(a, b, c, *ones)), as_bits(plain))


def test_a_group_sum_adds_nothing_to_the_exponent():
    """Catches a group renormalised before alignment: 16 products of 36 are 576, 2^9, yet E is the scales' exponent 0.

    c = 2^-35 + 2^-30 then keeps the bit 2^-35, which E = 9 would cut (at 2^-26, both).
    """
    six = np.full((1, 16), 7, np.uint8)
    scale = np.full((1, 1), 0x38, np.uint8)
    c = np.float32(2.0**-35 + 2.0**-30)
    away = np.concatenate([six, six], axis=1), np.concatenate([six, six ^ 8], axis=1)  # + 576 - 576
    d = nvf4(*away, c.reshape(1, 1), np.repeat(scale, 2, axis=1), np.repeat(scale, 2, axis=1))
    assert d[0, 0] == c


def test_mxf4_and_nvf4_fill_a_short_step_with_zeros():
    """Catches K that is no multiple of 64 or of 16."""
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 16, (3, 128)).astype(np.uint8) for _ in "ab")
    a[:, 75:] = b[:, 75:] = 0
    c = rng.normal(size=(3, 3)).astype(np.float32)
    s = rng.integers(118, 134, (2, 3, 8)).astype(np.uint8)
    np.testing.assert_array_equal(
        mxf4(a[:, :75], b[:, :75], c, *s[..., :3], block=32), mxf4(a, b, c, *s[..., :4], block=32)
    )
    t = rng.integers(0x30, 0x48, (2, 3, 8)).astype(np.uint8)
    np.testing.assert_array_equal(nvf4(a[:, :75], b[:, :75], c, *t[..., :5]), nvf4(a, b, c, *t))


@both
def test_leading_axes(gemm):
    """Catches scales that do not follow their operand's batch."""
    rng = np.random.default_rng(2)
    a, b, c = operands(rng, "e4m3", "gauss", 24, 30, 64)
    sa, sb = (rng.integers(120, 134, (rows, 2)).astype(np.uint8) for rows in (24, 30))
    d = gemm(a.reshape(2, 12, 64), b, c.reshape(2, 12, 30), sa.reshape(2, 12, 2), sb)
    np.testing.assert_array_equal(as_bits(d.reshape(24, 30)), as_bits(gemm(a, b, c, sa, sb)))


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmt": "bf16"}, "fmt 'bf16'; expected one of e4m3"),
        ({"c": np.zeros((2, 3), np.float16)}, "c has dtype float16; expected float32"),
        ({"scale_a": np.full((2, 2), 127)}, "scale_a has dtype int64; expected uint8 codes, or float8_e8m0fnu"),
        (
            {"scale_b": np.full((3, 1), 127, np.uint8)},
            "scale_b has shape \\(3, 1\\); expected \\(3, 2\\), one scale per 32",
        ),
    ],
)
def test_wrong_scales_are_refused_by_name(gemm, change, message):
    """Catches scales per 64, scales as numbers, and formats that the instruction has not."""
    good = {"a": np.zeros((2, 64), np.uint8), "b": np.zeros((3, 64), np.uint8), "c": np.zeros((2, 3), np.float32)}
    good |= {"scale_a": np.full((2, 2), 127, np.uint8), "scale_b": np.full((3, 2), 127, np.uint8)}
    with pytest.raises(SpecError, match=message):
        gemm(**(good | change))


def test_mxf4_blocks_are_16_or_32():
    """Catches a block that spans groups."""
    with pytest.raises(SpecError, match="block 8; expected 16 or 32"):
        mxf4(
            *[np.zeros((1, 64), np.uint8)] * 2, np.zeros((1, 1), np.float32), *[np.zeros((1, 8), np.uint8)] * 2, block=8
        )
