"""Gauges beside a mistake elsewhere: they are known as they are without it, and no gauge takes the blame off a mistake."""

import dataclasses

import numpy as np
import pytest

from refimpl.diff import Trace, render
from refimpl.diff.compare import Finding
from refimpl.diff.corpus import MUTANTS
from refimpl.diff.judge import judge
from refimpl.diff.judgement import Judgement
from refimpl.diff.weighing import explains, far_less_off
from refimpl.layers.stage import Patch
from refimpl.record import trace_case

from .test_diff_combined import HALF, SCALE, each, stage
from .test_diff_counting import later
from .test_diff_partial import case, drawn, only, recording

TURNED, BASE_2 = "rotated channels in the other order", "log-sum-exp to base 2"


def blamed(judgement):
    return sorted(f.tap for f in judgement.culprits)


def run(*patches):
    """Our own run with patches, of which nothing is declared."""
    trace = trace_case(case(), patches=[Patch(*p) for p in patches])
    return Trace(
        dataclasses.replace(trace.header, dims={}, expected=[]), {t: np.array(a) for t, a in trace.taps.items()}
    )


def with_layout(trace, **layouts):
    return Trace(dataclasses.replace(trace.header, layouts=layouts, dims={}, expected=[]), trace.taps)


def these(*names):
    return lambda trace: only(trace, lambda t: t.removeprefix("fwd/") in names)


PARTS = {
    "queries": these("L0/mla.q_rope", "L2/router.weights", "logits"),
    "both": these("L0/mla.q_rope", "L0/mla.k_rope", "L2/router.weights", "logits"),
    "with ids of L1": these(
        "L0/mla.q_rope", "L1/router.weights", "L1/router.ids", "L1/moe.routed", "L2/router.weights", "logits"
    ),
    "half of it": lambda trace: drawn(trace, 1, 0.5),
    "most of it": lambda trace: drawn(trace, 8, 0.7),
}


@pytest.mark.parametrize("part", PARTS)
def test_an_order_of_channels_is_known_beside_a_mistake_elsewhere(part):
    """Catches q and k, and what reads them, blamed as well since weights without ids are wrong, on which nothing is replayed."""
    trace = PARTS[part](recording("hf-bug"))
    silent, told = (judge(case(), with_layout(trace, **layout)) for layout in ({}, {"rope": "half"}))
    assert blamed(silent) == blamed(told) and TURNED in silent.gauges, render(silent)
    assert any("router.weights" in tap for tap in blamed(silent))


def test_other_units_of_a_log_sum_exp_are_known_beside_a_mistake_elsewhere():
    """Catches the log-sum-exps of all layers blamed for their base since weights without ids are wrong."""
    trace = with_layout(only(recording("hf-bug"), lambda t: t != "fwd/L2/router.ids"))
    scores = {t: np.float64(a) for t, a in trace.taps.items() if t.endswith("mla.scores")}
    lse = {
        t.replace("scores", "lse"): np.log2(np.exp(s).sum(-1)).swapaxes(1, 2).astype(np.float32)
        for t, s in scores.items()
    }
    judgement = judge(case(), Trace(trace.header, trace.taps | lse))
    assert {TURNED, BASE_2} <= judgement.gauges.keys(), render(judgement)
    assert blamed(judgement) == blamed(judge(case(), with_layout(trace, rope="half")))


def judged(*findings, gauges=None, withdrawn=()):
    """A judgement of (tap, right, error), whose regions hold what is withdrawn, but for those of themselves."""
    made = [Finding(t, "", ok, error, region=(*[w for w in withdrawn if w != t], t)) for t, ok, error in findings]
    return Judgement(findings=made, gauges=gauges or {}, withdrawn=frozenset(withdrawn))


def test_what_speaks_for_a_gauge_and_against_it():
    """Catches a gauge kept that explains nothing or puts a right tap in blame, and one dropped for a mistake elsewhere, or for a
    tap that passes though it is as far off.
    """
    gauge = {"g": ["q"]}
    under = judged(("q", True, 0.0), ("w", False, 0.3), gauges=gauge)
    assert explains("g", under, judged(("q", False, 1.0), ("w", False, 0.3)))
    assert explains("g", under, judged(("q", False, 1.0), ("w", True, 0.3)))
    assert not explains("g", under, judged(("q", False, 1.0), ("w", True, 0.01)))
    assert not explains("g", under, judged(("q", True, 1.0), ("w", False, 0.3)))
    assert not explains("g", under, judged(("q", False, 1.0), ("w", False, 0.3), withdrawn=("q",)))


def test_what_is_as_far_off_under_both_readings_speaks_for_neither():
    """Catches another count of layers refused for a mistake elsewhere, and one taken that leaves all as it is."""
    bugs = [(f"L{i}/ctx", False, 1.5) for i in range(6)]
    result = judged(*bugs, ("L1/resid", False, 1.0), ("L2/resid", False, 0.8))
    assert far_less_off(judged(*bugs), result)
    assert far_less_off(judged(*bugs, ("L2/resid", False, 0.5)), result)
    assert not far_less_off(judged(*bugs, ("L1/resid", False, 1.1)), result)
    assert not far_less_off(judged(*bugs), judged(*bugs))


