"""One tap against a replay that is made by hand: what it may be off, what it takes to know that, what is said."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from refimpl.diff.compare import Finding, Units, compare, settled_rows
from refimpl.diff.glimpse import Glimpse
from refimpl.diff.replay import Step
from refimpl.diff.tolerance import BLOCK, FACTOR, LEAN, ROUNDINGS
from refimpl.layers.stage import Call

U = 2.0**-24
"""Roundoff of the tap, and of all that was computed for it."""


def _handed(arrays: list[Any], asked: list[str], what: str) -> Callable[[], Iterator[Any]]:
    def give() -> Iterator[Any]:
        for a in arrays:
            asked.append(what)
            yield a

    return give


def _step(stage: str, e: Any, asked: list[str] | None = None, **parts: Any) -> Step:
    """A call's step: exact output e; ours, twins, glimpses, inputs, unsettled, naive if told. What is asked for is noted."""
    noted = [] if asked is None else asked
    call = Call(stage, f"fwd/L1/{stage}", (), parts.pop("static", {}))
    lists = {n: _handed(parts.pop(n, []), noted, n) for n in ("twins", "glimpses", "inputs")}
    e = np.asarray(e)
    return Step(call, e, parts.pop("ours", e), unsettled=parts.pop("unsettled", None), **lists, **parts)


def _found(stage: str, x: Any, e: Any, **parts: Any) -> Finding:
    return compare(_step(stage, e, **parts), np.asarray(x), Units(U, U, (stage,)), {})


E = np.ones((1, 8, 64))
SIGNS = np.where(np.arange(64) % 2, 1.0, -1.0)
"""Half of a row's numbers go up, half go down: nothing leans."""


def _off(by: float) -> Any:
    """E with one row off by that many roundings."""
    x = E.copy()
    x[0, 3] += by * U * SIGNS
    return x


def test_twins_are_made_only_as_far_as_they_are_needed() -> None:
    """Catches a part of a twin that is made for a tap that is within four roundings, a whole one where parts suffice, and an
    allowance that counts twins that nobody needed. Oracle: four roundings, or four times the worst twin that was asked for.
    """
    parts = [Glimpse((slice(None),), _off(n)) for n in (0.5, 3, 5)]
    whole = [_off(n) for n in (1, 6, 9)]
    for by, asked, family in (
        (3.9, [], 0),
        (7, ["glimpses"] * 2, 3),
        (19, ["glimpses"] * 3, 5),
        (23, ["glimpses"] * 3 + ["twins"] * 2, 6),
        (30, ["glimpses"] * 3 + ["twins"] * 3, 9),
        (40, ["glimpses"] * 3 + ["twins"] * 3, 9),
    ):
        seen: list[str] = []
        f = _found("resid", _off(by), E, asked=seen, glimpses=parts, twins=whole)
        assert seen == asked and f.ok == (by < 36), by
        assert f.twin == pytest.approx(family * U, rel=1e-6) and f.allowed == pytest.approx(
            max(ROUNDINGS, FACTOR * family) * U
        )
        assert f.error == pytest.approx(by * U, rel=1e-6) and f.lean < 1e-12
        assert f.upright == pytest.approx(LEAN * U * (1 + 2 / np.sqrt(8)), rel=1e-2)  # of eight rows


def test_all_rows_that_lean_one_way_are_found() -> None:
    """Catches a factor of three roundings on every number, which no row shows, let pass; or twins that lean as far unheard."""
    f = _found("resid", E * (1 + 3 * U), E)
    assert (
        not f.ok and f.lean == pytest.approx(3 * U, rel=1e-6) and "all lean one way" in f.note and f.error < f.allowed
    )
    assert _found("resid", E * (1 + 3 * U), E, twins=[E * (1 + U)]).ok
    assert _found("resid", E[:, :, :1] * (1 + 3 * U), E[:, :, :1]).ok  # eight numbers need not cancel


