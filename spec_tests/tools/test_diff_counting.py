"""Layers that a candidate counts from 1: recognised by value, not blamed; a bug stays where it is, and a layer too few is one."""

import dataclasses
import functools
import re
import tempfile

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.diff import Case, Trace, render
from refimpl.diff.judge import judge
from refimpl.diff.local_counts import local_counts
from refimpl.diff.precision import precision_of
from refimpl.diff.run import Run
from refimpl.layers import PRESETS
from refimpl.record import new_case, trace_case

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


# ---- Counted from anywhere

KINDS = {
    "all": lambda t: True,
    "norms and the stream": lambda t: t.endswith(("attn_norm", "ffn_norm", "/resid", "resid_mid")),
    "the stream alone": lambda t: t.endswith("/resid"),
}


def local(name, kind):
    """The two layers with experts of a recording, as the second rank of a pipeline counts them: from 0."""
    plain = only(recording(name), lambda t: t.startswith(("fwd/L1/", "fwd/L2/")) and KINDS[kind](t))
    names = {t: re.sub(r"/L(\d)/", lambda m: f"/L{int(m[1]) - 1}/", t) for t in plain.taps}
    dims = {names[t]: d for t, d in plain.header.dims.items() if t in names}
    header = dataclasses.replace(plain.header, dims=dims, expected=sorted(names.values()))
    return plain, Trace(header, {names[t]: a for t, a in plain.taps.items()})


SAID = 'declare layouts {"layers": "L0 is L1"}'


AT_ONCE = [("all", "hf-float32")]
LATER = [pytest.param(k, n, marks=pytest.mark.slow) for k in KINDS for n in CLEAN if (k, n) not in AT_ONCE]


@pytest.mark.parametrize(("kind", "name"), [*AT_ONCE, *LATER])
def test_layers_that_a_rank_counts_from_0(kind, name):
    """Catches a pipeline rank's taps blamed, or unknown, because its first layer is called 0; and another layer's name for it."""
    plain, trace = local(name, kind)
    judgement = judge(case(), trace)
    assert judgement.verdict == judge(case(), plain).verdict and not judgement.culprits, render(judgement)
    assert {f.tap for f in judgement.findings} == set(plain.taps) and SAID in render(judgement)
    silent = judge(case(), declared(trace, "L0 is L1"))
    assert silent.verdict == judgement.verdict and not any("counted" in n for n in silent.notes)


@pytest.mark.slow
def test_a_bug_stays_in_its_layer_when_layers_are_counted_from_0():
    """Catches a bug that hides the count, or is told of the layer's other number."""
    found = []
    for which, some in zip((2, 1), local("hf-float32", "all"), strict=True):
        taps = dict(some.taps)
        taps[f"fwd/L{which}/ffn_norm"] = np.asarray(taps[f"fwd/L{which}/ffn_norm"]) * np.float32(1.01)
        found.append(judge(case(), Trace(some.header, taps)))
    plain, judgement = ({f.tap for f in j.culprits} for j in found)
    assert "fwd/L2/ffn_norm" in plain and judgement == plain and SAID in render(found[1]), render(found[1])


def test_what_is_declared_of_such_layers():
    """Catches slices counted otherwise than the taps they are of, a count of layers that are not there, and one misspelt."""
    plain, trace = local("hf-float32", "all")
    judgement = judge(case(), declared(trace, "L0 is L1", slices={"layers": [0, 1]}))
    assert judgement.verdict == "CONFORMS" and {f.tap for f in judgement.findings} == set(plain.taps), render(judgement)
    for beyond, odd in ((trace, "L0 is L7"), (recording("hf-float32"), "L0 is L1")):
        with pytest.raises(SpecError, match="the last one is L2"):
            judge(case(), declared(beyond, odd))
    with pytest.raises(SpecError, match="fwd/L0/"):
        judge(case(), declared(trace, "L3 is L2"))
    for odd in ("L0 is 1", "L0 is L", "from 0 is L1"):
        with pytest.raises(SpecError, match="residuals from 1, `L0 is L3`"):
            judge(case(), declared(trace, odd))


@pytest.mark.slow
def test_wrong_numbers_in_the_first_layers_are_no_other_count():
    """Catches a bug in the first two layers excused as later ones."""
    trace = only(
        recording("hf-float32"), lambda t: t.startswith(("fwd/L0/", "fwd/L1/")) and KINDS["norms and the stream"](t)
    )
    for tap in ("fwd/L0/ffn_norm", "fwd/L1/attn_norm"):
        taps = {t: np.asarray(a) * np.float32(1.5) if t == tap else a for t, a in trace.taps.items()}
        judgement = judge(case(), Trace(trace.header, taps))
        assert tap in {f.tap for f in judgement.culprits} and "counted" not in render(judgement), render(judgement)