def test_residuals_counted_from_1_are_known_beside_a_mistake_in_every_layer():
    """Catches five right taps blamed because six wrong ones are so under either count."""
    patches = (("mla.kv_b", lambda x, w, **k: np.roll(stage("mla.kv_b")(x, w, **k), 3, axis=-1)), ("attn_out", twice))
    judgement = judge(case(), later(run(*patches), "/resid"))
    assert {f.stage for f in judgement.culprits} == {"mla.kv_b", "attn_out"}, render(judgement)
    assert any("residuals are counted from 1" in note for note in judgement.notes)


def twice(*args, **static):
    return 2 * stage("attn_out")(*args, **static)


def backwards(q, table, **static):
    """Queries, rotated the other way."""
    return stage("mla.q_rope")(q, table * np.float32([1, -1]).reshape(2, 1, 1, 1), **static)


@pytest.mark.parametrize("alone", ["L0", "L2"])
def test_a_wrong_rotation_is_read_in_the_order_of_other_layers(alone):
    """Catches scores blamed that read wrong queries in the order that only keys of other layers, earlier or later ones, tell."""
    trace = run(("mla.q_rope", backwards))
    taps = {t: a for t, a in HALF(trace.taps).items() if t != f"fwd/{alone}/mla.k_rope"}
    judgement = judge(case(), Trace(trace.header, taps))
    assert {f.stage for f in judgement.culprits} == {"mla.q_rope"} and TURNED in judgement.gauges, render(judgement)


UNSCALED = each(lambda t, a, taps: a / np.float32(SCALE), "mla.scores")


@pytest.mark.parametrize("turn", [dict, HALF], ids=["interleaved", "half"])
def test_scores_before_the_scale_conform(turn):
    """Catches right scores blamed, and called unscaled, of a kernel whose softmax multiplies them by the scale."""
    trace = run()
    judgement = judge(case(), Trace(trace.header, UNSCALED(turn(trace.taps))))
    assert judgement.verdict == "CONFORMS_IN_GAUGE", render(judgement)
    assert any("before the softmax scale" in what for what in judgement.gauges)


GONE = [("L0/mla.k_rope", "L0/mla.q_rope", "L2/mla.q_rope"), ("L2/mla.q_rope",)]


@pytest.mark.parametrize(("turn", "gone"), [(dict, GONE[1]), (HALF, GONE[0]), (HALF, GONE[1])])
def test_scores_that_are_never_scaled_are_a_mistake(turn, gone):
    """Catches it excused, moved to the softmax behind, or to q and k, since they are read as turned only if the scale is wrong."""
    trace = run(("mla.scores", MUTANTS["X19"].under(case().config).fn))
    taps = {t: a for t, a in turn(trace.taps).items() if not t.endswith(gone)}
    judgement = judge(case(), Trace(trace.header, taps))
    assert {f.stage for f in judgement.culprits} == {"mla.scores"}, render(judgement)
    assert [d.id for d in judgement.causes] == ["X19"]


def masked(taps, hole, more=0):
    """What experts are chosen by, as it is once the groups that were not kept, and some `more`, are masked."""
    c, found = case().config, {}
    for tap in [t for t in taps if t.endswith("router.choice")]:
        groups = np.array(taps[tap]).reshape(*taps[tap].shape[:-1], c.n_group, -1)
        kept = taps[tap.replace("choice", "groups")][..., : c.topk_group - more]
        groups[~(np.arange(c.n_group) == kept[..., None]).any(-2)] = hole
        found[tap] = groups.reshape(taps[tap].shape)
    return taps | found


@pytest.mark.parametrize("hole", [-np.inf, 0.0])
def test_a_choice_that_is_recorded_masked_conforms(hole):
    """Catches a mask within the groups' choice blamed, and with it the scores of groups, which were made before it."""
    trace = run()
    judgement = judge(case(), Trace(trace.header, masked(trace.taps, hole)))
    assert judgement.verdict == "CONFORMS_IN_GAUGE" and any("hold" in what for what in judgement.gauges), render(
        judgement
    )


def test_a_mask_over_a_group_too_many_is_a_mistake_and_one_beside_wrong_scores_of_groups_is_none():
    """Catches any hole filled with ours, and the scores of groups judged on the holes."""
    trace = run()
    assert judge(case(), Trace(trace.header, masked(trace.taps, -np.inf, more=1))).exit_code == 1
    wrong = run(("router.group_scores", lambda a, **k: 0.7 * stage("router.group_scores")(a, **k)))
    judgement = judge(case(), Trace(wrong.header, masked(wrong.taps, -np.inf)))
    assert {f.stage for f in judgement.culprits} == {"router.group_scores"}, render(judgement)
