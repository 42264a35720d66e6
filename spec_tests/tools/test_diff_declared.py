"""Declarations of a header that the trace denies are refused, saying what, where and what there is; useless ones are told."""

import dataclasses
import functools
import itertools
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refimpl
from refimpl.autograd import SpecError
from refimpl.diff import Case, Trace, render
from refimpl.diff.header import Header
from refimpl.diff.judge import explain, judge
from refimpl.record import trace_case

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
FEW = ("fwd/embed", "fwd/L0/mla.ctx", "fwd/L1/mla.ctx", "fwd/L0/resid", "fwd/L1/resid", "fwd/L2/resid", "fwd/logits")
MLA, MOE = ("fwd/L0/mla.kv_b", "fwd/L0/mla.ctx"), ("fwd/L1/moe.gate", "fwd/L1/moe.routed")
BITS = {"B": 2, "S": 24, "T": 24, "D": 48, "V": 128, "H": 4, "Dn": 12, "Dr": 8, "Dv": 10, "C": 20, "Q": 28, "N": 48}
"""What the letters stand for in tiny, whose tokens are two sequences of 24, by hand."""


@functools.cache
def case():
    return Case.read(TINY)


@functools.cache
def full(phases=("fwd",), attend="expanded"):
    return trace_case(case(), phases=phases, attend=attend)


def trace(taps=FEW, **header):
    """Some taps of our own clean run, under another header."""
    own = full()
    kept = {t: np.asarray(own.taps[t]) for t in taps}
    dims = {t: own.header.dims[t] for t in taps}
    return Trace(dataclasses.replace(own.header, **{"dims": dims, "expected": [], **header}), kept)


def verdict(some):
    return judge(case(), some)


def refusal(some):
    with pytest.raises(SpecError) as error:
        verdict(some)
    return str(error.value)


@pytest.mark.parametrize(
    ("tap", "dims", "says"),
    [
        ("fwd/embed", "Q W E", "'Q' is no axis of this tap; its axes are B S D"),
        ("fwd/embed", "B S W", "'W' is no axis of this tap"),
        ("fwd/embed", "B S Q", "'Q' is no axis of this tap"),
        ("fwd/embed", "b s d", "'b' is no axis of this tap"),
        ("fwd/embed", "B S D/0", "'D/0' is no axis of this tap"),
        ("fwd/embed", "B S 9999999D", "'9999999D' is no axis of this tap"),
        ("fwd/embed", "(B S D", "a bracket is open"),
        ("fwd/embed", "(B S) D", "are of 2 axes, and the array is 2x24x48"),
        ("fwd/embed", "", "name no axes; expected an order of B S D"),
        ("fwd/embed", "B S", "are 2x24 here, and the array is 2x24x48; that is B S D"),
        ("fwd/embed", "B S D E", "are 2x24x48x16 here"),
        ("fwd/embed", "B B D", "B is there twice; each axis has a letter of its own"),
        ("fwd/embed", "N S D", "N stands for B S flattened"),
        ("fwd/embed", "D N", "are 48x2x24 here, and the array is 2x24x48"),
        ("fwd/embed", "S B D", "are 24x2x48 here"),
        ("fwd/embed", "B S 2D", "are 2x24x96 here"),
        ("fwd/embed", "B@tp S D", "ranks hold parts; the folder of all ranks' files is wanted"),
        ("fwd/L1/mla.ctx", "B S Dv H", "are 2x24x10x4 here, and the array is 2x24x4x10; that is B S H Dv"),
        ("fwd/L1/mla.ctx", "B S H Dn", "'Dn' is no axis of this tap; its axes are B S H Dv"),
        ("fwd/L1/mla.ctxt", "B S H Dv", "dims of 'fwd/L1/mla.ctxt', which is no tap here; is it fwd/L1/mla.ctx?"),
        ("fwd/L9/resid", "B S D", "dims of 'fwd/L9/resid', which is no tap here"),
        ("resid", "B S D", "dims of 'resid', which is no tap here; is it fwd/L0/resid?"),
    ],
)
def test_axes_that_the_array_has_not(tap, dims, says):
    """Catches dims that are ignored in silence because the array can be read without them."""
    some = trace()
    told = refusal(Trace(dataclasses.replace(some.header, dims=some.header.dims | {tap: dims}), some.taps))
    assert says in told and "in the trace header" in told and tap in told, told


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((24, 2, 40), "S B (H Dv)"),
        ((2, 24, 40), "B S H Dv"),  # heads and channels are one axis
        ((2, 24, 40), "B S (H Dv)"),
        ((48, 40), "N (H Dv)"),
        ((48, 4, 10), "N H Dv"),
        ((2, 24, 4, 10), "N H Dv"),
        ((24, 2, 4, 10), "S B H Dv"),
        ((2, 32, 4, 10), "B S H Dv"),  # padded
        ((64, 40), "N H Dv"),
    ],
)
def test_axes_that_are_merged_or_padded_are_no_contradiction(shape, dims):
    """Catches a declaration refused because the array has the declared axes in another grain, as recorders write them."""
    some, tap = trace(), "fwd/L1/mla.ctx"
    a = some.taps[tap]
    x = np.zeros(shape, a.dtype)
    if shape[0] == 24:
        x[...] = a.swapaxes(0, 1).reshape(shape)
    elif shape[0] == 64:
        x[:48] = a.reshape(48, 40)
    elif shape[1] == 32:
        x[:, :24] = a
    else:
        x[...] = a.reshape(shape)
    some = Trace(dataclasses.replace(some.header, dims=some.header.dims | {tap: dims}), some.taps | {tap: x})
    judgement = verdict(some)
    assert not judgement.culprits and len(judgement.findings) == len(FEW), render(judgement)
    assert bool(judgement.notes) == (x.size != a.size)  # padding alone has to be told


