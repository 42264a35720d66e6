"""R 3.3.2: the number formats. Every code, every bfloat16 value, every midpoint, against exact rational arithmetic and
against ml_dtypes.
"""

from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics.formats import (
    BF16,
    E2M1,
    E4M3,
    E5M2,
    E5M6,
    FORMATS,
    FP16,
    INT8,
    UE8M0,
    Format,
    decode,
    encode,
    round_to,
)
from refimpl.layers.numerics.formats.rounding import bf16_bits, to_bf16
from refimpl.spec_tests.oracles import rational

FLOATS = [E4M3, E5M2, E5M6, E2M1, BF16, FP16]
WITH_DTYPE = [f for f in FORMATS.values() if f.dtype is not None]
IN_ML_DTYPES = [E4M3, E5M2, BF16, FP16]  # E2M1: its cast saturates, see below; UE8M0 and INT8: scales, integers
WITH_NAN = [f for f in FLOATS if f.nan is not None]
each_float = pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)
WIDE = (BF16, FP16)  # with 65,536 codes
each_code = pytest.mark.parametrize(
    "fmt", [pytest.param(f, marks=pytest.mark.slow) if f in WIDE else f for f in FLOATS], ids=lambda f: f.name
)
each_dtype = pytest.mark.parametrize("fmt", WITH_DTYPE, ids=lambda f: f.name)
each_cast = pytest.mark.parametrize("fmt", IN_ML_DTYPES, ids=lambda f: f.name)
each_nan = pytest.mark.parametrize("fmt", WITH_NAN, ids=lambda f: f.name)


def all_codes(fmt):
    return np.arange(2**fmt.bits).astype(fmt.container)


def all_bfloat16():
    """Every bfloat16 value as float32, infinities and NaN included."""
    return (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)


def midpoints(fmt):
    """Every midpoint of two neighbouring non-negative values, the one above the largest included, as float32."""
    steps = rational.steps(fmt.name)
    middle = np.array([float(a + b) / 2 for a, b in pairwise(steps)])
    with np.errstate(over="ignore"):
        narrow = middle.astype(np.float32)
    exact = narrow == middle
    assert exact[:-1].all() and (exact[-1] or fmt is BF16), "midpoints need one bit more, which float32 has"
    return narrow[exact]


def hard_cases(fmt):
    """Midpoints and their float32 neighbours, and as many negative ones."""
    middle = midpoints(fmt)
    up, down = np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))
    x = np.concatenate([middle, up, down])
    return np.concatenate([x, -x])


def expected(x, fmt):
    """{overflow: codes} of finite values by the oracle."""
    found = [rational.nearest(Fraction(v), fmt.name) for v in x.tolist()]
    codes, beyond = np.array([c for c, _ in found]), np.array([b for _, b in found])
    sign = np.signbit(x).astype(int) << (fmt.bits - 1)
    return {"saturate": codes - beyond | sign, "overflow": codes | sign}


def by_ml_dtypes(x, fmt):
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(fmt.dtype).view(fmt.container)


def modes(fmt):
    return ("saturate", "overflow") if fmt.overflow is not None else ("saturate",)


# ---- Formats as data


@each_float
def test_every_code_has_the_value_that_its_bits_say(fmt):
    """Catches: a wrong bias, normalised subnormals, a NaN or infinity too many (448 is a number in E4M3FN)."""
    for code, x in enumerate(decode(all_codes(fmt), fmt).tolist()):
        exact = rational.value(code, fmt.name)
        assert str(x) == exact if isinstance(exact, str) else Fraction(x) == exact, (code, x, exact)


@each_dtype
def test_every_code_decodes_as_in_ml_dtypes(fmt):
    """Catches: a lost sign of zero, NaN in another place, UE8M0's field 0 read as zero, INT8 without its sign."""
    theirs = all_codes(fmt).view(fmt.dtype).astype(np.float32)
    for codes in (all_codes(fmt), all_codes(fmt).view(fmt.dtype)):
        ours = decode(codes, fmt)
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        rest = ~np.isnan(theirs)
        np.testing.assert_array_equal(ours.view(np.uint32)[rest], theirs.view(np.uint32)[rest])


