"""Several mistakes of a recorder at once: whatever it does to order, sequences, tokens, heads, vocabulary, numbers are found."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.diff import Case, Trace, render
from refimpl.diff.judge import judge
from refimpl.diff.ways import ways
from refimpl.layers import PRESETS
from refimpl.layers.stage import STAGES
from refimpl.record import new_case, trace_case

from .test_diff_combined import halves
from .test_diff_counting import later
from .test_diff_partial import case, mistaken, only, recording

# ---- By shape alone: one array

AXES = {
    "B S D": (2, 6, 31),
    "B H S T": (2, 3, 6, 6),
    "B S H Dv": (3, 4, 13, 37),
    "B S V": (2, 6, 43),
    "2 B S Dr/2": (2, 3, 4, 41),
    "B S": (2, 5),
}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(AXES)), st.data())
def test_whatever_was_done_to_an_array_is_one_of_its_ways(named, data):
    """Catches a combination of mistakes that is not thought of, or undone in the wrong order: the numbers are all different."""
    axes, shape = named.split(), AXES[named]
    ours = x = np.arange(np.prod(shape)).reshape(shape) + 1
    pick = dict[int, slice]()
    for i, a in enumerate(axes):
        kind = data.draw(st.sampled_from(["whole", "more", "fewer"]), label=a) if a in ["S", "V"] else "whole"
        if kind == "more":
            n = data.draw(st.integers(1, 5))
            x = np.pad(x, [(0, n if j == i else 0) for j in range(x.ndim)])
        elif kind == "fewer" and a == "S":
            n = data.draw(st.integers(2, shape[i] - 1))
            x, pick[i] = np.take(x, range(n), axis=i), slice(0, n)
    order = data.draw(st.permutations(range(x.ndim)))
    x = x.transpose(order)
    at = next((i for i in range(x.ndim - 1) if {axes[order[i]], axes[order[i + 1]]} == {"B", "S"}), None)
    if at is not None and data.draw(st.booleans(), label="flat"):
        x = x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])
    true = ours[tuple([pick.get(i, slice(None)) for i in range(ours.ndim)])]
    likely = [way for way in ways(x.shape, shape, axes) if _same(way.of(x), true)]
    assert likely and any(
        _same(ours[tuple([way.pick.get(i, slice(None)) for i in range(ours.ndim)])], true) for way in likely
    )


def _same(a, b):
    return a.shape == b.shape and np.array_equal(a, b)


# ---- A whole trace

TOKENS = {call for call in STAGES.values() if call.shape.split()[:2] == ["B", "S"]}
NAMES = {stage.tap for stage in TOKENS} - {"mla.rope_tables"}
HEADS = ("mla.q", "mla.q_rope", "mla.ctx")


def each(change, names=NAMES):
    """The same change of every tap with one of these names."""
    return lambda taps: {t: change(a) if t.rpartition("/")[2] in names else a for t, a in taps.items()}


def padded(n, axis):
    """More entries along an axis, which hold anything."""

    def longer(a):
        shape = [n if i == axis else s for i, s in enumerate(a.shape)]
        return np.concatenate([a, np.ones(shape).astype(a.dtype)], axis=axis)

    return longer


CUT = {
    "whole": lambda taps: taps,
    "padded": each(padded(8, 1)),
    "first tokens": each(lambda a: a[:, :20]),
    "first sequence": each(lambda a: a[:1]),
}
INNER = {
    "as ours": lambda taps: taps,
    "heads merged": each(lambda a: a.reshape(*a.shape[:2], -1), HEADS),
    "heads first": each(lambda a: a.swapaxes(1, 2), HEADS),
    "padded vocabulary": each(padded(64, 2), {"logits"}),
    "no batch of one": each(lambda a: a[0] if len(a) == 1 else a),
    "keys for every head": each(lambda a: np.repeat(a[:, :, None], 4, axis=2), {"mla.k_rope"}),
}
OUTER = {
    "as ours": lambda taps: taps,
    "flattened": each(lambda a: a.reshape(-1, *a.shape[2:])),
    "tokens first": each(lambda a: a.swapaxes(0, 1)),
    "tokens first, flattened": each(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:])),
    "rows behind": each(lambda a: padded(16, 0)(a.reshape(-1, *a.shape[2:]))),
    "the last of logits": lambda taps: {t: a[:, -1] if t == "fwd/logits" else a for t, a in taps.items()},
}
PLAIN = ("as ours", "the last of logits")
NO_LAST = {("padded", "the last of logits"), ("first tokens", "the last of logits")}
"""What is no last position."""
TOO_MANY = {(cut, "rows behind") for cut in ("padded", "first tokens", "first sequence")}
MADE = [
    (cut, inner, outer)
    for cut, inner, outer in itertools.product(CUT, INNER, OUTER)
    if (cut, outer) not in NO_LAST | TOO_MANY
    and (inner != "heads first" or outer in PLAIN)
    and (inner != "no batch of one" or outer == "as ours")
]
LATE = {"as ours": lambda trace: trace, "residuals from 1": lambda trace: later(trace, "/resid")}
ENGINE = (
    *("attn_norm", "mla.q", "mla.q_rope", "mla.k_rope", "mla.ctx", "attn_out", "resid"),
    *("router.ids", "router.weights", "ffn_out", "final_norm", "logits"),
)


def arranged(trace, made, late="as ours"):
    """The trace with these mistakes of its recorder."""
    cut, inner, outer = made
    taps = OUTER[outer](INNER[inner](CUT[cut](dict(trace.taps))))
    header = dataclasses.replace(trace.header, dims={}, expected=[])
    return LATE[late](Trace(header, taps))


@functools.cache
def engine(name):
    """What a fused engine shows of a recording."""
    return only(recording(name), lambda t: t.rpartition("/")[2] in ENGINE)


def conforms(name, made, late):
    judgement = judge(case(), arranged(engine(name), made, late))
    assert judgement.verdict in ("CONFORMS", "CONFORMS_IN_GAUGE"), render(judgement)
    return render(judgement)


@pytest.mark.parametrize(
    "made",
    [
        ("padded", "as ours", "flattened"),
        ("whole", "padded vocabulary", "the last of logits"),
        ("first sequence", "heads merged", "flattened"),
        ("first tokens", "keys for every head", "tokens first, flattened"),
    ],
)
def test_what_engines_dump_conforms(made):
    """Catches two mistakes on one tap called a bug: by shape, or because padding is taken for tokens; less read than is there."""
    said = conforms("hf-bfloat16", made, "as ours")
    assert ("sequences" in said) == ("first sequence" in made)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["hf-float32", "hf-bfloat16"]), st.sampled_from(MADE), st.sampled_from(sorted(LATE)))
def test_mistakes_of_a_recorder_are_no_bugs(name, made, late):
    """Catches any of some hundred combinations of recording mistakes called a bug."""
    conforms(name, made, late)


WRONG = ["A04 missing mscale squared", "R09 scaling twice", "R16 shared expert missing"]
WHOLE = [made for made in MADE if made[0] in ("whole", "padded") and made[2] != "the last of logits"]


def blamed(trace):
    return {f.tap for f in judge(case(), trace).culprits}


@functools.cache
def of_bug(name):
    trace = only(mistaken(name, "float32"), lambda t: t.rpartition("/")[2] in ENGINE)
    return trace, blamed(trace)


def same_culprits(name, made):
    trace, expected = of_bug(name)
    assert expected and blamed(arranged(trace, made)) == expected, made


@pytest.mark.parametrize("name", WRONG[:1])
def test_a_bug_is_found_where_it_is(name):
    """Catches an arrangement that is told by a wrong tap, or that hides the bug."""
    same_culprits(name, ("padded", "heads merged", "flattened"))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(WRONG), st.sampled_from(WHOLE))
def test_a_bug_is_found_where_it_is_whatever_the_arrangement(name, made):
    """Catches the same in all combinations that leave nothing out."""
    same_culprits(name, made)


def test_an_array_that_no_values_tell_is_refused():
    """Catches numbers that are nothing of the model read as the likeliest of several arrangements, and not said to be doubtful."""
    trace = recording("hf-float32")
    taps = {"fwd/L0/resid": np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)}
    judgement = judge(case(), Trace(dataclasses.replace(trace.header, expected=[], dims={}), taps))
    assert [f.tap for f in judgement.culprits] == ["fwd/L0/resid"] and "; it may be: " in render(judgement), render(
        judgement
    )


# ---- Residuals one layer late, some of them missing

LEFT_OUT = [("resid", "logits"), ("resid", "attn_norm", "logits"), ("resid", "resid_mid", "final_norm")]


@pytest.mark.parametrize("names", LEFT_OUT)
@pytest.mark.parametrize("gone", ["fwd/L1/resid", "fwd/L2/resid"])
def test_one_residual_alone_one_layer_late(names, gone):
    """Catches the stream and all that reads it blamed, where one residual alone tells that it is late."""
    plain = only(recording("hf-float32"), lambda t: t.rpartition("/")[2] in names and t != "fwd/L2/resid")
    trace = later(plain, "/resid")
    judgement = judge(case(), only(trace, lambda t: t != gone))
    assert not judgement.culprits and "counted from 1" in render(judgement), render(judgement)


def test_the_embedding_in_another_arrangement_tells_that_residuals_are_late():
    """Catches a list of hidden states that is not recognised because its tokens are padded, or are those of one sequence."""
    plain = only(recording("hf-float32"), lambda t: t.rpartition("/")[2] in ("embed", "resid"))
    late = later(only(plain, lambda t: t != "fwd/L2/resid"), "/resid")
    taps = dict(late.taps) | {"fwd/L0/resid": plain.taps["fwd/embed"]}
    for made in (("padded", "as ours", "flattened"), ("first sequence", "no batch of one", "as ours")):
        judgement = judge(case(), arranged(Trace(late.header, taps), made))
        assert not judgement.culprits and "one layer late" in render(judgement), render(judgement)


@pytest.mark.parametrize("made", [("whole", "as ours", "as ours"), ("padded", "as ours", "as ours")])
def test_one_layer_alone_counted_from_1(made):
    """Catches a layer blamed, with the weights of the layer before, because somebody calls it by the next number."""
    plain = only(recording("hf-float32"), lambda t: t.startswith("fwd/L1/") and t.rpartition("/")[2] in ENGINE)
    judgement = judge(case(), arranged(later(plain), made))
    assert not judgement.culprits and "counted from 1" in render(judgement), render(judgement)


# ---- Beside what is told by value of other things


SOME = {
    "padded": lambda a: padded(8, 1)(a),
    "first sequence": lambda a: a[0],
    "first tokens, flattened": lambda a: a[:, :20].reshape(-1, *a.shape[2:]),
    "padded, flattened, heads merged": lambda a: padded(8, 1)(a).reshape(64, -1),
}


@pytest.mark.parametrize(
    "how", [pytest.param(n, marks=pytest.mark.slow) if n in ("padded", "first tokens, flattened") else n for n in SOME]
)
def test_some_heads_in_another_arrangement(how):
    """Catches a rank's heads that are not told because rows are padded too, or of one sequence; heads taken for tokens."""
    trace = engine("hf-bfloat16")
    taps = {t: SOME[how](a[:, :, 2:]) if t.rpartition("/")[2] in HEADS else a for t, a in trace.taps.items()}
    judgement = judge(case(), Trace(dataclasses.replace(trace.header, dims={}, expected=[]), taps))
    assert not judgement.culprits and 'declare slices {"heads": [2, 3]}' in render(judgement), render(judgement)