def test_axes_of_less_than_a_tap():
    """Catches true dims refused where fewer numbers are there: last positions as Megatron has them, declared tokens, merged."""
    some, last, ctx = trace(), "fwd/logits", "fwd/L1/mla.ctx"
    taps = some.taps | {last: some.taps[last][:, -1:].swapaxes(0, 1)}
    judgement = verdict(Trace(dataclasses.replace(some.header, dims=some.header.dims | {last: "S B V"}), taps))
    assert not judgement.culprits and any("last position" in n for n in judgement.notes)
    part = some.taps[ctx][:, [0, 7, 23]].swapaxes(0, 1).reshape(3, 2, 40)
    header = dataclasses.replace(some.header, dims={ctx: "S B (H Dv)"}, slices={"tokens": [0, 7, 23]})
    assert not verdict(Trace(header, some.taps | {ctx: part})).culprits


def test_axes_in_our_order_of_an_array_in_another():
    """Catches dims that are believed because they are ours, while the array's axes are told by its shape."""
    some, tap = trace(), "fwd/L1/mla.ctx"
    told = refusal(Trace(some.header, some.taps | {tap: some.taps[tap].swapaxes(0, 1)}))
    assert 'are 2x24x4x10 here, and the array is 24x2x4x10; axes are S B H Dv: declare dims "S B H Dv"' in told


def test_an_array_that_nothing_can_be_made_of_is_the_candidates_fault():
    """Catches bad input said of a buggy port whose recorder writes the right dims beside a wrong array."""
    some = trace()
    judgement = verdict(Trace(some.header, some.taps | {"fwd/L1/mla.ctx": some.taps["fwd/L1/mla.ctx"][..., :7]}))
    assert {f.tap for f in judgement.culprits} == {"fwd/L1/mla.ctx"} and judgement.exit_code == 1


