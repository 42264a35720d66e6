"""R 3.3.2, the tensor core: refimpl's integer text against recorded simulators, a rational oracle and its own rules."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics import tensor_core_matmul as exported
from refimpl.layers.numerics.tensor_cores.machines import INPUTS, MACHINES, carrier, machine
from refimpl.layers.numerics.tensor_cores.text import decode, tensor_core_matmul
from refimpl.spec_tests import golden
from refimpl.spec_tests.cases.tensor_core import KINDS, TARGETS, as_bits, operands, rows
from refimpl.spec_tests.oracles import tensor_core as oracle

HOPPER = {"arch": "hopper", "fmt": "e4m3"}
NAN = 0x7FFFFFFF
OTHER = [
    "hopper_wgmma_e5m2_f32",
    "hopper_wgmma_e4m3_f16",
    "hopper_wgmma_bf16_f32",
    "hopper_wgmma_f16_f32",
    "ada_mma_e4m3_f32",
    "blackwell_tcgen05_e4m3_f32",
    "blackwell_tcgen05_e5m2_f32",
]


def other(name):
    """Recorded rows of one machine: arch and fmt, and arrays a, b, c, d."""
    arrays = golden.arrays("tensorcore_other")
    arch, _, fmt, _ = name.split("_")
    return {"arch": arch, "fmt": fmt}, *(arrays[f"{name}_{x}"] for x in "abcd")


def hopper(k):
    """Recorded rows of Hopper E4M3 with K = k: a, b, c, d."""
    arrays = golden.arrays("hopper_e4m3")
    return tuple(arrays[f"k{k}_{x}"] for x in "abcd")


def codes(values, fmt="e4m3"):
    return np.array(values, np.float32).astype(oracle.DTYPES[fmt]).view(carrier(INPUTS[fmt]))


def dot(a, b, c=0.0, arch="hopper", fmt="e4m3"):
    """One output, as its value; a and b are values."""
    return float(
        tensor_core_matmul(codes([a], fmt), codes([b], fmt), np.full((1, 1), c, np.float32), arch=arch, fmt=fmt)[0, 0]
    )


# ------------------------------------------------------------------------------------ recorded and computed elsewhere


@pytest.mark.parametrize("k", [32, 128, 512])
def test_every_recorded_hopper_row_is_equal_to_the_bit(k):
    """Catches any departure from the rule: 12 classes, NaN, subnormals, ties, accumulators over all of float32."""
    a, b, c, d = hopper(k)
    np.testing.assert_array_equal(rows(tensor_core_matmul, a, b, c, **HOPPER), d)


@pytest.mark.parametrize("k", [128, 512])
def test_every_recorded_step_of_a_long_product_is_equal(k):
    """Catches a chain in another order, or truncation once at the end: the result after each 32 is recorded."""
    a, b, c, _ = hopper(k)
    steps = golden.arrays("hopper_e4m3")[f"k{k}_steps"]
    for i in range(k // 32):
        c = rows(tensor_core_matmul, a[:, 32 * i : 32 * i + 32], b[:, 32 * i : 32 * i + 32], c, **HOPPER)
        np.testing.assert_array_equal(c, steps[:, i])


@pytest.mark.parametrize("name", OTHER)
def test_every_recorded_row_of_the_other_machines_is_equal(name):
    """Catches a wrong F, L, rounding or special value in a row of the table of machines."""
    target, a, b, c, d = other(name)
    np.testing.assert_array_equal(rows(tensor_core_matmul, a, b, c, **target), d)


def test_recorded_partial_sums_of_a_deepseek_shaped_gemm_are_equal():
    """Catches operands exchanged or transposed, which single dot products cannot show."""
    z = golden.arrays("hopper_e4m3")
    b = np.ascontiguousarray(z["gemm_b"].T)
    for i, expected in enumerate(z["gemm_partials"]):
        k = slice(128 * i, 128 * i + 128)
        d = tensor_core_matmul(z["gemm_a"][:, k], b[:, k], np.zeros((24, 32), np.float32), **HOPPER)
        np.testing.assert_array_equal(as_bits(d), expected)


def test_the_table_of_machines_is_the_published_one():
    """Catches a slip in the table that no vector reaches; the oracle's table was typed separately."""
    ours = {key: (m.F, m.L, m.floor, m.out.kept) for key, m in MACHINES.items()}
    assert ours == oracle.MACHINES


