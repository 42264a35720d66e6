"""What people record instead of what a tap is: recognised, said in a line, not called a bug; bugs that look like it are found."""

import dataclasses
import functools
import json

import ml_dtypes
import numpy as np
import pytest

from refimpl.diff import Trace, render, to_json
from refimpl.diff.corpus import MUTANTS
from refimpl.diff.judge import judge
from refimpl.diff.report import next_tap
from refimpl.layers.stage import STAGES, Patch
from refimpl.record import trace_case

from .test_diff_fits import ENGINE
from .test_diff_partial import case


@functools.cache
def clean():
    return trace_case(case())


def judged(change, trace=None, **header):
    """Every tap changed by change(tap, array); None leaves a tap out."""
    trace = trace or clean()
    made = {t: change(t, np.asarray(a)) for t, a in trace.taps.items()}
    found = dataclasses.replace(trace.header, **{"expected": []} | header)
    return judge(case(), Trace(found, {t: a for t, a in made.items() if a is not None}))


def narrowed(dtype):
    return lambda t, a: a.astype(dtype) if a.dtype.kind == "f" else a


@pytest.mark.parametrize(
    ("dtype", "told"),
    [(np.float16, "float32"), (np.float16, None), (ml_dtypes.bfloat16, "float16"), (np.float16, "bfloat16")],
)
def test_arrays_of_another_dtype_than_declared_are_judged_as_what_they_are(dtype, told):
    """Catches a roundoff by the header's word where the arrays themselves are of a narrower dtype: 85 taps blamed."""
    judgement = judged(narrowed(dtype), precision={"storage": told} if told else {})
    assert judgement.verdict == "CONFORMS", render(judgement)
    assert any(f"are {np.dtype(dtype).name} arrays: declare" in note for note in judgement.notes)


def test_a_few_narrow_arrays_change_nothing():
    """Catches a run called float16 for one tap of that dtype, whose values then go too far unseen."""
    judgement = judged(lambda t, a: a.astype(np.float16) if t == "fwd/logits" else a)
    assert [f.tap for f in judgement.culprits] == ["fwd/logits"]


def test_scores_before_the_mask_are_a_gauge():
    """Catches q k scaled, recorded where most code has it, called a missing mask; probabilities say that there is one."""
    rng = np.random.default_rng(0)
    shown = lambda t, a: np.where(np.isneginf(a), rng.standard_normal(a.shape), a) if t.endswith("mla.scores") else a  # noqa: E731
    judgement = judged(shown)
    assert judgement.verdict == "CONFORMS_IN_GAUGE" and "scores are those before the mask" in render(judgement)
    assert len(judgement.gauges["scores are those before the mask"]) == 3


def test_a_mask_that_is_missing_is_no_gauge():
    """Catches a candidate that attends to what comes later, taken for one whose scores were recorded early."""
    m = MUTANTS["A17"]
    judgement = judge(case(), trace_case(case(), patches=[Patch(m.stage, m.fn)]))
    assert {f.stage for f in judgement.culprits} == {"mla.scores"} and [d.id for d in judgement.causes] == ["A17"]


def with_shared(extra_id, first=False):
    """Ids and weights with one more slot, as kernels have them that run shared experts among the routed ones."""

    def change(t, a):
        if not t.endswith(("router.ids", "router.weights")):
            return a
        new = np.full((*a.shape[:-1], 1), extra_id if t.endswith("ids") else 0.4, a.dtype)
        return np.concatenate([new, a] if first else [a, new], -1).reshape(48, -1)

    return change


@pytest.mark.parametrize("first", [False, True])
def test_shared_experts_among_the_routed_ones_are_taken_out(first):
    """Catches SGLang's fused shared expert, numbered behind the routed ones, called an id out of range."""
    judgement = judged(with_shared(case().config.n_routed_experts, first))
    assert judgement.verdict == "CONFORMS" and "shared experts are among the routed ones" in render(judgement)


def test_a_routed_expert_too_many_is_no_shared_one():
    """Catches R16 taken for a fused shared expert: the slot too many holds a routed expert's number."""
    judgement = judged(with_shared(3))
    assert {f.stage for f in judgement.culprits} == {"router.ids"}


def test_a_padded_vocabulary_is_cut():
    """Catches logits over 136 entries, 8 of them nothing, called another shape; and a wrong one of the rest that goes with them."""
    pad = lambda t, a: np.concatenate([a, np.full((*a.shape[:-1], 8), np.nan, a.dtype)], -1) if t == "fwd/logits" else a  # noqa: E731
    judgement = judged(pad)
    assert judgement.verdict == "CONFORMS" and "padded along V" in render(judgement)

    def wrong(t, a):
        a = pad(t, a)
        if t == "fwd/logits":
            a[1, 3, 5] += 1
        return a

    assert [f.tap for f in judged(wrong).culprits] == ["fwd/logits"]


