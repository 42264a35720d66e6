"""The diff on the traces that people really have: some taps, in bfloat16, in another arrangement, with a finite mask."""

import dataclasses
import functools
import pathlib
import re
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import refimpl
from refimpl.autograd import SpecError
from refimpl.cli import main
from refimpl.diff import Case, Trace, render, replay
from refimpl.diff.judge import judge
from refimpl.diff.junit import to_junit
from refimpl.diff.lanes import Recorded
from refimpl.diff.precision import declared_precision
from refimpl.diff.program import last_use, names, program_of, regions
from refimpl.diff.reading import read
from refimpl.diff.report import next_tap, wrapped
from refimpl.diff.spans import folded
from refimpl.diff.tolerance import Noise
from refimpl.layers.precision import FLOAT32
from refimpl.layers.stage import STAGES, Call, Patch
from refimpl.model.inputs import read_inputs
from refimpl.model.phases import parts_of
from refimpl.record import trace_case

from .test_diff import MUTANTS

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
CLEAN = ["hf-float32", "hf-bfloat16"]


@functools.cache
def case():
    return Case.read(TINY)


@functools.cache
def recording(name):
    trace = Trace.read(TINY / f"{name}.safetensors")
    return Trace(trace.header, {t: np.asarray(a) for t, a in trace.taps.items()})


def only(trace, keep):
    """The trace with the taps that `keep` wants."""
    return Trace(dataclasses.replace(trace.header, expected=[]), {t: a for t, a in trace.taps.items() if keep(t)})


def drawn(trace, seed, share):
    """A random share of a trace's taps."""
    rng = np.random.default_rng(seed)
    return only(trace, lambda t: rng.random() < share)


# ---- Any subset of a clean recording


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CLEAN), st.integers(0, 10**6), st.sampled_from([0.95, 0.7, 0.5, 0.3, 0.1, 0.03]))
def test_no_subset_of_a_clean_recording_is_called_wrong(name, seed, share):
    """Catches a tolerance that knows only where our own run rounds: real recordings of transformers, in part."""
    judgement = judge(case(), drawn(recording(name), seed, share))
    assert not judgement.culprits, render(judgement)


SETS = {
    "logits": lambda t: t.endswith("/logits") and "router" not in t,
    "residual stream": lambda t: t.rpartition("/")[2] in ("embed", "resid", "logits"),
    "one layer": lambda t: t.startswith("fwd/L1/"),
    "router without ids": lambda t: "router" in t and not t.endswith("ids"),
    "everything but the ids": lambda t: not t.endswith("router.ids"),
    "weights of the experts alone": lambda t: t.endswith(("router.weights", "moe.routed")),
}


@pytest.mark.parametrize("keep", SETS)
@pytest.mark.parametrize("name", CLEAN)
def test_usual_parts_of_a_clean_recording_are_not_called_wrong(name, keep):
    """Catches slots whose order nobody can know, regions through the router, a whole model as one region."""
    judgement = judge(case(), only(recording(name), SETS[keep]))
    assert judgement.exit_code in (0, 2) and not judgement.culprits, render(judgement)


# ---- Any subset of a recording with a known mistake


@functools.cache
def mistaken(name, precision):
    with np.errstate(all="ignore"):
        return trace_case(case(), precision=precision, patches=[Patch(*MUTANTS[name])])


@settings(max_examples=18, deadline=None)
@given(
    st.sampled_from([m for m in MUTANTS if "A12" not in m]),
    st.sampled_from(["float32", "bf16"]),
    st.integers(0, 10**6),
    st.sampled_from([0.9, 0.6, 0.3, 0.1]),
)
@example("R10 scaling nowhere", "float32", 18447, 0.3)  # weights as if scaled later, and nothing of later shows it
@example("R10 scaling nowhere", "bf16", 508480, 0.6)  # the same, and what shows it does so through weights without ids
@example(
    "A01 half rotation of interleaved weights", "float32", 18169, 0.3
)  # weights in the order of experts that are not ours
def test_a_region_that_is_blamed_holds_the_mistake(name, precision, seed, share):
    """Catches blame on stages behind the one that is wrong, when what lies between was not recorded."""
    judgement = judge(case(), drawn(mistaken(name, precision), seed, share))
    stage = MUTANTS[name][0]
    tap = {"moe.out": "ffn_out"}.get(stage, stage)
    for f in judgement.culprits:
        assert any(t.endswith(f"/{tap}") for t in f.region), (f, render(judgement))