@pytest.mark.parametrize(
    ("fmt", "largest", "smallest_normal", "tiny"),
    [
        (E4M3, 448, 2**-6, 2**-9),  # OCP 8-bit floating point specification, table 2
        (E5M2, 57344, 2**-14, 2**-16),
        (FP16, 65504, 2**-14, 2**-24),  # IEEE 754
        (BF16, 2**128 - 2**120, 2**-126, 2**-133),
        (E2M1, 6, 1, 0.5),  # OCP microscaling specification, table 5
        (E5M6, 65024, 2**-14, 2**-20),  # TileKernels: FP16 with four bits fewer, largest 65024
        (UE8M0, 2**127, 2**-127, 2**-127),
        (INT8, 127, 2, 1),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_the_limits_are_those_published(fmt, largest, smallest_normal, tiny):
    """Catches: E4M3 with infinities (240), E4M3FNUZ (bias 8), E5M6 with FP16's largest value."""
    assert (fmt.max, 2.0**fmt.min_exponent, fmt.tiny) == (largest, smallest_normal, tiny)


@pytest.mark.parametrize(("exponent", "mantissa"), [(2, 1), (4, 3), (4, 4), (5, 6), (5, 10), (8, 7)])
def test_codes_travel_in_the_smallest_type_that_holds_them(exponent, mantissa):
    """Catches: the ninth bit of a format that is one wider than a byte cut off."""
    fmt = Format("any", exponent, mantissa, 1, "ieee")
    fits = [t for t in (np.uint8, np.uint16) if np.iinfo(t).max + 1 >= 2 ** (1 + exponent + mantissa)]
    assert fmt.container == fits[0]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_the_table_of_values_cannot_be_written_to(fmt):
    """Catches: a caller whose `values[...] = 0` changes what everybody decodes from then on."""
    with pytest.raises(ValueError, match="read-only"):
        fmt.values[0] = 1


@each_float
def test_every_code_encodes_back_to_itself(fmt):
    """Catches: a code that cannot be reached, or is reached from its neighbour's value."""
    codes = all_codes(fmt)
    x = decode(codes, fmt)
    back = encode(x, fmt, overflow=modes(fmt)[-1])
    np.testing.assert_array_equal(back[~np.isnan(x)], codes[~np.isnan(x)])
    assert np.isnan(decode(back, fmt)[np.isnan(x)]).all()


# ---- Rounding


@each_code
def test_every_bfloat16_value_goes_to_the_nearest_code(fmt):
    """Catches: truncation, ties away from zero, flushed subnormals, a binade lost at the top."""
    x = all_bfloat16()
    x = x[np.isfinite(x)]
    codes = expected(x, fmt)
    for overflow in modes(fmt):
        np.testing.assert_array_equal(encode(x, fmt, overflow=overflow), codes[overflow])


@each_code
def test_midpoints_go_to_the_even_code_and_their_neighbours_to_the_nearer(fmt):
    """Catches: a sticky bit forgotten, double rounding, ties away or down, the wrong edge of overflow."""
    x = hard_cases(fmt)
    assert len(x) >= 6 * (len(rational.ladder(fmt.name)) - 1)
    codes = expected(x, fmt)
    for overflow in modes(fmt):
        np.testing.assert_array_equal(encode(x, fmt, overflow=overflow), codes[overflow])


@each_cast
def test_codes_are_those_of_ml_dtypes(fmt):
    """Catches: any pattern treated otherwise than its cast does, NaN's sign and code included (quiet ones)."""
    rng = np.random.default_rng(0)
    random = rng.integers(0, 2**32, 1 << 20, dtype=np.uint32).view(np.float32)
    x = np.concatenate([all_bfloat16(), hard_cases(fmt), random])
    x = x[~np.isnan(x) | (x.view(np.uint32) & 0x400000 > 0)]
    ours, theirs = encode(x, fmt, overflow="overflow"), by_ml_dtypes(x, fmt)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(ours[number], theirs[number])
    if fmt is not FP16:  # NumPy's own cast keeps the payload of NaN
        np.testing.assert_array_equal(ours, theirs)


def test_e2m1_is_ml_dtypes_cast_but_for_nan():
    """Catches: 5 rounded to 6 (a tie: to 4, the even code). ml_dtypes makes NaN a zero; here it is refused."""
    x = np.concatenate([all_bfloat16(), hard_cases(E2M1)])
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(encode(x, E2M1, overflow="saturate"), by_ml_dtypes(x, E2M1))
    assert round_to(np.array([5.0, 0.75, 1.75, -0.25]), E2M1, overflow="saturate").tolist() == [4, 1, 2, -0.0]


@each_float
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_float64_is_rounded_once(fmt, data):
    """Catches: float64 to float32 to the format, which turns what is just above a tie into the tie."""
    x = data.draw(st.floats(-fmt.max, fmt.max, allow_nan=False), label="x")
    i = data.draw(st.integers(0, len(rational.ladder(fmt.name)) - 2), label="step")
    middle = float(sum(rational.ladder(fmt.name)[i : i + 2]) / 2)
    near = [x, middle, *(middle * (1 + s * 2.0**-k) for k in (30, 40, 52) for s in (-1, 1))]
    x = np.array([*near, *(-v for v in near)])
    np.testing.assert_array_equal(encode(x, fmt, overflow="saturate"), expected(x, fmt)["saturate"])


def test_the_casts_of_ml_dtypes_round_float64_twice():
    """1.0625 + 2^-40 is above the tie between 1 and 1.125 and has to go up; ml_dtypes (PR 401, open) gives 1."""
    x = np.array([1.0625 + 2.0**-40])
    assert round_to(x, E4M3, overflow="saturate") == 1.125
    assert x.astype(ml_dtypes.float8_e4m3fn).astype(float) == 1.0
    huge = np.array([1e39, -1e39, 1e-60])  # outside float32 on both sides
    assert encode(huge, BF16, overflow="overflow").tolist() == [0x7F80, 0xFF80, 0]
    assert round_to(huge, BF16, overflow="saturate").tolist() == [BF16.max, -BF16.max, 0]


# ---- Overflow, NaN, infinity, zero


@pytest.mark.parametrize(
    ("fmt", "x", "saturated", "overflowed"),
    [
        (E4M3, 464.0, 448.0, 448.0),  # the tie above 448 goes to its even code
        (E4M3, np.nextafter(np.float32(464), np.float32(500)), 448.0, np.nan),
        (E4M3, -1e9, -448.0, np.nan),
        (E4M3, np.inf, 448.0, np.nan),
        (E5M2, 61439.0, 57344.0, 57344.0),
        (E5M2, 61440.0, 57344.0, np.inf),  # here the tie goes to the even code, which is infinity
        (E5M2, -np.inf, -57344.0, -np.inf),
        (E5M6, 65279.0, 65024.0, 65024.0),
        (E5M6, 65280.0, 65024.0, np.inf),
        (FP16, 65519.0, 65504.0, 65504.0),
        (FP16, -65520.0, -65504.0, -np.inf),
        (BF16, 3.4e38, BF16.max, np.inf),
    ],
)
def test_overflow_saturates_or_overflows_as_said(fmt, x, saturated, overflowed):
    """Catches: the edge of overflow one tie off, NaN where the GPU's conversion saturates, and the reverse."""
    x = np.array([x], np.float32)
    np.testing.assert_array_equal(round_to(x, fmt, overflow="saturate"), np.float32([saturated]))
    np.testing.assert_array_equal(round_to(x, fmt, overflow="overflow"), np.float32([overflowed]))


@each_nan
@pytest.mark.parametrize("overflow", ["saturate", "overflow"])
def test_nan_stays_nan_with_its_sign(fmt, overflow):
    """Catches: NaN clipped to the largest value by a minimum, a signalling NaN carried into infinity."""
    u = np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0xFFFFFFFF], np.uint32)
    codes = encode(u.view(np.float32), fmt, overflow=overflow)
    sign = 1 << (fmt.bits - 1)
    assert codes.tolist() == [fmt.nan, fmt.nan | sign] * 2
    assert np.isnan(decode(codes, fmt)).all()


