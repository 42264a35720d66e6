"""R 3.3.3 (E5M6) and the narrow formats as kernels store them: codes packed in words, scales as UE8M0 codes."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics.formats import E5M6, encode, packing
from refimpl.layers.numerics.quantisation.scales import decode_scales, encode_scales, round_up_to_power_of_two

# ---- Packing


def as_one_number(codes, bits, *, first):
    """All codes of a row as one big integer, the first one "highest" or "lowest"."""
    digits = [format(int(c), f"0{bits}b") for c in codes]
    return int("".join(digits if first == "highest" else digits[::-1]), 2)


def split(number, count, bits, *, first):
    parts = [number >> (bits * k) & (2**bits - 1) for k in range(count)]
    return parts[::-1] if first == "highest" else parts


@pytest.mark.parametrize(
    ("pack", "unpack", "code", "word", "first"),
    [
        (packing.pack_e5m6, packing.unpack_e5m6, (np.uint16, 12), (np.uint32, 32), "highest"),
        (packing.pack_e2m1, packing.unpack_e2m1, (np.uint8, 4), (np.uint8, 8), "lowest"),
        (packing.pack_ue8m0, packing.unpack_ue8m0, (np.uint8, 8), (np.uint32, 32), "lowest"),
    ],
    ids=["e5m6", "e2m1", "ue8m0"],
)
def test_packed_codes_are_one_string_of_bits(pack, unpack, code, word, first):
    """Catches: nibbles exchanged, a code split over two words put together the wrong way, words in reverse order."""
    (dtype, bits), (word_dtype, word_bits) = code, word
    codes = np.random.default_rng(0).integers(0, 2**bits, size=(5, 3, 16)).astype(dtype)
    packed = pack(codes)
    assert packed.dtype == word_dtype and packed.shape == (5, 3, 16 * bits // word_bits)
    group = 8 if bits == 12 else 16  # E5M6 starts afresh every 96 bits
    for row, words in zip(codes.reshape(-1, group), packed.reshape(-1, group * bits // word_bits), strict=True):
        number = as_one_number(row, bits, first=first)
        assert words.tolist() == split(number, len(words), word_bits, first=first)
    np.testing.assert_array_equal(unpack(packed), codes)
    assert unpack(packed).dtype == dtype
    empty = np.zeros((0, 16), dtype)
    assert unpack(pack(empty)).shape == (0, 16)


@pytest.mark.parametrize(
    ("call", "a", "says"),
    [
        (packing.pack_e5m6, np.zeros((2, 12), np.uint16), r"cache has shape \(2, 12\); .* multiple of 8"),
        (packing.pack_e5m6, np.full(8, 4096, np.uint16), "cache holds 4096"),
        (packing.unpack_e5m6, np.zeros(4, np.uint32), "multiple of 3"),
        (packing.unpack_e5m6, np.zeros(3, np.int64), "cache has dtype int64"),
        (packing.pack_e2m1, np.zeros(3, np.uint8), "multiple of 2"),
        (packing.pack_e2m1, np.full(2, 16, np.uint8), "cache holds 16"),
        (packing.unpack_e2m1, np.zeros(2, np.uint16), "cache has dtype uint16"),
        (packing.pack_ue8m0, np.zeros((4, 3), np.uint8), "multiple of 4"),
        (packing.pack_ue8m0, np.ones(4, np.float32), "cache has dtype float32"),
        (packing.unpack_ue8m0, np.zeros(4, np.uint8), "cache has dtype uint8"),
        (packing.pack_e2m1, np.zeros((), np.uint8), r"cache has shape \(\)"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(call, a, says):
    """Catches: codes cut off at the end of a row, float32 scales packed by their low bits (F10)."""
    with pytest.raises(SpecError, match=says):
        call(a, name="cache")


def e5m6_by_tilekernels(x):
    """The code as DeepSeek's TileKernels make it (36d9e45): FP16 cut toward zero, four bits cut off, then one added if
    the 17 low bits of the float32, with the last kept bit, exceed a half.
    """
    bits = int(np.float32(x).view(np.uint32))
    magnitude = abs(Fraction(float(x)))
    exponent = max((bits >> 23 & 255) - 127, -14)
    half = int(magnitude / Fraction(2) ** (exponent - 10)) + ((exponent + 14) << 10)
    code = half >> 4
    return code + ((code & 1) + (bits & 0x1FFFF) > 0x10000) | (bits >> 31) << 11


def test_e5m6_is_what_tilekernels_computes_for_normal_numbers():
    """Catches: another bias or rounding than DeepSeek's own kernel. Among the subnormals, 2^-14 and smaller after
    scaling, the kernel looks at the wrong 17 bits and is off by one code; the specification rounds those rightly too.
    """
    rng = np.random.default_rng(3)
    x = (rng.normal(size=4000) * np.exp2(rng.uniform(-13, 14, size=4000))).astype(np.float32)
    x = np.concatenate([x, np.float32([65024, -65024, 65023, 2**-14, 1.0078125, 1.0234375])])
    x = x[(np.abs(x) >= 2**-14) & (np.abs(x) <= 65024)]
    ours = encode(x, E5M6, overflow="refuse")
    assert ours.tolist() == [e5m6_by_tilekernels(v) for v in x]
    small = (rng.uniform(0, 2**-14, size=2000)).astype(np.float32)
    off = encode(small, E5M6, overflow="refuse") - np.array([e5m6_by_tilekernels(v) for v in small])
    assert np.abs(off).max() == 1 and 0.3 < np.mean(off != 0) < 0.7


# ---- Scales


def log2_of(s):
    """(floor, ceiling) of log2 of a positive float, in exact arithmetic."""
    s, k = Fraction(s), 0
    while Fraction(2) ** k > s:
        k -= 1
    while Fraction(2) ** (k + 1) <= s:
        k += 1
    return k, k if Fraction(2) ** k == s else k + 1


positive = st.floats(2.0**-126, 2.0**127, width=32)
edges = st.builds(
    lambda e, to: float(np.nextafter(np.float32(2.0**e), np.float32(to))),
    st.integers(-120, 120),
    st.sampled_from([0, np.inf]),
)


@settings(max_examples=300, deadline=None)
@given(s=positive | edges)
def test_powers_of_two_are_rounded_up_exactly(s):
    """Catches: the log2 form (F13), one power too many for exact powers, one too few just above them."""
    down, up = log2_of(s)
    a = np.float32([s])
    assert round_up_to_power_of_two(a) == 2.0**up
    assert encode_scales(a, rounding="up") == up + 127
    assert encode_scales(a, rounding="down") == down + 127
    nearest = up if Fraction(s) >= Fraction(3, 2) * Fraction(2) ** down else down
    assert encode_scales(a, rounding="nearest") == nearest + 127


def test_the_log2_form_fails_above_powers_of_two():
    """Row 52: log2 in float32 takes 2^e (1 + 2^-23) for 2^e wherever |e| is large enough; the bits see it."""
    e = np.arange(-15, 15)
    above = np.nextafter(np.exp2(e).astype(np.float32), np.float32(np.inf))
    np.testing.assert_array_equal(round_up_to_power_of_two(above), np.exp2(e + 1.0))
    wrong = round_up_to_power_of_two(above, "log2") != np.exp2(e + 1.0)
    assert wrong[(e >= 4) | (e < -4)].all() and wrong.sum() == 22  # of 30


def test_every_scale_code_decodes_and_comes_back():
    """Catches: code 0 read as zero, an exponent field taken for a code without its bias."""
    codes = np.arange(255, dtype=np.uint8)
    s = decode_scales(codes)
    assert [Fraction(float(v)) for v in s] == [Fraction(2) ** (c - 127) for c in range(255)]
    for rounding in ("exact", "up", "down", "nearest"):
        np.testing.assert_array_equal(encode_scales(s, rounding=rounding), codes)


def test_the_nearest_power_is_ml_dtypes_and_no_way_to_make_scales():
    """Catches: scales made by a cast, which rounds most of them down: the largest value overflows."""
    s = np.exp2(np.random.default_rng(4).uniform(-20, 20, size=20_000)).astype(np.float32)
    nearest = encode_scales(s, rounding="nearest")
    np.testing.assert_array_equal(nearest, s.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8))
    below = nearest < encode_scales(s, rounding="up")
    assert abs(below.mean() - np.log2(1.5)) < 0.02  # the share of [1, 2) below 1.5, in octaves


@pytest.mark.parametrize(
    ("s", "says"),
    [
        ([1, 3], r"wq scales\[1\] is 3.0; expected a power of two"),
        ([1, 0], r"wq scales\[1\] is 0.0; expected finite and positive"),
        ([-2, 1], r"wq scales\[0\] is -2.0"),
        ([1, np.nan, np.nan], r"wq scales\[1\] is nan; expected finite and positive \(and 1 more\)"),
        ([np.inf], r"wq scales\[0\] is inf"),
        ([2.0**-140], r"wq scales\[0\] is .*; expected 2\^-127 to 2\^127"),
    ],
)
def test_scales_that_are_no_powers_of_two_are_refused_by_name(s, says):
    """Catches: a float32 scale whose fraction is cut off when it is packed (F10), zeros and NaN as scales."""
    with pytest.raises(SpecError, match=says):
        encode_scales(np.float32(s), rounding="exact", name="wq scales")


def test_scales_beyond_the_format_are_refused_or_saturated_as_said():
    """Catches: 2^128 wrapping to code 255, which is NaN."""
    s = np.float32([3e38, 1e-45])
    with pytest.raises(SpecError, match=r"\[0\] is 3"):
        encode_scales(s, rounding="up")
    assert encode_scales(s, rounding="up", overflow="saturate").tolist() == [254, 0]
    with pytest.raises(SpecError, match="rounding='even'"):
        encode_scales(s, rounding="even")
    with pytest.raises(SpecError, match=r"q scales\[1\] is nan"):
        decode_scales(np.array([0, 255], np.uint8), name="q scales")
    with pytest.raises(SpecError, match="dtype uint8; expected floating-point scales"):
        encode_scales(np.array([127], np.uint8), rounding="up")