def test_with_two_taps_around_it_a_mistake_is_found():
    """Catches tolerances so wide that a region hides what one stage would show."""
    around = {
        "R09 scaling twice": ("ffn_norm", "ffn_out"),
        "R07 weights not renormalised": ("ffn_norm", "moe.routed"),
        "A04 missing mscale squared": ("attn_norm", "attn_out"),
        "R16 shared expert missing": ("ffn_norm", "resid", "resid_mid"),
    }
    for name, taps in around.items():
        for precision in ("float32", "bf16"):
            part = only(mistaken(name, precision), lambda t, taps=taps: t.rpartition("/")[2] in taps)
            assert judge(case(), part).exit_code == 1, (name, precision)


# ---- Right numbers in another arrangement


def turned(trace, change):
    """The trace with each tap replaced by change(name, array), or left out for None."""
    taps = {t: change(t.rpartition("/")[2], a) for t, a in trace.taps.items()}
    header = dataclasses.replace(trace.header, expected=[], dims={})
    return Trace(header, {t: np.ascontiguousarray(a) for t, a in taps.items() if a is not None})


HEADS = ("mla.q", "mla.q_rope", "mla.kv_b", "mla.ctx")
ARRANGEMENTS = {
    "tokens flattened": lambda t, a: a.reshape(-1, *a.shape[2:]) if a.ndim > 2 and a.shape[:2] == (2, 24) else a,
    "heads before tokens": lambda t, a: a.swapaxes(1, 2) if t in HEADS else a,
    "heads merged": lambda t, a: a.reshape(2, 24, -1) if t in HEADS else a,
    "sequence first": lambda t, a: a.swapaxes(0, 1) if a.shape[:2] == (2, 24) else a,
    "a finite mask": lambda t, a: np.maximum(a, a.dtype.type(-1e9)) if t in ("mask", "mla.scores") else a,
    "a small finite mask": lambda t, a: np.maximum(a, a.dtype.type(-1e4)) if t in ("mask", "mla.scores") else a,
    "ids in another order": lambda t, a: np.sort(a, axis=-1) if t == "router.ids" else a,
    "weights in another order": lambda t, a: np.sort(a, axis=-1) if t == "router.weights" else a,
    "means of groups": lambda t, a: a / 2 if t == "router.group_scores" else a,
    "half pairs": lambda t, a: halves(a) if t in ("mla.q_rope", "mla.k_rope") else a,
    "padded to 32": lambda t, a: padded(a) if t in ("resid", "attn_norm") else a,
    "keys padded to 128": lambda t, a: keys(a, t) if t in ("mask", "mla.scores", "mla.probs") else a,
    "flattened and padded": lambda t, a: fill(a.reshape(-1, *a.shape[2:]), 16) if rows(a) else a,
    "flattened, padded, heads first": lambda t, a: (
        np.swapaxes(fill(a.reshape(-1, *a.shape[2:]), 64), 0, 1) if rows(a) else a
    ),
    "tables flattened and padded": lambda t, a: fill(a.reshape(2, 48, -1), 16, 1) if t == "mla.rope_tables" else a,
    "in chunks of 7": lambda t, a: chunks(a, 7) if rows(a) else a,
    "chunks stacked": lambda t, a: chunks(a, 7).swapaxes(0, 1) if rows(a) else a,
    "ids as uint32": lambda t, a: a.astype(np.uint32) if a.dtype.kind == "i" else a,
}


def halves(a):
    """From the recordings' order, two halves, to interleaved pairs."""
    half = a.shape[-1] // 2
    return np.stack([a[..., :half], a[..., half:]], axis=-1).reshape(a.shape)


def rows(a):
    return a.ndim > 2 and a.shape[:2] == (2, 24)


def fill(a, n, axis=0):
    return np.pad(a, [(0, n if i == axis else 0) for i in range(a.ndim)])