@pytest.mark.parametrize(("arch", "fmt", "accumulator"), TARGETS, ids=lambda x: getattr(x, "__name__", x))
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS), k=st.integers(1, 70))
def test_one_dot_product_is_the_oracles(arch, fmt, accumulator, seed, kind, k):
    """Catches errors that code and recordings could share: exact rational arithmetic, nothing in common with ours."""
    a, b, c = operands(np.random.default_rng(seed), fmt, kind, 1, 1, k, accumulator)
    d = tensor_core_matmul(a, b, c, arch=arch, fmt=fmt)
    half = accumulator is np.float16
    expected = oracle.dot(a[0].tolist(), b[0].tolist(), int(as_bits(c)[0, 0]), arch, fmt, half)
    assert int(as_bits(d)[0, 0]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("k", [32, 128])
def test_the_oracle_itself_reproduces_the_recordings(k):
    """Catches an oracle that is wrong in the same way as the code."""
    a, b, c, d = hopper(k)
    found = [oracle.dot(*(x.tolist() for x in row), "hopper", "e4m3") for row in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(found, d)


# ------------------------------------------------------------------------------------------------ the rules, one by one


def test_rule_1_subnormals_keep_the_smallest_exponent():
    """Catches normalised operands. 2^-9 has exponent -6 in E4M3, so 2^-9 * 2^8 has e_p = 2 although it is 2^-1, and cuts
    c at 2^(2 - 13).
    """
    significand, exponent = decode(codes([2.0**-9, 2.0**-6, -1.75]), INPUTS["e4m3"])
    assert significand.tolist() == [1, 8, -14] and exponent.tolist() == [-6, -6, 0]
    assert dot([2.0**-9], [2.0**8], c=2.0**-12) == 2.0**-1


def test_rule_2_products_are_not_renormalised():
    """Catches e_p = floor(log2 |p|). 1.5 * 1.5 = 2.25 has e_p = 0, so the quantum is 2^-13, not 2^-12."""
    assert dot([1.5, 2.0**-7], [1.5, 2.0**-6], c=0.0) == 2.25  # 2^-13 is kept by the alignment and cut by the output
    assert dot([1.5, -1.5, 2.0**-7], [1.5, 1.5, 2.0**-6]) == 2.0**-13


def test_rule_3_zeros_take_no_part_in_the_exponent():
    """Catches 448 * 0 counted with exponent 8 - 7 or a zero accumulator with -126: tiny addends must survive."""
    assert dot([448.0, 2.0**-9], [0.0, 2.0**-9]) == 2.0**-18
    assert dot([256.0, 0.0], [0.0, 256.0], c=2.0**-120) == 2.0**-120
    assert dot([2.0**-70], [2.0**-70], arch="hopper", fmt="bf16") == 2.0**-140  # E = -133 here; -126 would do too
    assert dot([2.0**-74], [2.0**-74], arch="hopper", fmt="bf16") == 2.0**-148  # below 2^(-126 - 25 + 3) but kept
    assert dot([2.0**-80], [2.0**-80], arch="hopper", fmt="bf16") == 0.0


def test_rule_4_truncation_is_toward_zero_and_one_addend_at_a_time():
    """Catches floor (a negative addend would give -1 quantum), rounding, and truncating only the sum."""
    below = [2.0**-8] * 31  # 31 products of 2^-14 beside 2.0: each below the quantum 2^-12
    for sign in (1.0, -1.0):
        assert dot([2.0, *below], [1.0, *(sign * x for x in [2.0**-6] * 31)]) == 2.0


def test_rule_5_a_sum_of_many_equal_products_carries_exactly():
    """Catches an adder of 14 bits: 32 * 2^13 quanta need 19."""
    assert dot([1.75] * 32, [1.75] * 32) == 98.0


def test_rule_6_the_result_keeps_13_fraction_bits_toward_zero():
    """Catches rounding to nearest, and 23 bits kept: 448 * 448 + 8 = 200712 = 98 * 2^11 + 8 loses the 8."""
    assert dot([448.0, 8.0], [448.0, 1.0]) == 448.0 * 448.0
    assert dot([448.0] * 2, [448.0] * 2, c=-3.0 * 2**100) == -3.0 * 2**100
    assert dot([1.0] * 2, [1.0, 2.0**-6], c=-1.0) == 2.0**-6


def test_rule_6_overflow_is_infinity_only_from_2_to_the_128():
    """Catches infinity for what truncation still represents, and a wrap into the sign."""
    largest = np.uint32(0x7F7FFC00).view(np.float32)  # the largest E8M13 number
    assert dot([448.0], [448.0], c=largest) == largest
    assert dot([448.0] * 32, [448.0] * 32, c=np.finfo(np.float32).max) == largest
    half = np.float32(2.0**127)
    grow = [np.array([[2.0**63]], np.float32).astype(ml_dtypes.bfloat16)] * 2
    assert tensor_core_matmul(*grow, half.reshape(1, 1), arch="hopper", fmt="bf16")[0, 0] == 1.5 * 2.0**127
    two = [np.full((1, 2), 2.0**63, np.float32).astype(ml_dtypes.bfloat16)] * 2
    assert np.isposinf(tensor_core_matmul(*two, half.reshape(1, 1), arch="hopper", fmt="bf16")[0, 0])


def test_rule_6_subnormal_results_are_multiples_of_2_to_the_minus_139():
    """Catches float32's own subnormals (multiples of 2^-149) in an accumulator that has 13 fraction bits."""
    c = np.array([[0x000007FF]], np.uint32).view(np.float32)
    d = tensor_core_matmul(codes([[0.0]]), codes([[0.0]]), c, **HOPPER)
    assert as_bits(d)[0, 0] == 0x00000400


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        (0x7F, 0x00, 0x3F800000, NAN),  # NaN * 0
        (0xFF, 0x38, 0x00000000, NAN),  # the other NaN
        (0x00, 0x00, 0xFFC00001, NAN),  # NaN accumulator: payload and sign are gone
        (0x7F, 0x38, 0x7F800000, NAN),  # NaN and infinity
        (0x38, 0xB8, 0x7F800000, 0x7F800000),  # an infinite accumulator stays
        (0x7E, 0x7E, 0xFF800000, 0xFF800000),
        (0x80, 0x38, 0x80000000, 0x00000000),  # -0 + -0 is +0
        (0x38, 0x38, 0xBF800000, 0x00000000),  # 1 - 1 is +0
        (0x00, 0x00, 0x80000001, 0x00000000),  # a negative subnormal that is cut to zero: +0, not -0
    ],
)
def test_rule_7_special_values_of_e4m3(a, b, c, expected):
    """Catches 0x7fc00000, kept NaN payloads, and -0."""
    d = tensor_core_matmul(np.uint8([[a]]), np.uint8([[b]]), np.array([[c]], np.uint32).view(np.float32), **HOPPER)
    assert as_bits(d)[0, 0] == expected


