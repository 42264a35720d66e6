"""A recorded NaN spoils what depends on it by the mathematics, and hides nothing else."""

import functools

import numpy as np
import pytest

from refimpl.diff import Trace, render
from refimpl.diff.judge import judge
from refimpl.layers import STAGES
from refimpl.layers.stage import Patch, tap_name
from refimpl.record import trace_case

from .test_diff_partial import case, only

TOKEN = (1, 11)
HOLES = {"k and v": "fwd/L1/mla.kv_b", "k": "fwd/L1/mla.k_rope", "hidden": "fwd/L0/resid"}
EARLIER = ["fwd/L1/mla.probs", "fwd/L1/mla.ctx", "fwd/L1/resid", "fwd/L2/mla.scores", "fwd/L2/attn_out", "fwd/logits"]


def changed(tap, change, token=TOKEN):
    """A patch that changes a token of one tap in place."""
    (stage,) = [n for n, s in STAGES.items() if tap.endswith(f"/{s.tap}") and n not in ("mla.scores_absorbed",)]

    def fn(*args, **static):
        y = np.array(STAGES[stage].fn(*args, **static))
        if tap_name(STAGES[stage]) == tap:
            change(y[token])
        return y

    return Patch(stage, fn)


@functools.cache
def clean(precision):
    return trace_case(case(), precision=precision)


@functools.cache
def torn(hole, precision="float32"):
    """A candidate that masks by leaving out, as fused attention does: NaN where a number depends on the token, which is where
    another finite number there changes it; experts are those of the clean run.
    """

    def bend(a):
        a *= 1.5

    ids = {f"fwd/{unit}/router.ids": clean(precision).taps[f"fwd/{unit}/router.ids"] for unit in ("L1", "L2")}
    same = Patch("router.ids", lambda *args, **static: ids[tap_name(STAGES["router.ids"])])
    other = trace_case(case(), precision=precision, patches=[changed(HOLES[hole], bend), same])
    taps = {}
    for n, x in clean(precision).taps.items():
        y = other.taps[n]
        depends = (np.asarray(x) != np.asarray(y)) & (x.dtype.kind not in "iu")
        taps[n] = np.where(depends, np.asarray(np.nan, x.dtype), x) if depends.any() else x
    chosen = [t for t in taps if t.endswith(("router.ids", "router.groups"))]
    return only(Trace(clean(precision).header, taps), lambda t: t not in chosen or t.endswith("ids"))


def spoiled(trace, tap):
    """The trace with one row of an earlier token 20 % too large."""
    a = np.array(trace.taps[tap])
    row = (1, 1, 5) if tap.endswith(("probs", "scores")) else (1, 5)
    assert np.isfinite(a[row].astype(np.float32)).any()
    a[row] *= a.dtype.type(1.2)
    return Trace(trace.header, dict(trace.taps) | {tap: a})


@pytest.mark.parametrize("hole", ["k and v", *[pytest.param(h, marks=pytest.mark.slow) for h in ("k", "hidden")]])
@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_hole_is_blamed_where_it_arises(hole, precision):
    """Catches stages behind a hole blamed for it, those before it in the sequence too, which 0 x NaN would make NaN."""
    judgement = judge(case(), torn(hole, precision))
    assert [f.tap for f in judgement.culprits] == [HOLES[hole]], render(judgement)


@pytest.mark.parametrize(
    ("hole", "tap", "precision"),
    [
        pytest.param(h, t, p, marks=[] if (h, p) == ("k and v", "float32") and "ctx" in t else pytest.mark.slow)
        for h in HOLES
        for t in EARLIER
        for p in ("float32", "bf16")
    ],
)
def test_a_hole_hides_no_earlier_token(hole, tap, precision):
    """Catches a second, finite mistake at a token before the hole that passes because the replay is NaN there."""
    judgement = judge(case(), spoiled(torn(hole, precision), tap))
    assert {HOLES[hole], tap} <= {f.tap for f in judgement.culprits}, render(judgement)


@pytest.mark.slow
@pytest.mark.parametrize("hole", ["k and v", "hidden"])
def test_a_hole_hides_nothing_in_a_coarse_trace(hole):
    """Catches a region whose inner, computed values spread the hole: what is not recorded is mended as well."""
    few = only(torn(hole), lambda t: t.endswith(("resid", "resid_mid", "kv_b", "router.ids", "logits")))
    wrong = spoiled(few, "fwd/L1/resid_mid")
    assert [f.tap for f in judge(case(), few).culprits] == [HOLES[hole]]
    assert {f.tap for f in judge(case(), wrong).culprits} >= {HOLES[hole], "fwd/L1/resid_mid"}


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_candidate_that_multiplies_zero_by_nan_is_not_blamed_for_it(precision):
    """Catches every stage behind a hole blamed in a candidate, such as ours, whose masked keys are multiplied with 0."""

    def tear(a):
        a[...] = np.nan

    with np.errstate(all="ignore"):
        trace = trace_case(case(), precision=precision, patches=[changed("fwd/L1/mla.kv_b", tear)])
    judgement = judge(case(), trace)
    assert [f.tap for f in judgement.culprits] == ["fwd/L1/mla.kv_b"], render(judgement)


@pytest.mark.slow
def test_an_expert_of_nan_spoils_its_own_tokens_only():
    """Catches a token of other experts that is not compared because one expert's weights are NaN."""
    ids = np.asarray(clean("float32").taps["fwd/L1/router.ids"])
    expert = int(ids[0, 3, 0])
    routed = (ids == expert).any(axis=-1)
    rows = np.sort(ids, axis=None) == expert

    def fn(*args):
        y = np.array(STAGES["moe.down"].fn(*args))
        if tap_name(STAGES["moe.down"]) == "fwd/L1/moe.down":
            y[rows] = np.nan
        return y

    with np.errstate(all="ignore"):
        trace = trace_case(case(), patches=[Patch("moe.down", fn)])
    a = np.array(trace.taps["fwd/L1/moe.routed"])
    b, s = np.argwhere(~routed)[0]
    assert np.isnan(a[routed]).all() and np.isfinite(a[~routed]).all()
    assert [f.tap for f in judge(case(), trace).culprits] == ["fwd/L1/moe.down"]
    a[b, s] *= np.float32(1.1)
    wrong = judge(case(), Trace(trace.header, dict(trace.taps) | {"fwd/L1/moe.routed": a}))
    assert {"fwd/L1/moe.down", "fwd/L1/moe.routed"} <= {f.tap for f in wrong.culprits}


def test_a_tap_of_which_nothing_is_known_is_open():
    """Catches `conforms` said of a tap that nothing could be held against."""
    trace = clean("float32")
    taps = dict(trace.taps) | {"fwd/final_norm": np.full_like(trace.taps["fwd/final_norm"], np.nan)}
    judgement = judge(case(), Trace(trace.header, taps))
    found = {f.tap: f for f in judgement.findings}
    assert found["fwd/logits"].open and not found["fwd/final_norm"].ok
    assert {g.state for g in judgement.gates if g.name == "coverage"} == {"?"}
