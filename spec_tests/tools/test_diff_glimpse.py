"""What makes judging cheaper, against what it stands for: parts of twins, attention's scores in one product, its shares without
a subtraction.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refimpl
from refimpl.diff import Case, Trace, glimpse, replay, rows, wide
from refimpl.diff.judge import judge
from refimpl.diff.tolerance import distance
from refimpl.layers.stage import STAGES

CASE = Path(refimpl.__file__).parent / "cases" / "tiny"


def _trace(name: str, without: str = "") -> Trace:
    trace = Trace.read(CASE / f"{name}.safetensors")
    taps = {t: a for t, a in trace.taps.items() if not any(w in t for w in without.split())}
    return dataclasses.replace(trace, taps=taps)


@pytest.mark.parametrize("block", [None, 150])
def test_a_part_of_a_twin_is_the_twins(block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows of other tokens, experts' rows out of the order of dispatch, a part that is moved otherwise than the whole, a
    block of other queries. Oracle: the whole twin's rows; a product of fewer rows may round otherwise.
    """
    monkeypatch.setattr(glimpse, "LEAST", 1)
    if block:
        monkeypatch.setattr(wide, "LEAST", 1)
        monkeypatch.setattr(wide, "BLOCK", block)
    found = judge(Case.read(CASE), _trace("hf-float32", "L1/mla.q_a_norm L2/moe.act")).grounds
    assert found is not None
    seen = set()
    for step in replay.replay(found.program, found.recorded):
        for part, twin in zip(step.glimpses(), step.twins(), strict=False):
            mine, theirs = part.of(twin)
            seen.add(step.call.stage)
            shown = np.isfinite(theirs)
            assert mine.shape == theirs.shape and (shown == np.isfinite(mine)).all()
            away = np.linalg.norm((mine - theirs)[shown]) / np.linalg.norm(theirs[shown])
            assert away < 2.0**-20, step.call.tap  # 16 u: sums of at most 80 numbers in another order
    assert {"mla.q", "attn_out", "moe.gate", "moe.down", "logits"} <= seen
    assert ({"mla.scores", "mla.probs", "mla.ctx"} <= seen) == bool(block)


@pytest.mark.parametrize("name", ["hf-float32", "hf-bfloat16", "hf-bug"])
def test_parts_decide_as_wholes_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a part that allows more than the whole, rows held to another share of the largest, a culprit that is told another
    limit. Oracle: the same judgement with whole twins.
    """
    trace = _trace(name, "L1/mla.c_kv L2/ffn_norm")
    monkeypatch.setattr(wide, "LEAST", 1)
    monkeypatch.setattr(wide, "BLOCK", 150)
    monkeypatch.setattr(glimpse, "LEAST", 1)
    some = judge(Case.read(CASE), trace).findings
    monkeypatch.setattr(replay, "glimpse", lambda *a: None)
    whole = judge(Case.read(CASE), trace).findings
    assert [(f.tap, f.ok, f.error, f.lean) for f in some] == [(f.tap, f.ok, f.error, f.lean) for f in whole]
    for a, b in zip(some, whole, strict=True):
        assert a.error <= a.allowed * (1 + 1e-9) or not a.ok or not a.allowed
        assert a.ok or abs(a.allowed - b.allowed) <= 1e-6 * b.allowed


def _operands(dtype: Any) -> tuple[list[Any], Any]:
    rng = np.random.default_rng(3)
    shapes = ((2, 6, 3, 12), (2, 6, 3, 8), (2, 9, 3, 14), (2, 9, 8))
    mask = np.where(np.arange(9) > np.arange(6)[:, None] + 3, -np.inf, 0.0) + np.zeros((2, 1, 6, 9))
    mask[1, ..., :2] = -np.inf  # padding before the tokens
    return [rng.standard_normal(s).astype(dtype) for s in shapes], mask.astype(dtype)


@pytest.mark.parametrize(("dtype", "near"), [(np.float64, 1e-14), (np.float32, 2e-6)])
def test_scores_in_one_product(dtype: Any, near: float) -> None:
    """Catches channels of q and k that do not meet, keys of another sequence, a mask that is added from the wrong key on. Oracle:
    the stage. near: some roundings of sums of 20 numbers of size 1.
    """
    args, mask = _operands(dtype)
    made = rows.joined(*args, scale=0.25)
    whole = STAGES["mla.scores"].fn(*args, mask, scale=0.25)
    for b, start, stop in ((0, 0, 6), (1, 2, 5), (0, 4, 6), (1, 0, 1)):
        place = wide.Place((2, 3, 6, 9), b, start, stop)
        n = wide.seen(mask[b : b + 1, :, start:stop], -np.inf)
        seen = mask[b : b + 1, :, start:stop, :n]
        got = made(place, n) + seen
        assert got.dtype == dtype
        np.testing.assert_allclose(got, whole[place.index][..., :n], atol=near, rtol=near)
        first = rows.zeros(seen[0, 0])
        assert not seen[..., :first].any() and (first == n or seen[..., first].any())


@pytest.mark.parametrize("size", [1.0, 100.0, 2000.0])
def test_shares_without_a_subtraction(size: float) -> None:
    """Catches e^s that overflows, or that is 0 for a whole row; a query that sees no key. Oracle: the stage. Scores of 100 are
    known to 1e-14, so are their exponentials.
    """
    s = size * np.random.default_rng(4).standard_normal((1, 2, 5, 7))
    s[0, :, 2:4, 4:] = -np.inf
    place = wide.Place(s.shape, 0, 0, 5)
    for x in (s, np.where(np.arange(5)[:, None] == 1, -np.inf, s), s - 2 * size, s + 690, s - 690):
        with np.errstate(over="ignore"):  # as whoever asks for blocks does
            made = rows.shares(lambda _, x=x: x.copy(), place)
        np.testing.assert_allclose(made, STAGES["mla.probs"].fn(x), rtol=1e-12, atol=1e-300)


def test_rows_of_a_part_are_held_to_the_whole_taps_largest() -> None:
    """Catches a part without the tap's largest row that counts small rows for more than the whole does. Oracle: the whole."""
    e = np.outer([1e-6, 2e-6, 1.0], np.arange(1.0, 5.0))
    x = e + np.array([1e-8, 3e-8, 0.0])[:, None]
    whole = distance("attn_out", x, e)
    assert distance("attn_out", x[:2], e[:2], largest=whole.largest).worst == pytest.approx(whole.worst, rel=1e-12)
    assert distance("attn_out", x[:2], e[:2]).worst > 100 * whole.worst