def test_dims_of_arrays_that_are_no_taps():
    """Catches letters of arrays that we do not know held to ours, and such arrays not looked at."""
    some, other = trace(), "layers.1.qkv"
    taps = some.taps | {other: np.zeros((48, 60), np.float32)}
    named = Trace(dataclasses.replace(some.header, dims=some.header.dims | {other: "N W"}), taps)
    assert verdict(named).exit_code == 2
    told = refusal(Trace(dataclasses.replace(some.header, dims=some.header.dims | {other: "N"}), taps))
    assert "are of 1 axes, and the array is 48x60" in told and other in told


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"precision": {"storage": "float32", "moo.*": "bfloat16"}}, "'moo.*' means no tap of this run; is it moe.*?"),
        ({"precision": {"fwd/L7/*": "float32"}}, "'fwd/L7/*' means no tap of this run"),
        (
            {"precision": {"mla.*": "bfloat16", "fwd/L1/*": "float32"}},
            "'mla.*' is bfloat16 and 'fwd/L1/*' is float32, and fwd/L1/mla.ctx is both; name each part once",
        ),
        ({"slices": {"layers": [1]}}, "slices are of layers [1], and yet there is fwd/L0/mla.ctx"),
        ({"slices": {"heads": [0]}}, "1 of 4 heads were recorded, and every tap that has heads holds all of them"),
        ({"slices": {"tokens": [0, 5]}}, "2 of 24 tokens were recorded, and every tap that has tokens holds all"),
        *[({"slices": {"layers": x}}, f"slices layers is {x}; expected") for x in ([3], [-1], [1, 1], [0.0], [True])],
        *[({"slices": {"heads": x}}, f"slices heads is {x}; expected") for x in ([4], [-1], [0, 0], [1.0])],
        ({"parallel": {"rank": 2, "axes": {"tp": [0, 2]}}}, "rank is 2, and there are 2, counted from 0"),
        ({"parallel": {"rank": 0, "axes": {"tp": [0, 0]}}}, "axis tp is [0, 0], expected [coordinate, size]"),
        ({"parallel": {"rank": 0, "axes": {"tp": [2, 2]}}}, "axis tp is [2, 2], expected [coordinate, size]"),
        ({"parallel": {"rank": 0, "world": 2}}, "unknown keys: world"),
        ({"phases": ["fwd", "prefill"]}, "'prefill' is none; known: fwd, decN behind N tokens, bwd, grad, upd"),
        ({"phases": ["fwd", "dec8"]}, "fwd has 8 of 24 tokens, and all its taps hold all of them"),
    ],
)
def test_declarations_that_the_taps_deny(header, says):
    """Catches patterns, slices, ranks and phases that are accepted and ignored, or believed against the arrays."""
    told = refusal(trace(**header))
    assert says in told and "in the trace header" in told, told


def test_a_form_of_attention_or_a_phase_that_the_taps_deny():
    """Catches the absorbed form declared beside taps that only the other has, the other way, and a phase that nobody declared."""
    assert "mla is absorbed, and yet there is fwd/L0/mla.kv_b" in refusal(trace(MLA, layouts={"mla": "absorbed"}))
    absorbed = full(attend="absorbed")
    absorbed = Trace(dataclasses.replace(absorbed.header, layouts={"mla": "expanded"}), absorbed.taps)
    assert "mla is expanded, and yet there is fwd/L0/mla.q_absorbed" in refusal(absorbed)
    chunks = full(phases=("fwd", "dec8", "dec16"))
    chunks = Trace(dataclasses.replace(chunks.header, phases=["fwd", "dec8"]), chunks.taps)
    assert "phases are fwd, dec8, and yet there is dec16/" in refusal(chunks)