def chunks(a, size):
    n = -(-a.shape[1] // size)
    return fill(a, n * size - a.shape[1], axis=1).reshape(len(a), n, size, *a.shape[2:])


def test_rows_of_no_token_hold_what_they_like():
    """Catches ids that no expert has, NaN, and rows dispatched for nobody: 48 tokens run as 64 rows by an engine."""
    ours = trace_case(case())
    rng, more = np.random.default_rng(4), {}
    for t, a in ours.taps.items():
        if a.shape[:2] == (2, 24):
            behind = np.full((16, *a.shape[2:]), -1 if a.dtype.kind in "iu" else np.nan, a.dtype)
            more[t] = np.concatenate([a.reshape(48, *a.shape[2:]), behind])
    judgement = judge(case(), Trace(ours.header, {**ours.taps, **more}))
    assert judgement.verdict == "CONFORMS", render(judgement)
    ids = {t: np.concatenate([more[t][:48], rng.integers(0, 16, (16, 4))]) for t in more if t.endswith("router.ids")}
    assert ids and all((np.sort(i[:48]) < case().config.n_routed_experts).all() for i in ids.values())
    sent = {t: dispatched(a, ids[t.rpartition("/")[0] + "/router.ids"], rng) for t, a in ours.taps.items() if is_row(t)}
    judgement = judge(case(), Trace(ours.header, {**ours.taps, **more, **ids, **sent}))
    assert judgement.verdict == "CONFORMS" and len(sent) == 10, render(judgement)
    assert len(judgement.findings) == len(ours.taps)
    assert judgement.notes["rows of no token are dispatched: taken out"] == [t for t in ours.taps if t in sent]
    every = {**ours.taps, **more, **sent}  # with -1 for the ids of rows of no token, and without ids
    for taps in (every, {t: a for t, a in every.items() if not t.endswith("router.ids")}):
        judgement = judge(case(), Trace(ours.header, taps))
        assert not judgement.culprits, render(judgement)
        assert set(judgement.notes["dispatched with rows of no token: not compared"]) == set(sent)


def is_row(tap):
    return tap.rpartition("/")[2] in ("moe.rows", "moe.gate", "moe.up", "moe.act", "moe.down")


def dispatched(a, ids, rng):
    """Rows sorted by expert, token and slot, as before, with others among them where a row of no token was sent to the expert."""
    real, out, at = sorted(range(192), key=lambda n: (ids[:48].flat[n], n)), [], 0
    assert len(real) == len(a)
    for expert in range(16):
        n = int((ids[:48] == expert).sum())
        out += [*a[at : at + n], *rng.normal(size=(int((ids[48:] == expert).sum()), *a.shape[1:])).astype(a.dtype)]
        at += n
    return np.stack(out)


def keys(a, tap):
    """With keys behind the last one that no query sees."""
    more = a.dtype.type(0 if tap == "mla.probs" else -np.inf)
    return np.pad(a, [(0, 0)] * 3 + [(0, 128 - a.shape[-1])], constant_values=more)


def test_keys_of_padding_that_are_seen_are_blamed():
    """Catches padding of keys cut off with what it took from the others: a softmax over 128 keys where 24 are."""
    ours = trace_case(case())
    wrong = {t: keys(a * a.dtype.type(0.9), "mla.probs") for t, a in ours.taps.items() if t.endswith("mla.probs")}
    header = dataclasses.replace(ours.header, dims={})
    assert {f.stage for f in judge(case(), Trace(header, {**ours.taps, **wrong})).culprits} == {"mla.probs", "mla.ctx"}


def padded(a):
    return np.pad(a, [(0, 0), (0, 8), (0, 0)])


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("how", ARRANGEMENTS)
def test_another_arrangement_is_recognised_not_blamed(how, name):
    """Catches a recording mistake that reads as a bug of the port: 75 of 93 taps were blamed for flattened tokens."""
    trace = recording(name)
    judgement = judge(case(), turned(trace, ARRANGEMENTS[how]))
    assert judgement.verdict in ("CONFORMS", "CONFORMS_IN_GAUGE"), render(judgement)
    said = {*judgement.notes, *judgement.gauges}
    silent = ("a finite mask", "a small finite mask", "ids as uint32")
    if how == "half pairs":  # declared as half, found interleaved
        assert judgement.gauges
    elif how not in silent:
        assert said, how


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((2, 3, 8, 5), True), ((2, 4, 7, 5), True), ((4, 2, 7, 5), True), ((2, 2, 8, 5), False), ((2, 5, 8, 5), False)],
)
def test_chunks_are_as_many_as_the_positions_need(shape, fits):
    """Catches axes of another meaning taken for chunks: too few positions, or a chunk that holds none."""
    x = np.arange(np.prod(shape)).reshape(shape)
    found = read(x, (2, 24, 5), ["B", "S", "D"])
    assert (found is not None) == fits
    if found and shape[0] == 2:
        np.testing.assert_array_equal(found.array[1, -1], x[1, 23 // shape[2], 23 % shape[2]])


def test_the_last_positions_logits_are_compared_there():
    """Catches (B, V) or (B, 1, V) logits, which is what every serving engine has, called another shape."""
    trace = recording("hf-float32")
    for cut in (lambda a: a[:, -1], lambda a: a[:, -1:]):
        part = turned(trace, lambda t, a, cut=cut: cut(a) if t == "logits" else a)
        good = judge(case(), part)
        assert good.verdict == "CONFORMS" and any("last position" in n for n in good.notes), render(good)
        part.taps["fwd/logits"][..., 3] += 0.01
        assert [f.tap for f in judge(case(), part).culprits] == ["fwd/logits"]


def test_bfloat16_values_in_float32_arrays_are_bfloat16():
    """Catches 75 taps blamed because a script saved `.float()`; and a single rounded tap of a float32 run passed over."""
    trace = recording("hf-bfloat16")
    header = dataclasses.replace(trace.header, precision={"storage": "float32", "accumulate": "float32"})
    wide = {t: a.astype(np.float32) if a.dtype == ml_dtypes.bfloat16 else a for t, a in trace.taps.items()}
    judgement = judge(case(), Trace(header, wide))
    assert judgement.verdict == "CONFORMS", render(judgement)
    assert any("declare storage bfloat16" in n for n in judgement.notes)
    exact = recording("hf-float32")
    rounded = exact.taps["fwd/mla.rope_tables"].astype(ml_dtypes.bfloat16).astype(np.float32)
    judgement = judge(case(), Trace(exact.header, exact.taps | {"fwd/mla.rope_tables": rounded}))
    assert [f.tap for f in judgement.culprits if f.stage == "mla.rope_tables"] == ["fwd/mla.rope_tables"]


def test_parts_of_a_bfloat16_run_in_float32_arrays_are_bfloat16():
    """Catches a run called wrong because the router's float32 numbers, beside few others, keep it from being known as bfloat16's:
    of 150 random parts 28 were.
    """
    for ours in (recording("hf-bfloat16"), trace_case(case(), precision="bf16")):
        taps = {t: a.astype(np.float32) if a.dtype == ml_dtypes.bfloat16 else a for t, a in ours.taps.items()}
        header = dataclasses.replace(ours.header, precision={"storage": "float32"}, expected=[])
        for seed in range(3):
            part = drawn(Trace(header, taps), seed, (0.1, 0.3, 0.5)[seed % 3])
            judgement = judge(case(), part)
            assert not judgement.culprits, (seed, render(judgement))


def test_the_routers_float32_and_the_embedding_tell_of_no_dtype():
    """Catches a float32 run held to bfloat16 because its weights are bfloat16 numbers, or a mistake that this hides."""
    for keep in (("embed", "router.scores", "router.weights", "router.ids"), ("embed",)):
        part = only(recording("hf-float32"), lambda t, keep=keep: t.rpartition("/")[2] in keep)
        assert not any("declare storage" in n for n in judge(case(), part).notes)
    wrong = only(
        mistaken("R10 scaling nowhere", "float32"), lambda t: t.rpartition("/")[2].startswith(("embed", "router"))
    )
    off = {**wrong.taps, "fwd/L1/router.weights": wrong.taps["fwd/L1/router.weights"] * np.float32(1.0005)}
    assert "fwd/L1/router.weights" in {f.tap for f in judge(case(), Trace(wrong.header, off)).culprits}


def test_a_long_run_in_float64_conforms():
    """Catches float64's candidates held to fewer roundings than the reference itself makes: a context sums 400 values in the order
    of one product there, and in that of blocks here.
    """
    rng = np.random.default_rng(0)
    long = dataclasses.replace(case(), tokens=rng.integers(0, case().config.vocab_size, (1, 400)).tolist())
    judgement = judge(long, trace_case(long, precision="float64"))
    assert judgement.verdict == "CONFORMS", render(judgement)
    off = trace_case(long, precision="float64")
    off.taps["fwd/L1/mla.ctx"][0, 300] *= 1 + 1e-12
    assert "fwd/L1/mla.ctx" in {f.tap for f in judge(long, off).culprits}


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"precision": {"storage": "float32", "moe.*": "bfloat61"}}, "precision moe.*='bfloat61'; known: float64"),
        ({"precision": {"storage": "float32", "accumulate": "banana"}}, "precision accumulate='banana'"),
        ({"layouts": {"foo": "bar"}}, "a layout of 'foo'; known: rope, mla, layers"),
        ({"phases": ["fwd", "fwd"]}, "fwd is there twice"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_declarations_that_mean_nothing_are_refused(told, says):
    """Catches a slip of the pen that changes nothing and that nobody learns of."""
    trace = recording("hf-float32")
    with pytest.raises(SpecError) as error:
        judge(case(), Trace(dataclasses.replace(trace.header, **told), trace.taps))
    assert says in str(error.value)


def test_dtypes_may_be_told_as_plans_are():
    """Catches `bf16` taken for float32, and what is declared so blamed."""
    trace = recording("hf-float32")
    taps = {t: a.astype(ml_dtypes.bfloat16).astype(np.float32) if "/moe.act" in t else a for t, a in trace.taps.items()}
    for told in ("bf16", "bfloat16"):
        header = dataclasses.replace(trace.header, precision={"storage": "fp32", "moe.act": told, "accumulate": "fp32"})
        assert {f.tap for f in judge(case(), Trace(header, taps)).culprits} <= {"fwd/L1/moe.down", "fwd/L2/moe.down"}
    assert "fwd/L1/moe.act" in {f.tap for f in judge(case(), Trace(trace.header, taps)).culprits}


def test_a_name_that_cannot_be_printed_is_refused(tmp_path):
    """Catches a terminal cleared by a tap's name, and JUnit that is no XML."""
    trace = recording("hf-float32")
    path = tmp_path / "t.safetensors"
    Trace(trace.header, dict(trace.taps) | {"my\x1b[2Jtap": np.zeros(3, np.float32)}).write(path)
    with pytest.raises(SpecError, match="cannot be printed"):
        Trace.read(path)


def test_declared_axes_are_believed():
    """Catches a header whose dims say how a tap lies, read and not used: heads and tokens of the same number."""
    trace = recording("hf-float32")
    taps = dict(trace.taps) | {
        "fwd/L1/mla.ctx": np.ascontiguousarray(trace.taps["fwd/L1/mla.ctx"].transpose(2, 0, 1, 3))
    }
    header = dataclasses.replace(trace.header, dims=trace.header.dims | {"fwd/L1/mla.ctx": "H B S Dv"})
    judgement = judge(case(), Trace(header, taps))
    assert judgement.verdict == "CONFORMS" and not judgement.notes


def test_a_part_may_be_declared_coarser_than_the_run():
    """Catches routed experts that compute in bfloat16 in a float32 model, declared so and blamed all the same."""

    def coarse(down, ids, weights):
        y = STAGES["moe.routed"].fn(down, ids, weights)
        return y.astype(ml_dtypes.bfloat16).astype(y.dtype)

    trace = trace_case(case(), patches=[Patch("moe.routed", coarse)])
    assert {f.stage for f in judge(case(), trace).culprits} == {"moe.routed"}
    header = dataclasses.replace(trace.header, precision=trace.header.precision | {"moe.*": "bfloat16"})
    assert judge(case(), Trace(header, trace.taps)).verdict == "CONFORMS"


def test_a_dialect_is_contested_not_wrong():
    """Catches a legitimate choice called a bug: routing weights on the activation, undeclared, then declared."""
    folder = case()
    raw = folder.raw_config | {"dialect": {"routing_weight_on": "activation"}}
    other = trace_case(dataclasses.replace(folder, raw_config=raw))
    assert judge(folder, other).verdict == "CONFORMS"
    silent = Trace(dataclasses.replace(other.header, config=folder.raw_config), other.taps)
    judgement = judge(folder, silent)
    assert judgement.verdict == "CONTESTED" and judgement.contested == {"routing_weight_on": "activation"}
    assert judgement.exit_code == 0


@pytest.mark.parametrize("name", CLEAN)
def test_residuals_named_one_layer_late_are_read_so(name):
    """Catches a list of hidden states, whose entry i is the input of layer i, blamed on four stages."""
    trace = recording(name)
    stream = [trace.taps["fwd/embed"], *[trace.taps[f"fwd/L{i}/resid"] for i in range(3)]]
    taps = {t: a for t, a in trace.taps.items() if not t.endswith("/resid")}
    judgement = judge(case(), Trace(trace.header, taps | {f"fwd/L{i}/resid": stream[i] for i in range(3)}))
    assert not judgement.culprits and any("one layer late" in n for n in judgement.notes), render(judgement)
    whole = {f"fwd/L{i}/resid": stream[i] for i in range(4)}  # the last layer's, which nobody reads, too
    header = dataclasses.replace(trace.header, expected=sorted({*trace.header.expected, *whole}))
    judgement = judge(case(), Trace(header, taps | whole))
    assert judgement.verdict == "CONFORMS" and not judgement.unknown, render(judgement)
    last = whole["fwd/L3/resid"].astype(np.float32) * np.float32(1.1)
    judgement = judge(case(), Trace(header, taps | whole | {"fwd/L3/resid": last}))
    assert "fwd/L2/resid" in {f.tap for f in judgement.culprits}


def test_a_declared_part_gets_a_verdict_for_what_was_declared():
    """Catches slices that are accepted and ignored: some layers, some tokens, some heads; and a wrong number among them."""
    trace = recording("hf-float32")
    layer = only(trace, lambda t: t.startswith(("fwd/L1/", "fwd/L2/")))
    assert judge(case(), layer).exit_code == 2
    declared = Trace(dataclasses.replace(layer.header, slices={"layers": [1, 2]}), layer.taps)
    assert judge(case(), declared).verdict == "CONFORMS"
    some = {"tokens": [0, 7, 23], "heads": [1, 3]}

    def part(tap, a):
        if tap in HEADS and tap != "mla.kv_b":
            return a[:, [0, 7, 23]][:, :, [1, 3]]
        return a[:, [0, 7, 23]] if tap in ("attn_norm", "resid", "ffn_out", "embed", "logits") else None

    good = turned(trace, part)
    good = Trace(dataclasses.replace(good.header, slices=some), good.taps)
    judgement = judge(case(), good)
    assert not judgement.culprits and len(judgement.findings) == len(good.taps), render(judgement)
    good.taps["fwd/L1/mla.q"][1, 2, 1, 5] += 0.1
    assert {f.tap for f in judge(case(), good).culprits} == {"fwd/L1/mla.q"}


SOME = st.sets(st.integers(0, 3), min_size=1), st.sets(st.integers(0, 23), min_size=1)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(CLEAN), st.integers(0, 10**6), *SOME)
def test_no_declared_part_of_a_clean_recording_is_called_wrong(name, seed, heads, tokens):
    """Catches a declared part beside which our own numbers are read where they belong to other tokens or experts, and taps that
    were cut along one of two declared axes, or along none.
    """
    heads, tokens, rng = sorted(heads), sorted(tokens), np.random.default_rng(seed)

    def some(tap, a):
        if rng.random() < 0.4:
            return None
        a = a[:, tokens] if a.shape[:2] == (2, 24) and rng.random() < 0.5 else a
        return a[:, :, heads] if tap in HEADS else a

    trace = turned(recording(name), some)
    trace = Trace(dataclasses.replace(trace.header, slices={"heads": heads, "tokens": tokens}), trace.taps)
    judgement = judge(case(), trace)
    assert not judgement.culprits, render(judgement)