def test_rule_7_infinities_of_e5m2():
    """Catches infinity times zero as zero, and infinities of both signs in different steps as either."""
    inf, zero, one = 0x7C, 0x00, 0x3C
    cases = {(inf, one): 0x7F800000, (inf, one | 0x80): 0xFF800000, (inf, zero): NAN, (zero, inf | 0x80): NAN}
    for (a, b), expected in cases.items():
        d = tensor_core_matmul(np.uint8([[a]]), np.uint8([[b]]), np.ones((1, 1), np.float32), arch="hopper", fmt="e5m2")
        assert as_bits(d)[0, 0] == expected
    both = np.zeros((1, 64), np.uint8)
    both[0, 0], both[0, 40] = inf, inf | 0x80
    d = tensor_core_matmul(
        both, np.full((1, 64), one, np.uint8), np.zeros((1, 1), np.float32), arch="hopper", fmt="e5m2"
    )
    assert as_bits(d)[0, 0] == NAN


def test_float16_accumulators_round_to_nearest_even():
    """Catches truncation into float16: 1 + 2^-11 is a tie (down to even), 1 + 3 * 2^-11 a tie (up to even)."""
    half = np.zeros((1, 1), np.float16)
    for value, expected in ((2.0**-11, 1.0), (3 * 2.0**-11, 1 + 2.0**-9), (1.5 * 2.0**-11, 1 + 2.0**-10)):
        a, b = codes([[1.0, value * 2.0**6]]), codes([[1.0, 2.0**-6]])
        d = tensor_core_matmul(a, b, half, **HOPPER)
        assert d.dtype == np.float16 and float(d[0, 0]) == expected


# ---------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["gauss", "finite", "sparse", "cancel"]))
def test_the_order_of_products_matters_between_steps_only(seed, kind):
    """Catches a sum in floating point inside a step. (That order matters between steps is checked once, below.)"""
    rng = np.random.default_rng(seed)
    a, b, c = operands(rng, "e4m3", kind, 3, 4, 64)
    within = np.concatenate([rng.permutation(32), 32 + rng.permutation(32)])
    d = tensor_core_matmul(a, b, c, **HOPPER)
    np.testing.assert_array_equal(as_bits(tensor_core_matmul(a[:, within], b[:, within], c, **HOPPER)), as_bits(d))