def test_ranks_of_a_pipeline_each_with_its_own_count(tmp_path):
    """Catches two ranks' first layers taken for one layer that differs between them."""
    whole = recording("hf-float32")
    for rank, layers in enumerate((("L0",), ("L1", "L2"))):
        mine = {
            t: np.asarray(a)
            for t, a in whole.taps.items()
            if (t.split("/")[1] in layers) or (not rank and t.count("/") == 1)
        }
        names = {t: re.sub(r"/L(\d)/", lambda m: f"/L{int(m[1]) - 1}/", t) if rank else t for t in mine}
        layouts = whole.header.layouts | ({"layers": "L0 is L1"} if rank else {})
        header = dataclasses.replace(
            whole.header,
            layouts=layouts,
            parallel={"rank": rank, "axes": {"pp": [rank, 2]}},
            expected=sorted(names.values()),
            dims={},
        )
        Trace(header, {names[t]: a for t, a in mine.items()}).write(tmp_path / f"{rank}.safetensors")
    judgement = judge(case(), Trace.read(tmp_path))
    assert judgement.verdict == "CONFORMS" and len(judgement.findings) == len(whole.taps), render(judgement)


@functools.cache
def deep():
    """A model of eight layers, six of them with experts, and its clean run."""
    config = PRESETS["tiny"].replace(num_hidden_layers=8, first_k_dense_replace=2)
    folder = tempfile.TemporaryDirectory()
    found = Case.read(new_case(f"{folder.name}/case", config, seed=3, batch=1, length=5, margin=0.0))
    return folder, found, trace_case(found)


def at_first(keep, layers=(5, 6), start=0):
    """Taps of these layers alone, named as if the first of them were layer `start`."""
    whole = deep()[2]
    names = {f"fwd/L{i}/{tap}": f"fwd/L{start + n}/{tap}" for n, i in enumerate(layers) for tap in keep.split()}
    taps = {new: np.asarray(whole.taps[old]) for old, new in names.items()}
    return Trace(dataclasses.replace(whole.header, dims={}, expected=[]), taps)


def read_so(trace):
    """The counts that are tried of a trace, in words, without what is done about them."""
    run = Run(deep()[1], trace, precision_of(trace.header, trace.taps), {})
    return [
        what.rpartition('"layers": "')[2].partition('"')[0]
        for _, whats in local_counts(run, deep()[1].config)
        for what in whats
    ]


NORMS = "resid resid_mid ffn_norm attn_norm"


@pytest.mark.parametrize(
    ("keep", "layers", "start", "tried"),
    [
        (NORMS, (5, 6), 0, ["L0 is L5"]),  # by their weights
        (NORMS, (4, 5, 7), 0, ["L0 is L4"]),  # even where one was left out, by the first two
        (NORMS, (1, 2), 5, ["L5 is L1"]),
        (NORMS, (5, 6), 5, []),
        ("resid", (5, 6), 0, []),  # seven counts are too many to try
        ("resid", (2, 3, 4, 5, 6), 0, ["L0 is L1", "L0 is L2", "L0 is L3"]),
        ("resid mlp.gate", (0, 1), 0, []),  # no later layers are dense
        ("resid router.logits", (5, 6), 0, []),
        ("router.logits router.scores mla.scores mla.probs", (5, 6), 0, []),  # no weight is read
        (NORMS, (5,), 0, []),  # one layer alone
    ],
)
def test_which_counts_are_tried(keep, layers, start, tried):
    """Catches a search through all layers of a large model, one that leaves out the right count, and one where names deny it."""
    assert read_so(at_first(keep, layers, start)) == tried


def test_counts_are_not_tried_of_more_layers_than_there_are():
    """Catches "bad input" because of layers that were declared, and not recorded, under a count that was only tried."""
    trace = at_first("resid", (2, 3, 4, 5))
    trace = Trace(dataclasses.replace(trace.header, slices={"layers": [0, 1, 2, 3, 4]}), trace.taps)
    assert read_so(trace) == ["L0 is L1", "L0 is L2", "L0 is L3"]


def test_a_deep_rank_is_told_by_its_weights_and_a_declared_count_is_believed():
    """Catches layers of a late rank that are blamed, and a declaration that is not believed."""
    trace = at_first(NORMS)
    judgement = judge(deep()[1], trace)
    assert not judgement.culprits and 'declare layouts {"layers": "L0 is L5"}' in render(judgement), render(judgement)
    assert {f.tap for f in judgement.findings} == set(at_first(NORMS, start=5).taps)
    assert judge(deep()[1], declared(trace, "from 0")).culprits


def test_slices_beside_residuals_that_are_counted_otherwise():
    """Catches layers of slices moved along with the residuals, where only those are counted from 1."""
    plain = only(recording("hf-float32"), lambda t: t.startswith(("fwd/L1/", "fwd/L2/")))
    judgement = judge(case(), declared(later(plain, "/resid"), "residuals from 1", slices={"layers": [1, 2]}))
    assert judgement.verdict == "CONFORMS", render(judgement)


@pytest.mark.parametrize("layouts", [{}, {"layers": "L0 is L1"}])
def test_a_name_without_a_phase_tells_of_no_layer(layouts):
    """Catches a traceback for an array that is named like no tap, where one layer alone may be counted otherwise."""
    trace = recording("hf-float32")
    taps = {"fwd/L1/resid": 1.5 * np.asarray(trace.taps["fwd/L1/resid"]), "foo": np.ones(3), "a/L1": np.ones(3)}
    header = dataclasses.replace(trace.header, expected=[], dims={}, layouts=trace.header.layouts | layouts)
    assert "foo" in judge(case(), Trace(header, taps)).unknown