@pytest.mark.parametrize(
    ("slices", "says"),
    [
        ({"layers": [7]}, "from 0 to 2"),
        ({"tokens": "all"}, "a list"),
        ({"heads": []}, "a list"),
        ({"experts": [1]}, "known: tokens"),
    ],
)
def test_slices_that_mean_nothing_are_refused(slices, says):
    """Catches a declaration that is misspelt and silently not used."""
    trace = recording("hf-float32")
    with pytest.raises(SpecError, match=says):
        judge(case(), Trace(dataclasses.replace(trace.header, slices=slices), trace.taps))


def test_unknown_names_are_told_what_they_are():
    """Catches "nothing to compare" for somebody who used the names of another framework, or no names at all."""
    trace = recording("hf-bfloat16")
    names = {
        "fwd/L1/attn_out": "layers.1.o",
        "fwd/L2/mla.ctx": "dump_0017",
        "fwd/L2/mla.q_rope": "dump_0018",
        "fwd/L2/router.ids": "dump_0019",
        "fwd/L1/router.ids": "ffn_moe_topk-1",
        "fwd/L2/mla.q": "model.layers.2.self_attn.q_b_proj",
    }
    judgement = judge(case(), Trace(trace.header, {names.get(t, t): a for t, a in trace.taps.items()}))
    assert judgement.exit_code == 2
    assert {n: t.partition(" ")[0] for n, t in judgement.unknown.items()} == {n: t for t, n in names.items()}
    assert "dump_0017: is it fwd/L2/mla.ctx?" in render(judgement)