def test_forms_and_phases_that_are_true_are_no_contradiction():
    """Catches a refusal where no form is declared, or each part has its own; where one part alone was recorded; or nothing."""
    for layouts in ({}, {"mla": "auto"}, {"mla": "expanded"}):
        assert verdict(trace(MLA, layouts=layouts)).exit_code == 2
    chunks = full(phases=("fwd", "dec8", "dec16"))
    for taps in ({t: a for t, a in chunks.taps.items() if t in FEW}, {"x": np.zeros(3, np.float32)}):
        one = Trace(dataclasses.replace(chunks.header, expected=[], dims={}), taps)
        assert not verdict(one).culprits and verdict(one).exit_code == 2


def test_one_tap_in_part_is_enough():
    """Catches a declared part refused because some other tap is whole; and a residual that goes into no declared layer."""
    some = trace(slices={"heads": [1, 3]}, dims={})
    judgement = verdict(Trace(some.header, some.taps | {"fwd/L0/mla.ctx": some.taps["fwd/L0/mla.ctx"][:, :, [1, 3]]}))
    assert not judgement.culprits and not judgement.notes, render(judgement)
    assert "yet there is fwd/L2/resid" in refusal(trace(("fwd/L1/resid", "fwd/L2/resid"), slices={"layers": [1]}))


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"precision": {"storage": "float32", "moe.*": "float32"}}, "precision 'moe.*' means no tap that was recorded"),
        ({"precision": {"storage": "float32", "mtp.*": "float32"}}, "precision 'mtp.*' means no tap that was recorded"),
        ({"dims": {"fwd/L1/mla.q": "B S H Dn+Dr"}}, "dims are declared of taps that were not recorded: fwd/L1/mla.q"),
        ({"parallel": {"rank": 1, "axes": {"tp": [1, 2]}}}, "the file is of rank 1 of 2 (tp 1 of 2) alone"),
        ({"parallel": {"rank": 0, "axes": {"tp": [0, 1]}}}, ""),
        ({"slices": {"layers": [0, 1, 2], "heads": [0, 1, 2, 3]}}, ""),
        ({"slices": {"layers": [1]}}, ""),
    ],
)
def test_useless_declarations_are_told_and_nothing_else_changes(header, says):
    """Catches a refusal of what is merely useless, or true: a table of all dtypes or axes, a rank that holds everything, and the
    residual that goes into the one layer that was recorded.
    """
    taps = ("fwd/L0/resid", "fwd/L1/mla.ctx", "fwd/L1/resid") if header.get("slices") == {"layers": [1]} else FEW
    judgement = verdict(trace(taps, **header))
    assert not judgement.culprits and len(judgement.findings) == len(taps)
    assert (f"reading         {says}" in render(judgement)) if says else not judgement.notes, render(judgement)


def test_slices_of_heads_that_no_tap_has():
    """Catches a refusal, or silence, where heads are declared and nothing that was recorded has any."""
    judgement = verdict(trace(("fwd/embed", "fwd/L0/resid"), slices={"heads": [0]}))
    assert "1 of 4 heads were recorded, and no tap has heads" in render(judgement) and not judgement.culprits
    assert not verdict(trace(("fwd/embed", "fwd/L0/resid"), slices={"heads": [0, 1, 2, 3]})).notes


def test_a_point_of_the_dialect_that_nothing_reads():
    """Catches a dialect of MTP accepted without a word for a model that has none; one that is read is not told."""
    for point, told in (({"mtp_concat": "hidden_first"}, True), ({"masked_group_fill": "zero"}, False)):
        judgement = verdict(trace(config=case().raw_config | {"dialect": point}))
        said = f"dialect {next(iter(point))}={next(iter(point.values()))} changes no stage of this run"
        assert (said in judgement.notes) == told


@pytest.mark.parametrize(
    ("tap", "part"),
    [("fwd/L1/mla.ctx", np.s_[:, :, :2]), ("fwd/L1/mla.ctx", np.s_[:, 12:]), ("fwd/logits", np.s_[..., :64])],
)
def test_a_share_in_a_lone_file_is_not_blamed(tap, part):
    """Catches one rank's heads, tokens or vocabulary blamed as a wrong array, or taken for the first ones, where the others' files
    are wanted; declared as slices, heads are judged.
    """
    some = trace(parallel={"rank": 1, "axes": {"tp": [1, 2]}}, dims={})
    told = refusal(Trace(some.header, some.taps | {tap: some.taps[tap][part]}))
    assert "the file is of rank 1 of 2 (tp 1 of 2) alone: give the folder of all ranks' files" in told and tap in told