@each_float
def test_zero_keeps_its_sign_and_small_values_underflow_to_it(fmt):
    """Catches: -0 lost, half the smallest subnormal rounded up (a tie: to zero), what is above it flushed."""
    tie = np.float32(fmt.tiny / 2)
    x = np.array([0.0, -0.0, tie, -tie, 1e-45, -1e-45], np.float32)
    sign = 1 << (fmt.bits - 1)
    assert encode(x, fmt, overflow="saturate").tolist() == [0, sign] * 3
    above = np.nextafter(tie, np.float32(1))
    assert encode(np.array([above, -above]), fmt, overflow="saturate").tolist() == [1, 1 | sign]


def test_int8_counts_in_twos_complement():
    """Catches: sign and magnitude, -128 lost, ties away from zero, wrapping at 127."""
    x = np.array([-1.0, 0.5, 1.5, -2.5, 127.4, 127.5, 1e9, -np.inf, -128.5, -0.4])
    assert decode(encode(x, INT8, overflow="saturate"), INT8).tolist() == [-1, 0, 2, -2, 127, 127, 127, -128, -128, 0]
    assert encode(x[:3], INT8, overflow="refuse").tolist() == [255, 0, 2]


# ---- Properties


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@each_float
@settings(max_examples=50, deadline=None)
@given(x=st.lists(finite, min_size=2, max_size=40))
def test_encoding_is_monotone_and_odd(fmt, x):
    """Catches: an exponent's part of the code that overtakes its fraction, a sign that changes the rounding."""
    x = np.sort(np.array(x, np.float32))
    y = round_to(x, fmt, overflow="saturate")
    assert np.all(np.diff(y) >= 0)
    np.testing.assert_array_equal(round_to(-x, fmt, overflow="saturate"), -y)