def test_the_next_tap_to_record_is_named():
    """Catches an INCONCLUSIVE, or a wide region, that leaves the reader to guess what would help."""
    around = only(mistaken("R09 scaling twice", "float32"), lambda t: t.rpartition("/")[2] in ("ffn_norm", "ffn_out"))
    judgement = judge(case(), around)
    (tap,) = re.findall(r"next +record (\S+)", render(judgement))
    assert tap in judgement.culprits[0].region[:-1] and tap not in around.taps
    assert next_tap(judge(case(), only(recording("hf-float32"), lambda t: "L1" not in t))) == "fwd/L1/resid"
    assert next_tap(judge(case(), recording("hf-float32"))) == ""


def test_a_tolerance_is_explained(capsys):
    """Catches a limit that nobody can check: the numbers of the derivation are those of the finding; and a name without the
    phase, which `explain` takes, said to be missing.
    """
    files = [str(TINY), str(TINY / "hf-bug.safetensors")]
    assert main(["diff", *files, "--explain-tolerance", "fwd/L1/router.weights"]) == 0
    text = capsys.readouterr().out
    assert "every input was recorded" in text and text.count("    twin ") == 4 and "beyond" in text
    found = next(f for f in judge(case(), recording("hf-bug")).findings if f.tap == "fwd/L1/router.weights")
    assert f"= {found.allowed:.2e}" in text
    assert main(["diff", *files, "--explain-tolerance", "L1/router.weights"]) == 0 and capsys.readouterr().out == text
    for tap in ("fwd/L7/resid", "L7/resid", "bwd/L1/resid"):
        assert main(["diff", *files, "--explain-tolerance", tap]) == 3
        assert f"{tap}' was not compared" in capsys.readouterr().err