def test_a_name_that_is_nearly_a_tap_is_no_part_of_another(tmp_path):
    """Catches normed latents under a name without its phase taken for the latents before the norm, and blamed for the difference.
    Oracle: of one token these differ by the norm's weight alone.
    """
    one = Case.read(new_case(tmp_path / "case", PRESETS["tiny"], seed=0, batch=1, length=1, margin=0.0))
    trace = trace_case(one)
    x, y = (np.asarray(trace.taps[f"fwd/L2/mla.{name}"])[..., :20] for name in ("c_kv", "kv_a"))
    assert np.sum(x * y) ** 2 / np.sum(x * x) / np.sum(y * y) > 0.965
    judgement = judge(one, Trace(dataclasses.replace(trace.header, dims={}, expected=[]), {"L2/mla.c_kv": x}))
    assert not judgement.findings and "L2/mla.c_kv" in judgement.unknown, render(judgement)


def test_rotated_keys_in_the_other_order_tell_nothing():
    """Catches contexts compared with what keys give whose channels lie in an order that nobody knows yet."""
    trace = only(recording("hf-float32"), lambda t: t.rpartition("/")[2] in ("mla.k_rope", "mla.q", "mla.ctx"))
    taps = {t: halves(t, a, {}) if t.endswith("k_rope") else a for t, a in trace.taps.items()}
    taps |= {t: padded(8, 1)(a).reshape(64, *a.shape[2:]) for t, a in taps.items() if t.endswith("ctx")}
    judgement = judge(case(), Trace(dataclasses.replace(trace.header, dims={}), taps))
    assert not judgement.culprits, render(judgement)
