"""Traces of some heads only, of which nobody said which: told by value, said with what to declare, and judged as if declared."""

import dataclasses

import numpy as np
import pytest

from refimpl.diff import Trace, render
from refimpl.diff.corpus import MUTANTS
from refimpl.diff.judge import judge
from refimpl.layers.stage import Patch
from refimpl.record import trace_case

from .test_diff_partial import CLEAN, case, recording

SECOND = ("mla.q", "mla.q_rope", "mla.kv_b", "mla.ctx", "mla.q_absorbed", "mla.ctx_latent")
FIRST = ("mla.scores", "mla.probs")


def part(trace, heads, change=lambda t, a: a, keep=lambda t: True):
    """The trace with these heads alone, wherever there are any."""
    taps = {}
    for tap, a in trace.taps.items():
        name = tap.rpartition("/")[2]
        a = a[:, :, heads] if name in SECOND else a[:, heads] if name in FIRST else a
        if keep(name):
            taps[tap] = np.ascontiguousarray(change(tap, np.array(a)))
    return Trace(dataclasses.replace(trace.header, expected=[], dims={}), taps)


def merged(tap, a):
    """Tokens flattened and heads side by side."""
    name = tap.rpartition("/")[2]
    return a.reshape(48, -1) if name in SECOND else a.reshape(48, *a.shape[2:]) if a.shape[:2] == (2, 24) else a


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("heads", [[0, 1], [2, 3], [3], [2, 0, 3]], ids=str)
def test_which_heads_were_recorded_is_told_by_value(heads, name):
    """Catches 18 of 93 taps blamed for their shape, the first heads taken for the last, and an order that is lost."""
    judgement = judge(case(), part(recording(name), heads))
    assert judgement.verdict == "CONFORMS" and len(judgement.findings) == 93, render(judgement)
    (said,) = [n for n in judgement.notes if "heads" in n]
    assert said == f'{len(heads)} of 4 heads, told by value: declare slices {{"heads": {heads}}}'
    assert len(judgement.notes[said]) == 18


@pytest.mark.parametrize("keep", [FIRST, ("mla.q_rope",), ("mla.q", "mla.ctx")], ids=str)
def test_a_few_taps_of_some_heads_are_enough(keep):
    """Catches heads that are looked for in one tap, or in one arrangement, alone: merged, beside flattened tokens."""
    beside = ("embed", "resid", "resid_mid", "attn_norm", "mla.c_kv", "attn_out", "logits")
    trace = part(recording("hf-bfloat16"), [1, 2], merged, lambda name: name in (*keep, *beside))
    judgement = judge(case(), trace)
    assert not judgement.culprits and len(judgement.findings) == len(trace.taps), render(judgement)
    assert 'declare slices {"heads": [1, 2]}' in render(judgement)


def test_absorbed_heads_are_told_too():
    """Catches stages of the expanded form alone."""
    judgement = judge(case(), part(trace_case(case(), attend="absorbed"), [1, 3]))
    assert judgement.verdict == "CONFORMS", render(judgement)
    assert [len(taps) for n, taps in judgement.notes.items() if "[1, 3]" in n] == [21]


@pytest.mark.parametrize("id", ["A04", *[pytest.param(i, marks=pytest.mark.slow) for i in ("A17b", "X21")]])
def test_a_bug_in_some_heads_is_named(id):
    """Catches heads that are not told because of the bug, blame behind the heads' own taps, and a mistake that is tried on
    whole taps only. What all heads give together is computed from heads that nobody saw, so it shows the bug again.
    """
    m = MUTANTS[id]
    judgement = judge(case(), part(trace_case(case(), patches=[Patch(m.stage, m.fn)]), [2, 3]))
    assert {f.stage for f in judgement.culprits} == {m.stage, "attn_out"}, render(judgement)
    assert [(d.id, set(d.taps)) for d in judgement.causes] == [(id, {f.tap for f in judgement.culprits})], render(
        judgement
    )


def test_a_wrong_number_in_a_told_head_is_seen():
    """Catches heads that are recognised and then not compared, or not read by what follows: as where all were recorded."""
    trace, taps = recording("hf-float32"), []
    for heads in ([0, 1, 2, 3], [0, 3]):
        few = part(trace, heads)
        few.taps["fwd/L1/mla.q"][1, 5, heads.index(3), 3] *= 1.01
        judgement = judge(case(), few)
        taps.append([f.tap for f in judgement.culprits])
    assert taps == [["fwd/L1/mla.q", "fwd/L1/mla.scores"]] * 2, render(judgement)


SPOILT = {
    "numbers of no head": lambda a, axis: np.random.default_rng(1).normal(size=a.shape).astype(a.dtype),
    "one head twice": lambda a, axis: np.repeat(np.take(a, [0], axis=axis), 2, axis=axis),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_no_heads_of_ours_stays_a_wrong_shape(how):
    """Catches any array with fewer heads taken for some of ours, and a head that is there twice for two."""

    def change(tap, a):
        name = tap.rpartition("/")[2]
        return SPOILT[how](a, 2 if name in SECOND else 1) if name in (*SECOND, *FIRST) else a

    judgement = judge(case(), part(recording("hf-float32"), [0, 1], change))
    assert len(judgement.culprits) >= 18 and not any("heads" in n for n in judgement.notes), render(judgement)