def test_two_traces_are_refereed(capsys, tmp_path):
    """Catches a referee who compares the two with each other only: the one with the bug is named, the other cleared."""
    good, bad = (str(TINY / f"{n}.safetensors") for n in ("hf-float32", "hf-bug"))
    for pair in ([good, bad], [bad, good]):
        assert main(["diff", str(TINY), *pair]) == 1
        out = capsys.readouterr().out
        assert f"{bad} leaves the specification, the other does not" in out
        assert "first visibly apart at fwd/L1/router.weights" in out and "the selection bias leaks" in out
    assert main(["diff", str(TINY), good, str(TINY / "hf-bfloat16.safetensors")]) == 0
    assert "neither leaves the specification" in capsys.readouterr().out
    assert main(["diff", str(TINY), bad, bad]) == 1 and "both leave" in capsys.readouterr().out
    assert main(["diff", str(TINY), good, bad, "--json"]) == 3 and "--json with two traces" in capsys.readouterr().err


def test_junit_names_the_stage_and_the_cause(tmp_path, capsys):
    """Catches XML that a CI server cannot read, or in which everything has passed, also to who reads the counts of suites alone."""
    out = tmp_path / "r.xml"
    assert main(["diff", str(TINY), str(TINY / "hf-bug.safetensors"), "--junit", str(out), "--quiet"]) == 1
    assert capsys.readouterr().out.startswith("DIVERGES")
    root = ElementTree.parse(out).getroot()
    failed = [c for c in root.iter("testcase") if c.find("failure") is not None]
    assert [(c.get("classname"), c.get("name")) for c in failed] == [
        ("router.weights", f"fwd/L{i}/router.weights") for i in (1, 2)
    ]
    assert "the selection bias leaks" in failed[0].find("failure").get("message")
    assert len(list(root.iter("testcase"))) == 93 + 4
    part = only(recording("hf-float32"), SETS["logits"])
    gates = ElementTree.fromstring(to_junit(judge(case(), part))).find("testsuite")
    assert [c.get("name") for c in gates if c.find("skipped") is not None] == ["coverage"]
    for suite, counts in ((gates, [4, 0, 0, 1]), (root.find("testsuite[@name='router.weights']"), [2, 2, 0, 0])):
        assert [int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")] == counts


def test_the_report_is_one_screen_and_wraps_at_words():
    """Catches thirteen findings of one stage told one by one, words broken at 80 columns, a verdict that is not last."""
    patches = [
        Patch(n, lambda x, w, *, eps, n=n: STAGES[n].fn(x, w, eps=eps) * 1.01) for n in ("attn_norm", "ffn_norm")
    ]
    judgement = judge(case(), trace_case(case(), patches=patches))
    text = render(judgement)
    assert (
        "  attn_norm in L0-L2 (all layers compared)   error" in text
        and "  ffn_norm in L0-L2 (all layers compared)   error" in text
        and len(text.splitlines()) < 24
    )
    assert text.splitlines()[-1].startswith("DIVERGES")
    narrow = wrapped(text, 60)
    assert max(map(len, narrow.splitlines())) <= 60 and narrow.split() == text.split()
    scattered = [f"fwd/{u}/resid" for u in ("L0", "L2", "mtp1")]
    assert folded(scattered) == "resid in L0, L2, mtp1" and folded(["fwd/logits"]) == "logits"


def test_drift_of_a_bfloat16_run_is_no_first_difference():
    """Catches "first visible at router.logits" said of every clean bfloat16 run, whose router is kept in float32."""
    assert "never visibly away" in render(judge(case(), recording("hf-bfloat16")))


def test_half_of_a_taps_size_is_visible_however_much_a_region_is_allowed():
    """Catches "never visibly away" of a bfloat16 residual stream without attention, 68 % from our own run."""
    patches = [Patch("resid_mid", lambda x, y: x)]
    stream = only(trace_case(case(), precision="bf16", patches=patches), lambda t: t.endswith(("/resid", "/logits")))
    judgement = judge(case(), stream)
    assert "chained         first visible at fwd/L0/resid, 4 taps differ" in render(judgement)


# ---- The program


def test_regions_end_at_what_was_recorded():
    """Catches a region that reaches through a recorded tap, or leaves out a stage between two of them."""
    c = case().config
    program = program_of(c, read_inputs(c, case().tokens), n_mtp=0, parts=parts_of(["fwd"], 24))
    found = regions(program, ["fwd/L1/attn_norm", "fwd/L1/mla.kv_a", "fwd/L1/mla.ctx"])
    assert found["fwd/L1/mla.kv_a"] == ("fwd/L1/mla.kv_a",)
    assert [t.rpartition("/")[2] for t in found["fwd/L1/mla.ctx"]] == [
        *("mla.rope_tables", "mask", "mla.q_a", "mla.q_a_norm", "mla.c_kv", "mla.k_rope", "mla.q", "mla.q_rope"),
        *("mla.kv_b", "mla.scores", "mla.probs", "mla.ctx"),
    ]
    last = last_use(program)
    assert (
        program[last["fwd/L1/ffn_norm"]].stage == "moe.rows" and program[last["fwd/L0/resid"]].tap == "fwd/L1/resid_mid"
    )


def test_a_replay_forgets_what_no_later_stage_reads(monkeypatch):
    """Catches lanes that hold every tap of the run until its end: what is kept is an argument of a later call."""
    lanes = []

    class Watched(replay.Lane):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            lanes.append(self)

    monkeypatch.setattr(replay, "Lane", Watched)
    judgement = judge(case(), only(recording("hf-float32"), lambda t: not t.endswith(("mla.q", "ffn_norm"))))
    g = judgement.grounds
    lanes.clear()
    program = list(g.calls.values())
    where = {call.tap: i for i, call in enumerate(program)}
    seen = 0
    for step in replay.replay(program, g.recorded):
        later = {n for call in program[where[step.call.tap] :] for n in names(call.args)} | {step.call.tap}
        held = {tap for lane in lanes for tap in lane.values}
        assert held <= later, held - later
        seen += len(held)
    assert seen > len(program)


def test_a_step_is_exact_on_what_the_candidate_recorded():
    """Catches an integer of our own run in the place of one that follows from the candidate's, and tables made in float32 called
    exact, of which the angle at the longest position is off by 0.008.
    """
    positions, chosen = np.array([[0, 163_839]]), np.array([[[3, 1], [1, 0]]])
    settings = {"dim": 8, "theta": 10_000.0, "yarn": None, "dtype": np.float32}
    program = [
        Call("mla.rope_tables", "fwd/mla.rope_tables", ("positions",), settings),
        Call("router.choice", "fwd/L1/router.choice", ("scores", "bias"), {}),
        Call("router.ids", "fwd/L1/router.ids", ("fwd/L1/router.choice", None), {"k": 2, "n_group": 1, "fill": 0.0}),
        Call("router.counts", "upd/L1/router.counts", ("fwd/L1/router.ids",), {"n_experts": 4}),
    ]
    inputs = {"positions": positions, "scores": np.array([[[0.9, 0.8, 0.1, 0.2]] * 2]), "bias": np.zeros(4)}
    taps = {
        "fwd/mla.rope_tables": np.zeros((2, 1, 2, 4)),
        "fwd/L1/router.ids": chosen,
        "upd/L1/router.counts": np.zeros(4, int),
    }
    p = declared_precision({})
    r = Recorded(taps, inputs, lambda name, plan: None, FLOAT32, Noise(p.unit, p.format))
    tables, ids, counts = (step.exact for step in replay.replay(program, r))
    angle = positions[..., None] * 10_000.0 ** -np.arange(0, 1, 0.25)
    np.testing.assert_allclose(tables, [np.cos(angle), np.sin(angle)], atol=1e-9)  # float64 knows the angle to 2e-11
    assert np.sort(ids).tolist() == [[[0, 1], [0, 1]]] and counts.tolist() == [1, 2, 0, 1]