def test_declared_heads_of_a_lone_file_are_judged():
    """Catches a refusal of one rank's heads that say which they are."""
    some = trace(parallel={"rank": 1, "axes": {"tp": [1, 2]}}, slices={"heads": [2, 3]}, dims={})
    few = {t: a[:, :, 2:] if t.endswith("mla.ctx") else a for t, a in some.taps.items()}
    judgement = verdict(Trace(some.header, few))
    assert not judgement.culprits and len(judgement.findings) == len(FEW), render(judgement)


def test_a_key_that_is_there_twice():
    """Catches the last of two layouts, or axes of one tap, taken for the only one."""
    whole = json.dumps(dataclasses.asdict(trace().header))
    assert Header.from_json(whole) == trace().header
    for key, twice in (
        ("rope", '"layouts": {"rope": "half", "rope": "interleaved"'),
        ("layouts", '"layouts": {}, "layouts": {'),
    ):
        start = whole.index('"layouts": {')
        text = whole[:start] + twice + whole[whole.index("}", start) :]
        with pytest.raises(SpecError, match=f"^the trace header has the key '{key}' twice in one object"):
            Header.from_json(text)


def test_explain_refuses_what_diff_does():
    """Catches a number explained under a declaration that the diff refuses."""
    with pytest.raises(SpecError, match="'moo' means no tap"):
        explain(case(), trace(precision={"moo": "float32"}), "fwd/L1/resid")


# ---- At random


AXES = {"fwd/embed": "B S D", "fwd/L1/mla.ctx": "B S H Dv", "fwd/L0/resid": "B S D", "fwd/logits": "B S V"}


@st.composite
def axes_declared(draw):
    """(tap, the order its array has, a dims string): an order of its axes, the right one or not, and sometimes a slip in it."""
    tap = draw(st.sampled_from(sorted(AXES)))
    axes = AXES[tap].split()
    order = draw(st.permutations(axes))
    told = list(draw(st.one_of(st.just(order), st.permutations(axes))))
    slip = draw(st.sampled_from(["", "", "lost", "twice", "foreign", "bracket", "flat"]))
    at = draw(st.integers(0, len(told) - 1))
    if slip == "lost":
        del told[at]
    elif slip == "twice":
        told[at - 1] = told[at]
    elif slip == "foreign":
        told[at] = draw(st.sampled_from(sorted(set("QCVDW") - set(axes))))
    elif slip == "bracket":
        told[at] = f"({told[at]}"
    elif slip == "flat" and "B S" in " ".join(told):
        told = " ".join(told).replace("B S", "N").split()
    return tap, order, " ".join(told)


def true_of(shape, axes, dims):
    """Whether a dims string is one of a tap's axes, each once, N for B S, and of an array's shape: all by enumeration. None where
    a letter lacks, but all numbers are there.
    """
    words = dims.split()
    if any(w.strip("()") != w or w not in BITS for w in words):
        return False
    opened = " ".join(words).replace("N", "B S").split()
    if len(set(opened)) < len(opened) or set(opened) - set(axes):
        return False
    sizes, rest = [BITS[w] for w in opened], list(shape)
    if len(opened) < len(axes):
        return None if int(np.prod(sizes)) == int(np.prod(rest)) else False
    return sizes == rest