def some(rows, tokens, then=lambda t, a: a):
    """Every tap of the tokens cut to some of them."""
    return lambda t, a: then(t, a[rows][:, tokens]) if a.shape[:2] == (2, 24) else None


def test_the_first_tokens_are_compared_as_such():
    """Catches one chunk of a prompt, or one of two sequences, called another shape at every tap."""
    judgement = judged(some(slice(None), slice(0, 10)))
    assert not judgement.culprits and "10 of 24 tokens, taken for the first: declare slices" in render(judgement)
    judgement = judged(some(slice(0, 1), slice(None)))
    assert not judgement.culprits and "1 of 2 sequences, taken for the first" in render(judgement)


def test_other_tokens_than_the_first_and_wrong_ones_are_seen():
    """Catches a subset that is compared with nothing: the last ten tokens are not the first, and one wrong number is wrong."""
    assert "fwd/embed" in {f.tap for f in judged(some(slice(None), slice(14, None))).culprits}

    def wrong(t, a):
        a = np.array(a)
        if t == "fwd/L1/ffn_norm":
            a[0, 4, 7] += 1
        return a

    assert "fwd/L1/ffn_norm" in {f.tap for f in judged(some(slice(None), slice(0, 10), wrong)).culprits}


def chosen(k, *patches):
    """A run in which every token has another number of experts."""
    ids = STAGES["router.ids"].fn
    return trace_case(case(), patches=[Patch("router.ids", lambda *a, **s: ids(*a, **s | {"k": k})), *patches])


SETS = {"all": None, "engine": ENGINE, "no weights": (*ENGINE, "moe.down")}


@pytest.mark.parametrize(("k", "names"), [(3, "all"), (5, "engine"), (3, "no weights"), (1, "engine"), (9, "engine")])
def test_another_number_of_experts_is_the_fault_of_the_ids_alone(k, names):
    """Catches weights, rows or their sum blamed, or not compared, for the size that the ids give them; a note that names another
    number; a tap told to be recorded that was; the number not named.
    """

    def some(t, a):
        left_out = names == "no weights" and t.endswith("router.weights")
        return a if not left_out and (SETS[names] is None or t.rpartition("/")[2] in SETS[names]) else None

    judgement = judged(some, chosen(k))
    assert {f.tap for f in judgement.culprits} == {"fwd/L1/router.ids", "fwd/L2/router.ids"}, render(judgement)
    assert not any("not compared" in n for n in judgement.notes) and next_tap(judgement) == ""
    told = [f["region"] for f in json.loads(to_json(judgement))["findings"] if not f["ok"]]
    assert told == [["fwd/L1/router.ids"], ["fwd/L2/router.ids"]]
    assert {f.tap for f in judgement.findings} == {t for t, a in clean().taps.items() if some(t, a) is not None}
    assert [d.title for d in judgement.causes] == [f"experts chosen by every token: {k} instead of 4"]
    if names != "no weights":
        taps = judgement.notes[f"sized by {k} experts a token instead of 4: judged on these ids"]
        assert "fwd/L2/router.weights" in taps and ("fwd/L1/moe.down" in taps) == (names == "all")


def test_a_mistake_beside_another_number_of_experts_is_blamed_too():
    """Catches all that the ids size excused with them: weights that are not normalised, rows of another expert."""
    weights, down = STAGES["router.weights"].fn, STAGES["moe.down"].fn
    patches = [
        Patch("router.weights", lambda *a, **s: weights(*a, **s | {"normalise": False})),
        Patch("moe.down", lambda rows, *a: np.roll(down(rows, *a), 1, axis=0)),
    ]
    judgement = judged(lambda t, a: a, chosen(3, *patches))
    assert {f.stage for f in judgement.culprits} == {"router.ids", "router.weights", "moe.down"}, render(judgement)


def test_sizes_that_contradict_each_other_are_not_compared():
    """Catches rows of four experts read by the ids of three; a recorded tap told to be recorded, or called not recorded."""
    trace = chosen(3)
    rows = tuple(t for t in trace.taps if t.endswith(("moe.rows", "moe.gate", "moe.up", "moe.act")))
    judgement = judged(lambda t, a: clean().taps[t] if t in rows else a, trace)
    assert "router.ids" in {f.stage for f in judgement.culprits}, render(judgement)
    assert any(n == "sized by 3 experts a token instead of 4: not compared" for n in judgement.notes)
    assert next_tap(judgement) not in trace.taps and "not recorded apart" not in render(judgement)