def test_the_order_of_steps_changes_the_bits():
    """Catches a chain evaluated as one exact sum: exchanging steps of Gaussian data changes most outputs."""
    a, b, c = operands(np.random.default_rng(0), "e4m3", "gauss", 16, 16, 256)
    c[...] = 0
    swapped = np.r_[128:256, 0:128]
    d, e = tensor_core_matmul(a, b, c, **HOPPER), tensor_core_matmul(a[:, swapped], b[:, swapped], c, **HOPPER)
    assert np.mean(as_bits(d) != as_bits(e)) > 0.5


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), j=st.integers(-3, 3))
def test_powers_of_two_and_signs_pass_through(seed, j):
    """Catches an absolute quantum: scaling a and c scales the result exactly; negating both negates it."""
    rng = np.random.default_rng(seed)
    a = rng.choice([-1, 1], (2, 40)) * rng.uniform(1, 2, (2, 40)) * 2.0 ** rng.integers(-2, 3, (2, 40))  # all normal
    a = codes(a).view(ml_dtypes.float8_e4m3fn)
    b, c = codes(rng.normal(size=(3, 40))), rng.normal(size=(2, 3)).astype(np.float32)
    d = tensor_core_matmul(a, b, c, **HOPPER)
    scaled = (a.astype(np.float32) * np.float32(2.0**j)).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(
        tensor_core_matmul(scaled, b, c * np.float32(2.0**j), **HOPPER), d * np.float32(2.0**j)
    )
    np.testing.assert_array_equal(tensor_core_matmul(a.view(np.uint8) ^ 0x80, b, -c, **HOPPER), -d)


def test_more_is_not_always_more():
    """Catches a claim of monotonicity: 31 products of 2^-13 and c just below 2 exceed the same products and c = 2."""
    a, b = [2.0**-7] * 31, [2.0**-6] * 31
    below = np.nextafter(np.float32(2), np.float32(0))
    assert dot(a, b, c=below) == pytest.approx(2.003662, abs=1e-6)
    assert dot(a, b, c=2.0) == 2.0


def test_a_step_of_zeros_cuts_the_accumulator():
    """Catches zero padding taken for harmless: c keeps 13 fraction bits; a second step then changes nothing."""
    c = np.float32(1 + 2.0**-14 + 2.0**-13)
    once = dot([0.0] * 32, [0.0] * 32, c=c)
    assert once == 1 + 2.0**-13 == dot([0.0] * 64, [0.0] * 64, c=c)


def test_a_short_last_step_is_a_full_one_with_zeros():
    """Catches a ragged K handled by another path."""
    a, b, c = operands(np.random.default_rng(3), "e4m3", "gauss", 5, 6, 45)
    full = [np.pad(x, ((0, 0), (0, 19))) for x in (a, b)]
    d = tensor_core_matmul(a, b, c, **HOPPER)
    np.testing.assert_array_equal(as_bits(tensor_core_matmul(*full, c, **HOPPER)), as_bits(d))


@pytest.mark.parametrize(("kind", "share"), [("gauss", 0.3), ("finite", 0.005)])
def test_fp8_differs_between_machines_and_mma_sync_differs_from_wgmma(kind, share):
    """Catches one FP8 arithmetic for all machines: steps of 16 or 32, F = 13 or 25, mma.sync on Hopper through FP16."""
    a, b, _ = operands(np.random.default_rng(4), "e4m3", kind, 48, 48, 128)
    c = np.zeros((48, 48), np.float32)
    half = [x.view(ml_dtypes.float8_e4m3fn).astype(np.float16) for x in (a, b)]
    hopper, ada, blackwell = (tensor_core_matmul(a, b, c, arch=x, fmt="e4m3") for x in ("hopper", "ada", "blackwell"))
    mma_sync = tensor_core_matmul(*half, c, arch="hopper", fmt="f16")
    pairs = [(hopper, ada), (hopper, blackwell), (hopper, mma_sync), (ada, blackwell)]
    if kind == "finite":  # both have F = 25, which loses nothing of Gaussian data
        pairs.append((blackwell, mma_sync))
    for x, y in pairs:
        assert np.mean(x != y) > share


def test_sgemm_is_not_exact_for_fp8_but_float64_is():
    """Catches the belief that float32 holds a sum of 32 FP8 products: it needs up to 41 bits."""
    a, b = codes([[448.0, 2.0**-9]]), codes([[448.0, 2.0**-9]])
    x, y = (v.view(ml_dtypes.float8_e4m3fn).astype(np.float32) for v in (a, b))
    true = Fraction(448) ** 2 + Fraction(1, 2**18)
    assert Fraction(float((x @ y.T)[0, 0])) != true
    assert Fraction(float((x.astype(np.float64) @ y.T.astype(np.float64))[0, 0])) == true