@pytest.mark.slow
@settings(max_examples=250)
@given(axes_declared())
def test_axes_at_random(drawn):
    """Catches a false declaration that is accepted, a true one that is refused or read another way, and a traceback."""
    tap, order, dims = drawn
    some, axes = trace(), AXES[tap].split()
    a = some.taps[tap].transpose([axes.index(x) for x in order])
    told = Trace(dataclasses.replace(some.header, dims=some.header.dims | {tap: dims}), some.taps | {tap: a})
    true = true_of(a.shape, axes, dims)
    if true:
        judgement = verdict(told)
        assert not judgement.culprits and len(judgement.findings) == len(FEW), (drawn, render(judgement))
    elif true is not None:
        message = refusal(told)
        assert tap in message and repr(dims) in message, (drawn, message)


LAYERS = {0: ("fwd/L0/mla.ctx", "fwd/L0/resid"), 1: ("fwd/L1/mla.ctx", "fwd/L1/resid"), 2: ("fwd/L2/resid",)}


@pytest.mark.slow
@settings(max_examples=250)
@given(st.data())
def test_slices_at_random(data):
    """Catches a part that was declared and not recorded, or the other way, wherever it is; one that is told as it is must be judged
    to the same.
    """
    some, numbers = st.integers(-1, 4), {"layers": 3, "heads": 4}
    told = {
        k: data.draw(st.lists(some, min_size=1, max_size=4), label=k)
        for k in data.draw(st.sets(st.sampled_from(["layers", "heads"])))
    }
    kept = data.draw(st.sets(st.sampled_from([0, 1, 2]), min_size=1), label="kept")
    few = data.draw(st.one_of(st.none(), st.just(told.get("heads"))), label="few")
    valid = all(0 <= n < numbers[k] for k, ns in told.items() for n in ns) and all(
        len(set(n)) == len(n) for n in told.values()
    )
    taps = dict(itertools.chain.from_iterable([(t, trace().taps[t]) for t in LAYERS[i]] for i in sorted(kept)))
    if valid and few:
        taps = {t: a[:, :, few] if "ctx" in t else a for t, a in taps.items()}
    if "heads" in told and len(told["heads"]) == 4 and few is None:
        told["heads"].sort()  # else their order would be another than the array's
    given_layers = told.get("layers", [0, 1, 2])
    before = {f"fwd/L{i - 1}/resid" for i in given_layers}
    stray = [t for t in taps if int(t[5]) not in given_layers and t not in before]
    heads = told.get("heads", [0, 1, 2, 3])
    denied = len(heads) < 4 and few is None and any("ctx" in t for t in taps)
    one = Trace(dataclasses.replace(trace().header, slices=told, dims={}), taps)
    if not valid or stray or denied:
        assert "slices" in refusal(one), (told, kept, few)
    else:
        judgement = verdict(one)
        assert not judgement.culprits and len(judgement.findings) == len(taps), render(judgement)


@pytest.mark.slow
@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(["mla.*", "*.ctx", "resid", "fwd/L1/*", "moo", "moe.*", "L9/*"]),
        st.sampled_from(["float32", "bfloat16"]),
        max_size=3,
    )
)
def test_precision_at_random(parts):
    """Catches two patterns of which one is silently used, and a pattern of nothing."""
    means = {
        "mla.*": {"fwd/L0/mla.ctx", "fwd/L1/mla.ctx"},
        "*.ctx": {"fwd/L0/mla.ctx", "fwd/L1/mla.ctx"},
        "resid": {"fwd/L0/resid", "fwd/L1/resid", "fwd/L2/resid"},
        "fwd/L1/*": {"fwd/L1/mla.ctx", "fwd/L1/resid", "fwd/L1/moe.down"},
        "moe.*": {"fwd/L1/moe.down"},
        "moo": set(),
        "L9/*": set(),
    }
    clash = any(means[p] & means[q] and parts[p] != parts[q] for p in parts for q in parts)
    one = trace(precision={"storage": "float32", **parts})
    if clash or any(not means[p] for p in parts):
        assert "precision" in refusal(one), parts
    else:
        assert not verdict(one).culprits
