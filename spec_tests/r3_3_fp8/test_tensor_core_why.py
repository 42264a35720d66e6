"""`why` explains one output of a tensor core: its numbers must add up to the bits, exactly."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics import tensor_core_matmul, why
from refimpl.spec_tests.cases.tensor_core import as_bits, operands

HOPPER = {"arch": "hopper", "fmt": "e4m3"}


def e4m3(*values):
    return np.array([values], np.float32).astype("float8_e4m3fn").view(np.uint8)


@pytest.mark.parametrize(("arch", "fmt"), [("hopper", "e4m3"), ("hopper", "bf16"), ("ada", "e5m2"), ("ampere", "tf32")])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["gauss", "subnormal", "sparse", "lopsided"]))
def test_what_is_kept_and_what_is_lost_is_the_exact_sum(arch, fmt, seed, kind):
    """Catches an explanation of another computation: exact = written + lost in alignment + lost in writing, as rationals,
    and the code is the one that the tensor core gives.
    """
    a, b, _ = operands(np.random.default_rng(seed), fmt, kind, 3, 4, 50)
    c = np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32)
    told = why(a, b, c, 2, 3, arch=arch, fmt=fmt)
    d = tensor_core_matmul(a, b, c, arch=arch, fmt=fmt)
    last = told.steps[-1]
    assert last.code == as_bits(d)[2, 3]
    # kept + lost, over the whole product, step by step and addend by addend
    assert told.exact == Fraction(last.value) + told.aligned + told.written
    for step in told.steps:
        assert sum(x.t for x in step.addends) == step.S
        for x in step.addends:
            assert x.x == x.t * step.quantum + x.lost and abs(x.lost) < step.quantum


def test_an_explanation_in_words():
    """Catches a text that names no E, no shifted addend or no loss. 1.5 * 1 + 2^-15 beside c = -3."""
    told = why(e4m3(1.5, 2.0**-9, 0), e4m3(1, 2.0**-6, 1), np.float32([[-3]]), 0, 0, **HOPPER)
    assert str(told).splitlines() == [
        "d[0, 0] on hopper e4m3 (F 13, 32 products a step) = -1.5 (0xbfc00000)",
        "exact sum -1.499969482421875: 3.05175781e-05 lost in alignment, 0 in writing",
        "step 0",
        "  E 1, quantum 0.000244140625",
        "    k 0    1.5              e 0    -> t 6144",
        "    k 1    3.05175781e-05   e -12  -> t 0, lost 3.05175781e-05",
        "    c      -3               e 1    -> t -12288",
        "    (1 addends are zero)",
        "    S -6144 -> -1.5 (0xbfc00000)",
    ]


def test_special_values_are_said_to_be_special():
    """Catches a made-up sum for NaN."""
    nan = why(np.uint8([[0x7F]]), e4m3(1), np.float32([[0]]), 0, 0, **HOPPER)
    assert "an operand or the accumulator is infinite or NaN: the result is nan, 0x7fffffff" in str(nan)


def test_an_index_outside_the_result_is_refused():
    """Catches negative indices that wrap around."""
    with pytest.raises(SpecError, match="d\\[-1, 0\\] of a result of shape \\(1, 1\\)"):
        why(e4m3(1), e4m3(1), np.float32([[0]]), -1, 0, **HOPPER)