# ------------------------------------------------------------------------------------------------- arguments and errors


@pytest.mark.parametrize("matmul", [tensor_core_matmul, exported], ids=["integer", "fast"])
def test_leading_axes_broadcast_and_dtypes_may_be_the_formats_own(matmul):
    """Catches batches that are mixed up, and c that is not broadcast."""
    rng = np.random.default_rng(5)
    a, b, _ = operands(rng, "e4m3", "gauss", 2 * 3 * 10, 3 * 12, 40)
    a, b = a.reshape(2, 3, 10, 40), b.reshape(3, 12, 40)
    c = np.float32(0.5)
    d = matmul(a.view(ml_dtypes.float8_e4m3fn), b, c, **HOPPER)
    assert d.shape == (2, 3, 10, 12) and d.dtype == np.float32
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(d[i, j], matmul(a[i, j], b[j], np.full((10, 12), c), **HOPPER))


@pytest.mark.parametrize("matmul", [tensor_core_matmul, exported], ids=["integer", "fast"])
@pytest.mark.parametrize("alone", ["a", "b", "c"])
def test_one_operand_alone_may_be_a_batch(matmul, alone):
    """Catches leading axes that are taken from the other operands only."""
    rng = np.random.default_rng(6)
    a, b, _ = operands(rng, "e4m3", "gauss", 3 * 2, 3 * 4, 40)
    given = {"a": a.reshape(3, 2, 40), "b": b.reshape(3, 4, 40), "c": rng.normal(size=(3, 2, 4)).astype(np.float32)}
    one = {name: x[0] for name, x in given.items()}
    d = matmul(**one | {alone: given[alone]}, **HOPPER)
    assert d.shape == (3, 2, 4)
    for i in range(3):
        np.testing.assert_array_equal(d[i], matmul(**one | {alone: given[alone][i]}, **HOPPER))


@pytest.mark.parametrize("matmul", [tensor_core_matmul, exported], ids=["integer", "fast"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "hoper"}, "arch 'hoper' with fmt 'e4m3'; expected one of: volta f16"),
        ({"fmt": "e4m2"}, "arch 'hopper' with fmt 'e4m2'"),
        ({"arch": "ampere"}, "arch 'ampere' with fmt 'e4m3'"),
        ({"a": np.zeros((2, 8), np.int8)}, "a has dtype int8; expected uint8 codes, or float8_e4m3fn"),
        ({"b": np.zeros((3, 8), np.float32)}, "b has dtype float32"),
        ({"b": np.zeros((3, 9), np.uint8)}, "a has shape \\(2, 8\\), b \\(3, 9\\); expected"),
        ({"a": np.zeros((2, 0), np.uint8), "b": np.zeros((3, 0), np.uint8)}, "K is 0"),
        ({"a": np.zeros(8, np.uint8)}, "a has shape \\(8,\\); expected a matrix"),
        ({"c": np.zeros((3, 2), np.float32)}, "c has shape \\(3, 2\\); expected \\(..., M, N\\)"),
        ({"c": np.zeros((2, 3), np.float64)}, "accumulator dtype float64"),
        ({"arch": "blackwell", "fmt": "e2m1", "a": np.full((2, 8), 16, np.uint8)}, "a\\[0, 0\\] is no code of e2m1"),
    ],
)
def test_wrong_operands_are_refused_by_name(matmul, change, message):
    """Catches silent broadcasting, float input taken for codes, and codes out of a format."""
    good = {"a": np.zeros((2, 8), np.uint8), "b": np.zeros((3, 8), np.uint8), "c": np.zeros((2, 3), np.float32)}
    call = good | HOPPER | change
    with pytest.raises(SpecError, match=message):
        matmul(call.pop("a"), call.pop("b"), call.pop("c"), **call)


def test_bfloat16_has_no_float16_accumulator():
    """Catches a machine that does not exist."""
    with pytest.raises(SpecError, match="accumulator dtype float16 with fmt bf16; expected float32"):
        machine("hopper", "bf16", np.float16)


def test_arguments_are_left_alone():
    """Catches an accumulator updated in place: callers keep c."""
    a, b, c = operands(np.random.default_rng(6), "e4m3", "gauss", 20, 30, 64)
    before = [x.copy() for x in (a, b, c)]
    exported(a, b, c, **HOPPER)
    for x, y in zip((a, b, c), before, strict=True):
        np.testing.assert_array_equal(as_bits(x), as_bits(y))