def test_the_distance_to_our_own_run_is_of_the_whole_tap() -> None:
    """Catches the last number or block taken for all of them, what is masked counted. Oracle: one quotient of norms in float64."""
    rng = np.random.default_rng(0)
    for shape in ((1, 2, 3), (1, 3, BLOCK // 2 + 5)):
        ours = rng.standard_normal(shape)
        x = ours + 0.01 * rng.standard_normal(shape)
        expected = math.sqrt(((x - ours) ** 2).sum() / (ours**2).sum())
        assert _found("resid", x, ours + 1, ours=ours).chained == pytest.approx(expected, rel=1e-5)
    s = rng.standard_normal((1, 2, 3, 3))
    hidden = np.where(np.tri(3, dtype=bool), s, -np.inf)
    x = np.where(np.tri(3, dtype=bool), s * 1.25, -1e4)
    assert _found("mla.scores", x, hidden).chained == pytest.approx(0.25, rel=1e-5)
    w = np.array([[[0.1, 0.2, 0.7]]])
    assert _found("router.weights", w[..., ::-1], w).chained == 0.0  # the order of its slots is free


def test_a_first_step_whose_sign_is_a_rounding_says_nothing() -> None:
    """Catches a weight blamed for having gone the other way where the first moment is 0 to rounding, and one let off elsewhere."""
    w, m, v = np.ones((4, 8)), np.full((4, 8), 0.5), np.full((4, 8), 0.25)
    m[2, 5] = 1e-9
    inputs = [[w, m, v], [w, m + 1e-9, v], [w, m - 1e-9, v]]
    e = w - 0.01 * np.sign(m)
    other = e.copy()
    other[2, 5] = 1.01
    twin = e.copy()
    twin[2, 5] = 99.0  # whatever it does there
    assert _found("optim.step", other, e, inputs=inputs).ok
    wrong = other.copy()
    wrong[2, 4] = 1.01
    assert not _found("optim.step", wrong, e, inputs=inputs, twins=[twin]).ok
    assert not _found("optim.step", other, e, inputs=[[w, m + 1, v], [w, m + 1 + 1e-9, v]]).ok


def test_tokens_in_doubt_are_those_of_the_taps_rows() -> None:
    """Catches doubt put on another axis, on rows that were not recorded, a loss called doubtful where no token is."""
    doubt = np.array([[False, True, False]])
    resid = _step("resid", np.ones((1, 3, 4)), unsettled=doubt)
    np.testing.assert_array_equal(settled_rows(resid, {}), ~doubt)
    np.testing.assert_array_equal(settled_rows(resid, {1: [0, 1]}), [[True, False]])
    np.testing.assert_array_equal(settled_rows(resid, {2: [0, 1]}), ~doubt)
    heads = settled_rows(_step("mla.q", np.ones((1, 3, 2, 4)), unsettled=doubt), {})
    np.testing.assert_array_equal(heads, np.repeat(~doubt[..., None], 2, axis=2))
    scores = settled_rows(_step("mla.scores", np.ones((1, 2, 3, 3)), unsettled=doubt), {})
    np.testing.assert_array_equal(scores, np.repeat(~doubt[:, None], 2, axis=1))
    for none in (False, True):
        rows = settled_rows(_step("moe.down", np.ones((6, 4)), unsettled=doubt & none), {})
        loss = settled_rows(_step("loss.main", np.array(1.0), unsettled=doubt & none), {})
        assert rows is not None and loss is not None
        np.testing.assert_array_equal(rows, np.full(6, not none))
        np.testing.assert_array_equal(loss, [not none])
    assert settled_rows(_step("resid", np.ones((1, 3, 4))), {}) is None
    assert _found("resid", np.full((1, 3, 4), 7.0), np.ones((1, 3, 4)), unsettled=doubt | True).open


def test_sets_and_whole_numbers_are_compared_exactly() -> None:
    """Catches a set whose order counts, a token that is not counted, tokens in doubt that are."""
    e = np.array([[[3, 1], [0, 2], [4, 5]]])
    x = np.array([[[1, 3], [0, 4], [4, 6]]])
    f = _found("router.ids", x, e, ours=np.array([[[3, 1], [4, 0], [5, 4]]]))
    assert (f.ok, f.error, f.chained) == (False, pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert f.note == "2 of 3 tokens choose others, the first at [0, 1]: [0, 4], expected [0, 2]"
    f = _found("router.ids", x, e, unsettled=np.array([[False, True, False]]))
    assert f.error == pytest.approx(1 / 3) and "the first at [0, 2]: [4, 6], expected [4, 5]" in f.note
    assert _found("router.ids", e[..., ::-1], e).ok
    f = _found("router.counts", np.array([3, 2, 1]), np.array([3, 1, 2]), ours=np.array([3, 2, 2]))
    assert (f.ok, f.error, f.chained, f.note) == (False, 2.0, 1.0, "2 of 3 elements differ")
    f = _found("router.counts", np.array([3, 2]), np.array([3, 2]))
    assert (f.ok, f.error, f.note) == (True, 0.0, "")


def test_where_it_is_wrong_is_said() -> None:
    """Catches another row named, rows within their limit counted, a factor said of what is none, or not said of what is one."""
    x = E.copy()
    x[0, 2] += 0.25 * SIGNS
    x[0, 6] += 0.5 * SIGNS
    assert _found("resid", x, E).note == "worst row [0, 6], 2 of 8 rows affected"
    e = np.random.default_rng(0).standard_normal((1, 4, 16))
    note = _found("resid", 2.5 * e, e).note
    assert note.endswith("4 of 4 rows affected; the candidate is 2.5000 x ours")
    assert "x ours" not in _found("resid", 2.5 * e + 0.01, e).note
    holed = e.copy()
    holed[0, 1, :3] = np.nan, np.inf, -np.inf
    assert _found("resid", holed, e).note == "3 elements are NaN or infinite"
    unknown = _found("resid", e, np.full_like(e, np.nan))
    assert unknown.ok and unknown.open and "nothing to compare with" in unknown.note
    partly = np.where(np.arange(16) < 3, np.nan, e)
    assert not _found("resid", 2 * e, partly).ok  # what is known is compared
