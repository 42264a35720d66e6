"""What rows, and single numbers of a rotary table, are held to."""

import ml_dtypes
import numpy as np
import pytest

from refimpl.diff.tolerance import (
    UNIT,
    Distance,
    allowed,
    allowed_lean,
    cancelling,
    counting,
    distance,
    elements_of,
    reason,
    strays,
)
from refimpl.diff.wide import Wide

POSITIONS = np.array([[0, 1, 23, 4_095, 163_839]])
FREQUENCIES = 10_000.0 ** -np.arange(0, 1, 1 / 32)


def tables(positions, dtype=np.float64):
    angle = positions[..., None].astype(dtype) * FREQUENCIES.astype(dtype)
    return np.stack([np.cos(angle), np.sin(angle)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_table_of_rounded_angles_conforms_and_one_of_the_next_position_does_not(dtype):
    """Catches an allowance that does not grow with the angle, of which float32 knows 24 bits, or that a mistake goes through."""
    exact, kept = tables(POSITIONS), getattr(ml_dtypes, dtype, dtype)
    given = tables(POSITIONS, np.float32).astype(kept).astype(np.float64)
    limit = elements_of("mla.rope_tables", UNIT[dtype], lambda: iter([[POSITIONS]]))
    assert limit == (4 * UNIT[dtype], 4 * 2.0**-24 * 163_840)
    assert strays(given, exact, limit) == 0 and strays(tables(POSITIONS + 1), exact, limit) > exact.size / 4
    near = tables(np.array([[1_000]]))  # of a shorter run: what was allowed at 163,839 no longer is
    limit = elements_of("mla.rope_tables", UNIT[dtype], lambda: iter([[np.array([[1_000]])]]))
    assert strays(near + 5e-3 * (np.abs(near) < 0.1), near, limit) == (np.abs(near) < 0.1).sum() > 0


def test_other_stages_and_exact_tables_are_held_by_rows():
    """Catches single numbers of a sum, which cancel, held to roundings of themselves; a limit that is asked of no limit."""
    inputs = lambda: iter([[POSITIONS]])  # noqa: E731
    assert elements_of("mla.q", UNIT["bfloat16"], inputs) is None
    assert elements_of("mla.rope_tables", UNIT["float32"], inputs) is None
    assert strays(np.ones(3), np.zeros(3), None) == 0


@pytest.mark.parametrize(("stage", "factor"), [("mla.q", 1.0), ("mla.rope_tables", 4.0)])
def test_a_row_is_allowed_what_its_reason_says(stage, factor):
    """Catches a factor of a stage that is another than the reader is told: four times the worst twin, four roundings at least."""
    for family, unit, least in ((2e-3, 1e-6, 8e-3), (2e-7, 1e-6, 4e-6), (0.0, 1e-6, 4e-6)):
        assert allowed(stage, unit, family) == pytest.approx(factor * least, rel=1e-12)
        assert reason(stage, family).startswith(f"max(4 x worst of 4 twins {family:.1e}, 4 roundings)")
    told = reason(stage, 0.0).partition(") x ")[2].partition(":")[0]
    assert told == ("" if factor == 1 else f"{factor:g}")


@pytest.mark.parametrize(
    ("lean", "upright", "kept"), [(2e-6, 1e-6, False), (1e-6, 1e-6, True), (5e-7, 1e-6, True), (0.0, 0.0, True)]
)
def test_a_lean_is_let_go_only_where_it_is_too_far_and_few_numbers_make_it(lean, upright, kept):
    """Catches a lean that is reported as none though it is within what is allowed, or though roundings of many numbers cancel."""
    found, many = Distance(1e-3, lean, 2.0), np.ones((40, 50))
    one = np.full((40, 50), 1e-9)
    one[3, 4] = 1.0  # far above all others: its rounding is theirs
    assert cancelling(found, many, upright) == found
    assert cancelling(found, one, upright) == (found if kept else Distance(1e-3, 0.0, 2.0))
    whole = Wide((1, 1, 40, 50), np.float64, 0.0, lambda p: one[None, None, p.start : p.stop])
    assert cancelling(found, whole, upright) == found


def test_so_many_numbers_count():
    """Catches another measure of how few numbers make a sum: n of equal size count as n, whatever lies far below them."""
    for n in (1, 2, 17, 300):
        e = np.full(1000, 1e-8)
        e[:n] = -3.0
        assert counting(e) == pytest.approx(n, rel=1e-9)
        e[n] = -np.inf  # masked: no number
        assert counting(e) == pytest.approx(n, rel=1e-9)


def test_few_rows_may_lean_further():
    """Catches a correct norm of one token called wrong, since its factor is rounded once for all channels; a wrong factor of many
    rows let pass; and rows counted that are too small to count. Oracle: the rule, 1 + 2 / sqrt(R) below 16 rows, written again.
    """
    for n, told in ((1, 3.0), (4, 2.0), (15, 1 + 2 / 15**0.5), (16, 1.0), (400, 1.0)):
        e = np.random.default_rng(n).choice([-1.0, 1.0], (n, 48))
        found = distance("attn_norm", e * (1 + 1e-7), e)
        assert found.rows == pytest.approx(n) and found.lean == pytest.approx(1e-7, rel=1e-6)
        assert allowed_lean(["attn_norm"], 1e-7, 0.0, found.rows) == pytest.approx(told * 1e-7)
        assert allowed_lean(["attn_norm"], 1e-7, 1e-7, found.rows) == pytest.approx(max(told, 4) * 1e-7)
    one = np.concatenate([e[:1] * 1e3, e])
    assert distance("attn_norm", one, one).rows < 1.1
    for size in (1e-120, 1e120):  # whose squares' squares no float64 holds
        assert distance("attn_norm", size * e, size * e).rows == pytest.approx(400)


def test_numbers_of_rows_that_are_not_judged_do_not_stray():
    """Catches rotary tables of padding, whose positions are anyone's, held to two roundings a number."""
    e = np.random.default_rng(0).random((2, 3, 4, 5))
    x = e.copy()
    x[:, 1, 2:] += 1.0
    settled = np.ones((2, 3, 4), bool)
    assert strays(x, e, (1e-3, 1e-3), settled) == 2 * 2 * 5
    settled[:, 1, 2:] = False
    assert strays(x, e, (1e-3, 1e-3), settled) == 0