@each_float
@settings(max_examples=50, deadline=None)
@given(x=st.lists(finite, min_size=1, max_size=40))
def test_the_error_is_half_a_quantum(fmt, x):
    """Catches: a quantum of the binade below or above. 2^-M of the binade's lower end, or the smallest subnormal."""
    x = np.clip(np.array(x, np.float32), -fmt.max, fmt.max)
    quantum = np.maximum(2.0 ** (np.frexp(x.astype(float))[1] - 1 - fmt.mantissa), fmt.tiny)
    y = round_to(x, fmt, overflow="saturate").astype(float)
    assert np.all(np.abs(y - x) <= quantum / 2)
    np.testing.assert_array_equal(round_to(y, fmt, overflow="saturate"), y)  # and once is enough


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (32769,), (7, 9361), (3, 5, 7)])
def test_any_shape_and_layout_gives_the_same_codes(fmt, shape):
    """Catches: a block's last element, an odd element without its pair, a strided or transposed view read in order."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 100 if fmt.bits > 4 else 16, size=(*shape, 2)).astype(fmt.container)[..., 1]
    one_by_one = fmt.values[codes]
    x = decode(codes, fmt)
    assert x.shape == shape and x.dtype == np.float32
    np.testing.assert_array_equal(x, one_by_one)
    np.testing.assert_array_equal(decode(codes.T, fmt), one_by_one.T)
    if fmt is not UE8M0:
        wide = np.stack([x, x], axis=-1)[..., 0]  # strided
        np.testing.assert_array_equal(encode(wide, fmt, overflow="saturate"), codes)
        np.testing.assert_array_equal(encode(wide.T, fmt, overflow="saturate"), codes.T)


def test_codes_at_an_odd_address_decode_alike():
    """Catches: a pair of codes read across the alignment of the buffer."""
    codes = all_codes(E4M3)[:127].repeat(3)
    np.testing.assert_array_equal(decode(codes[1:], E4M3), decode(codes, E4M3)[1:])


def test_a_nan_in_one_block_leaves_the_others_alone():
    """Catches: the patch for NaN or overflow applied at the wrong offset, or to the wrong block."""
    x = np.linspace(-500, 500, 100_001, dtype=np.float32)
    x[[5, 40_000, 70_000, -1]] = np.nan
    ours, theirs = encode(x, E4M3, overflow="overflow"), by_ml_dtypes(x, E4M3)
    np.testing.assert_array_equal(ours, theirs)


# ---- bfloat16 by name


def test_to_bf16_is_the_format_bf16():
    """Catches: two roundings to bfloat16 that disagree; the rule for other array modules against the compiled one."""
    rng = np.random.default_rng(2)
    u = np.concatenate([rng.integers(0, 2**32, 200_000, dtype=np.uint32), hard_cases(BF16).view(np.uint32)])
    x = u.view(np.float32)
    codes = encode(x, BF16, overflow="overflow")
    np.testing.assert_array_equal(to_bf16(x).view(np.uint32), codes.astype(np.uint32) << 16)
    np.testing.assert_array_equal(bf16_bits(u) >> 16, codes)


# ---- What is refused


@pytest.mark.parametrize(
    ("x", "fmt", "overflow", "says"),
    [
        (np.float32([[1, 2], [465, 1]]), E4M3, "refuse", r"gate\[1, 0\] = 465.0 has no code in e4m3fn"),
        (np.float32([1, np.nan]), E4M3, "refuse", r"gate\[1\] = nan has no code in e4m3fn"),
        (np.float32([np.inf]), E5M2, "refuse", r"gate\[0\] = inf has no code in e5m2"),
        (np.float32([0.0] * 40_000 + [7.5]), E2M1, "refuse", r"gate\[40000\] = 7.5"),
        (np.float32([1, np.nan]), E2M1, "saturate", r"gate\[1\] = nan has no code in e2m1fn"),
        (np.float32([np.nan]), INT8, "saturate", r"gate\[0\] = nan has no code in int8"),
        (np.float32([200]), INT8, "refuse", r"gate\[0\] = 200.0"),
        (np.float32(1e9), FP16, "refuse", r"gate\[\] = 1000000000.0"),
        (np.float32([8]), E2M1, "overflow", "overflow='overflow' for e2m1fn"),
        (np.float32([8]), E4M3, "wrap", "overflow='wrap'"),
        (np.float32([8]), UE8M0, "saturate", "encode_scales"),
        (np.arange(4), E4M3, "saturate", "gate has dtype int64"),
        (np.ones(2, ml_dtypes.float8_e4m3fn), E4M3, "saturate", "gate has dtype float8_e4m3fn"),
    ],
)
def test_what_has_no_code_is_refused_by_name(x, fmt, overflow, says):
    """Catches: NaN turned into a number, silent overflow where it was not allowed, codes encoded a second time."""
    with pytest.raises(SpecError, match=says):
        encode(x, fmt, overflow=overflow, name="gate")


def test_464_is_not_refused():
    """Catches: refusing by |x| > max, although 464 rounds to 448 and 6.9 to 6."""
    assert round_to(np.float32([464, -460]), E4M3, overflow="refuse").tolist() == [448, -448]
    assert round_to(np.float32([6.9]), E2M1, overflow="refuse").tolist() == [6]


@pytest.mark.parametrize(
    ("codes", "fmt", "says"),
    [
        (np.array([3, 16], np.uint8), E2M1, "up holds 16, which is no code of e2m1fn"),
        (np.array([4096], np.uint16), E5M6, "up holds 4096, which is no code of e5m6"),
        (np.array([1], np.uint16), E4M3, "up has dtype uint16; expected uint8 codes of e4m3fn"),
        (np.array([1], ml_dtypes.float8_e5m2), E4M3, "up has dtype float8_e5m2"),
        (np.array([1.0], np.float32), E4M3, "up has dtype float32"),
        (np.array([1], np.int8), E4M3, "up has dtype int8"),
        (np.array([1], np.uint8), BF16, "up has dtype uint8; expected uint16"),
    ],
)
def test_codes_out_of_the_format_are_refused_by_name(codes, fmt, says):
    """Catches: E5M2 codes read as E4M3, unpacked nibbles with garbage above, values decoded a second time."""
    with pytest.raises(SpecError, match=says):
        decode(codes, fmt, name="up")
