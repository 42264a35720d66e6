"""Layers that a candidate counts from 1: recognised by value, not blamed; a bug stays where it is, and a layer too few is one."""

import dataclasses
import re

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.diff import Trace, render
from refimpl.diff.judge import judge

from .test_diff_partial import CLEAN, case, mistaken, only, recording


def later(trace, which=""):
    """The trace with every layer, or of the taps that end so, named by one more."""
    names = {t: re.sub(r"/L(\d)/", lambda m: f"/L{int(m[1]) + 1}/", t) if t.endswith(which) else t for t in trace.taps}
    dims = {names.get(t, t): d for t, d in trace.header.dims.items()}
    header = dataclasses.replace(trace.header, dims=dims, expected=[names.get(t, t) for t in trace.header.expected])
    return Trace(header, {names[t]: a for t, a in trace.taps.items()})


def declared(trace, told, **more):
    layouts = trace.header.layouts | {"layers": told}
    return Trace(dataclasses.replace(trace.header, layouts=layouts, **more), trace.taps)


STREAM = ("/embed", "/resid", "fwd/logits")
PARTS = {
    "all": (lambda t: True, "", "from 1"),
    "the stream": (lambda t: t.endswith(STREAM), "", "from 1"),
    "residuals beside others": (lambda t: True, "/resid", "residuals from 1"),
    "no embedding": (lambda t: t.endswith(("resid_mid", "/resid", "fwd/logits")), "", "from 1"),
}


QUICK = [("all", "hf-bfloat16"), ("residuals beside others", "hf-float32"), ("no embedding", "hf-bfloat16")]
SLOW = [pytest.param(p, n, marks=pytest.mark.slow) for p in PARTS for n in CLEAN if (p, n) not in QUICK]


@pytest.mark.parametrize(("part", "name"), [*QUICK, *SLOW])
def test_layers_counted_from_1_are_recognised(part, name):
    """Catches 29 of 56 taps blamed, and the last layer unknown, because somebody calls the first layer 1."""
    keep, which, told = PARTS[part]
    plain = only(recording(name), keep)
    trace = later(plain, which)
    judgement = judge(case(), trace)
    assert judgement.verdict == judge(case(), plain).verdict and not judgement.culprits, render(judgement)
    assert not judgement.unknown and {f.tap for f in judgement.findings} == set(plain.taps)
    assert f'declare layouts {{"layers": "{told}"}}' in render(judgement)
    silent = judge(case(), declared(trace, told))
    assert silent.verdict == judgement.verdict and not any("counted" in n for n in silent.notes)


@pytest.mark.parametrize(
    "keep",
    [pytest.param(lambda t: True, marks=pytest.mark.slow), lambda t: t.endswith(STREAM)],
    ids=["all", "the stream"],
)
def test_a_bug_stays_where_it_is_under_another_count(keep):
    """Catches a bug that hides the count, or is hidden by it; and one that is told of the wrong layer."""
    plain = only(mistaken("A04 missing mscale squared", "float32"), keep)
    blamed = {f.tap for f in judge(case(), plain).culprits}
    judgement = judge(case(), later(plain))
    assert blamed and {f.tap for f in judgement.culprits} == blamed, render(judgement)


@pytest.mark.parametrize(
    "name",
    [
        "R09 scaling twice",
        *[pytest.param(n, marks=pytest.mark.slow) for n in ("A04 missing mscale squared", "R16 shared expert missing")],
    ],
)
def test_a_bug_in_later_layers_is_no_other_count(name):
    """Catches a bug excused by a count that leaves as much off: nothing of layer 0 was recorded, and that was meant."""
    trace = only(mistaken(name, "float32"), lambda t: t.startswith(("fwd/L1/", "fwd/L2/")))
    judgement = judge(case(), trace)
    assert judgement.culprits and not any("counted" in n for n in judgement.notes), render(judgement)


def test_a_layer_that_was_left_out_is_a_bug():
    """Catches a layer that does nothing taken for another count, if what it gives is all that was recorded."""
    trace = recording("hf-float32")
    taps = {"fwd/embed": trace.taps["fwd/embed"], "fwd/L2/resid": trace.taps["fwd/L1/resid"]}
    judgement = judge(case(), Trace(dataclasses.replace(trace.header, expected=[]), taps))
    assert [f.tap for f in judgement.culprits] == ["fwd/L2/resid"], render(judgement)


def test_a_declared_count_is_used_everywhere_and_checked():
    """Catches slices whose layers are counted otherwise than the taps, a layer 0 that cannot be, a count nobody knows."""
    trace = later(only(recording("hf-float32"), lambda t: t.startswith(("fwd/L1/", "fwd/L2/"))))
    judgement = judge(case(), declared(trace, "from 1", slices={"layers": [2, 3]}))
    assert judgement.verdict == "CONFORMS", render(judgement)
    with pytest.raises(SpecError, match="fwd/L0/"):
        judge(case(), declared(recording("hf-float32"), "from 1"))
    with pytest.raises(SpecError, match="known: from 0, from 1"):
        judge(case(), declared(trace, "from 2"))


def test_what_is_no_number_tells_of_no_count():
    """Catches NaN, which is infinitely far off under either count, taken for a reason to count otherwise."""
    trace = only(recording("hf-float32"), lambda t: t in ("fwd/L1/resid", "fwd/L2/attn_norm", "fwd/L2/resid"))
    taps = dict(trace.taps) | {"fwd/L2/attn_norm": np.full_like(trace.taps["fwd/L2/attn_norm"], np.nan)}
    judgement = judge(case(), Trace(trace.header, taps))
    assert [f.tap for f in judgement.culprits] == ["fwd/L2/attn_norm"], render(judgement)


def test_dtypes_go_with_their_taps():
    """Catches a float32 router held to bfloat16 only because its layer is counted from 1."""
    trace = recording("hf-bfloat16")
    weights = trace.taps["fwd/L1/router.weights"]
    plain = Trace(trace.header, dict(trace.taps) | {"fwd/L1/router.weights": weights * np.float32(1.0001)})
    for part in (plain, later(plain)):
        judgement = judge(case(), part)
        assert [f.tap for f in judgement.culprits] == ["fwd/L1/router.weights"], render(judgement)
