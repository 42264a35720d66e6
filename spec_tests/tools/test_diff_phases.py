"""The diff beyond one forward pass: chunks and cached steps, gradients, losses, the update of the balancing bias."""

import dataclasses
import functools
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refimpl
from refimpl.autograd import SpecError
from refimpl.autograd.tensor import data_of
from refimpl.cli import main
from refimpl.diff import Case, Header, Trace, digest, render
from refimpl.diff.corpus import MUTANTS
from refimpl.diff.judge import explain, judge
from refimpl.diff.precision import declared_precision
from refimpl.diff.run import Run
from refimpl.diff.training import Training, read_training
from refimpl.layers.stage import STAGES, Patch
from refimpl.model import ForCausalLM
from refimpl.model.phases import parts_of
from refimpl.record import trace_case
from refimpl.spec_tests import golden
from refimpl.spec_tests.cases.mtp import mtp_case

from .test_diff_partial import case, drawn, only, recording

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
CHUNKS, STEPS = ("fwd", "dec8", "dec16"), ("fwd", "dec21", "dec22", "dec23")
STEP = {"mtp_weight": 0.3, "aux_weight": 0.01, "gamma": 0.001}


@functools.cache
def cut(phases, precision="float32", attend="auto", patch=None):
    patches = [Patch(MUTANTS[patch].stage, MUTANTS[patch].fn)] if patch else []
    with np.errstate(all="ignore"):
        return trace_case(case(), precision=precision, phases=phases, attend=attend, patches=patches)


@pytest.fixture(scope="session")
def mtp():
    return mtp_case()


def step(c, precision="float32", patch=None, **changes):
    patches = [Patch(MUTANTS[patch].stage, MUTANTS[patch].fn)] if patch else []
    return trace_case(c, precision=precision, training=STEP | changes, patches=patches)


# ---- Chunks and cached steps


def test_parts_end_where_the_next_begins():
    """Catches parts that overlap or leave tokens out, and names that mean nothing."""
    assert [(p.start, p.stop) for p in parts_of(["dec22", "fwd", "bwd", "dec20"], 24)] == [(0, 20), (20, 22), (22, 24)]
    for phases, says in ((["dec3"], "the first part is fwd"), (["fwd", "dec24"], "begins after the 24 tokens")):
        with pytest.raises(SpecError, match=says):
            parts_of(phases, 24)


@pytest.mark.parametrize(
    ("phases", "precision"),
    [
        pytest.param(CHUNKS, "bf16", id="chunks-bf16"),
        pytest.param(STEPS, "float32", id="steps-float32"),
        pytest.param(CHUNKS, "float32", id="chunks-float32", marks=pytest.mark.slow),
        pytest.param(STEPS, "bf16", id="steps-bf16", marks=pytest.mark.slow),
    ],
)
def test_a_run_in_parts_conforms(phases, precision):
    """Catches masks, positions, keys and shapes of the parts that are not those of a run with a cache."""
    trace = cut(phases, precision)
    assert judge(case(), trace).verdict == "CONFORMS"
    undeclared = Trace(dataclasses.replace(trace.header, phases=["fwd"], layouts={}, dims={}), trace.taps)
    assert judge(case(), undeclared).verdict == "CONFORMS"


def test_parts_give_what_the_whole_gives():
    """Catches a program of parts that is judged against itself only: its taps are those of one forward pass, cut."""
    whole, parts = trace_case(case(), precision="float64"), cut(STEPS, "float64", "expanded")
    for tap in ("L2/mla.ctx", "L1/moe.routed", "logits"):
        pieces = [parts.taps[f"{phase}/{tap}"] for phase in STEPS]
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole.taps[f"fwd/{tap}"], rtol=0, atol=1e-12)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([CHUNKS, STEPS]),
    st.sampled_from(["float32", "bf16"]),
    st.integers(0, 10**6),
    st.sampled_from([0.7, 0.3, 0.1]),
)
def test_no_part_of_a_run_in_parts_is_called_wrong(phases, precision, seed, share):
    """Catches doubtful experts whose mark ends at the cache, and tolerances that forget what the cache carries over."""
    judgement = judge(case(), drawn(cut(phases, precision), seed, share))
    assert not judgement.culprits, render(judgement)


@pytest.mark.parametrize(
    ("id", "attend"),
    [
        ("A18", "expanded"),
        ("A18b", "absorbed"),
        ("A20", "expanded"),
        ("A20", "absorbed"),
        pytest.param("A18", "absorbed", marks=pytest.mark.slow),
        pytest.param("A18b", "expanded", marks=pytest.mark.slow),
    ],
)
def test_bugs_between_cache_and_tokens_are_named(id, attend):
    """Catches bugs that only a later chunk shows: invisible in one pass, placed and named in two."""
    name = id + ("-absorbed" if attend == "absorbed" else "")
    assert judge(case(), cut(("fwd",), attend=attend, patch=name)).exit_code == 0
    judgement = judge(case(), cut(("fwd", "dec16"), attend=attend, patch=name))
    assert {f.stage for f in judgement.culprits} == {MUTANTS[name].stage}
    assert all(f.tap.startswith("dec16/") for f in judgement.culprits)
    assert [d.title for d in judgement.causes] == [MUTANTS[name].title], render(judgement)


def test_a_part_that_was_not_recorded_is_missed():
    """Catches CONFORMS for a decode step nobody saw: declared, and then not there."""
    trace = cut(CHUNKS)
    judgement = judge(case(), only(trace, lambda t: not t.startswith("dec16/")))
    assert judgement.verdict == "INCONCLUSIVE" and "nothing of dec16" in render(judgement)


def test_slices_count_tokens_over_all_parts():
    """Catches entries of the whole run taken for entries of each part."""
    trace = cut(CHUNKS)
    names = [f"{phase}/L1/resid" for phase in CHUNKS]
    kept = {"fwd/L1/resid": [2], "dec8/L1/resid": [1, 7], "dec16/L1/resid": [0]}
    taps = {n: trace.taps[n][:, kept[n]] for n in names}
    header = dataclasses.replace(trace.header, slices={"tokens": [2, 9, 15, 16]}, expected=[])
    judgement = judge(case(), Trace(header, taps))
    assert len(judgement.findings) == 3 and not judgement.culprits, render(judgement)
    taps["dec8/L1/resid"][0, 1] *= 1.5
    assert [f.tap for f in judge(case(), Trace(header, taps)).culprits] == ["dec8/L1/resid"]


# ---- A training step


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_training_step_conforms(mtp, precision):
    """Catches a gradient that is not the sum over its readers, a weight left out: one tape against stage by stage."""
    trace = step(mtp, precision)
    judgement = judge(mtp, trace)
    assert judgement.verdict == "CONFORMS", render(judgement)
    model = ForCausalLM.from_weights(mtp.config, mtp.weights()).with_gradients()
    trained = {f"grad/{n}" for n, w in model.named_weights() if hasattr(w, "edges")}
    assert trained <= set(trace.taps) and {f"upd/L{i}/router.bias" for i in (1, 2)} <= set(trace.taps)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["float32", "bf16"]), st.integers(0, 10**6), st.sampled_from([0.8, 0.4, 0.15]))
def test_no_part_of_a_training_step_is_called_wrong(precision, seed, share):
    """Catches tolerances of gradients that hold only where everything was recorded."""
    judgement = judge(case(), drawn(trained(precision), seed, share))
    assert not judgement.culprits, render(judgement)


@functools.cache
def trained(precision):
    return step(case(), precision)


@pytest.fixture(scope="module")
def torch_step(tmp_path_factory):
    """transformers' weights, tokens and gradients as recorded in golden/: a case and a trace of weights' gradients."""
    folder, recorded = tmp_path_factory.mktemp("hf_tiny"), golden.arrays("hf_tiny")
    shutil.copy(golden.file("hf_tiny.json"), folder / "config.json")
    shutil.copy(golden.file("hf_tiny.weights.safetensors"), folder / "model.safetensors")
    tokens = recorded["input_ids"].tolist()
    (folder / "tokens.json").write_text(json.dumps({"tokens": tokens}))
    c = Case.read(folder)
    taps = {n: a for n, a in recorded.items() if n.startswith("grad/")} | {"fwd/logits": recorded["logits"]}
    weights = {n: digest(w) for n, w in c.weights().items()}
    return c, Trace(
        Header(c.raw_config, tokens, weights=weights, training={"labels": recorded["labels"].tolist()}), taps
    )


def test_gradients_of_transformers_conform(torch_step):
    """Catches gradients that agree with our own tape only: these are torch's, and nothing else of the run was recorded."""
    c, trace = torch_step
    judgement = judge(c, trace)
    assert not judgement.culprits and len(judgement.findings) == len(trace.taps) > 100, render(judgement)
    name = "grad/model.layers.1.mlp.gate.weight"
    wrong = Trace(trace.header, trace.taps | {name: trace.taps[name] * np.float32(1.01)})
    assert [f.tap for f in judge(c, wrong).culprits] == [name]


@pytest.mark.slow
def test_other_labels_are_other_gradients(torch_step):
    """Catches labels that are read and not used: those recordings ignore some tokens."""
    c, trace = torch_step
    assert judge(c, Trace(dataclasses.replace(trace.header, training={}), trace.taps)).exit_code == 1


@pytest.mark.parametrize("tap", ["bwd/L0/mla.q_rope", "grad/model.layers.1.mlp.gate.weight"])
def test_a_wrong_gradient_is_blamed_alone(tap):
    """Catches a gradient that takes those before it along: each is judged on the recorded one behind it."""
    trace = trained("float32")
    judgement = judge(case(), Trace(trace.header, dict(trace.taps) | {tap: trace.taps[tap] * np.float32(1.01)}))
    first = [f.tap for f in judgement.culprits if f.tap == tap]
    behind = {f.tap for f in judgement.culprits} - {tap}
    assert first and all(tap in "".join(f.region) or f.tap.startswith(("bwd", "grad")) for f in judgement.culprits)
    assert not tap.startswith("grad") or not behind
    assert "1.0100 x ours" in render(judgement)


def test_a_stage_without_its_vjp_is_found():
    """Catches a backward pass that forgets a branch: the routing weights taken for constants, the forward pass untouched."""
    weights = STAGES["router.weights"].fn

    def detached(s, ids, **static):
        return weights(data_of(s), ids, **static)

    trace = trace_case(case(), training={"mtp_weight": 0.0}, patches=[Patch("router.weights", detached)])
    judgement = judge(case(), trace)
    blamed = {f.tap for f in judgement.culprits}
    assert not [t for t in blamed if t.startswith("fwd/")], render(judgement)
    absent = {t for t in trained("float32").taps if t.startswith(("bwd/", "grad/"))} - set(trace.taps)
    assert {"bwd/L1/router.scores", "grad/model.layers.1.mlp.gate.weight"} <= absent
    assert {"bwd/L1/ffn_norm", "bwd/L2/ffn_norm"} <= blamed, render(judgement)


def test_the_tolerance_of_a_gradient_is_explained_as_it_is():
    """Catches an explanation that tells the floor of other stages: small rows of a gradient count as a tenth of the largest."""
    text = "\n".join(explain(case(), trained("float32"), "bwd/L1/ffn_norm"))
    assert "at least 0.1 of the largest: a gradient is a sum of parts that cancel" in text


LOSSES = ["L01", "L05", "T05"]
MORE_LOSSES = ["L02", "L03", "L04", "L06", "L06b", "L07", "L07b", "L07c", "L07d", "T05b"]


@pytest.mark.parametrize("id", [*LOSSES, *[pytest.param(id, marks=pytest.mark.slow) for id in MORE_LOSSES]])
def test_bugs_of_losses_and_counters_are_named(mtp, id):
    """Catches bugs that no forward pass shows: balance losses, expert loads, the bias, MTP's labels."""
    judgement = judge(mtp, step(mtp, patch=id))
    assert judgement.exit_code == 1, id
    assert [d.title for d in judgement.causes][:1] == [MUTANTS[id].title], render(judgement)
    own = {f.stage for f in judgement.culprits}
    assert MUTANTS[id].stage in own, render(judgement)


def test_losses_alone_are_judged(mtp):
    """Catches a loss that needs gradients beside it to be looked at; and weights of the losses that were not declared."""
    part = only(step(mtp), lambda t: "loss" in t and not t.startswith(("bwd", "grad")))
    judgement = judge(mtp, part)
    assert len(judgement.findings) == len(part.taps) >= 5 and not judgement.culprits
    silent = Trace(dataclasses.replace(part.header, training={}), part.taps)
    assert judge(mtp, silent).exit_code != 0


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"lambda": 1}, "unknown key 'lambda'"),
        ({"gamma": -1}, "gamma is -1"),
        ({"aux_weight": "x"}, "aux_weight is 'x'"),
    ],
)
def test_settings_of_a_step_that_mean_nothing_are_refused(training, says):
    """Catches a misspelt weight of a loss that counts as 0."""
    trace = trained("float32")
    with pytest.raises(SpecError, match=says):
        judge(case(), Trace(dataclasses.replace(trace.header, training=training), trace.taps))


def test_what_a_step_leaves_out_is_zero():
    """Catches a loss that counts although no weight of it was declared; labels or an optimiser out of nothing."""
    nothing = read_training({})
    assert nothing == Training(0.0, 0.0, 0.0, None, None) and set(nothing.losses.values()) == {0.0}
    for i, name in enumerate(("mtp_weight", "aux_weight", "gamma")):
        one = read_training({name: 0.5})
        assert [one.mtp_weight, one.aux_weight, one.gamma] == [0.5 * (i == k) for k in range(3)]
    assert read_training(STEP).losses == {"mtp_weight": 0.3, "aux_weight": 0.01}
    assert nothing.targets([[1, 2, 3]], [[0, 1, 2]]).tolist() == [[-100, 2, 3]] and nothing.targets([[7]], None) == [
        [7]
    ]
    assert read_training({"labels": [[4]]}).targets([[1]], [[1]]) == [[4]]


@pytest.mark.parametrize("inner", ["", "mla.q_absorbed", "mla.ctx_latent"])
@pytest.mark.parametrize("declared", [None, "absorbed", "expanded", "auto"])
def test_the_form_of_attention_is_what_was_declared_or_else_what_the_taps_betray(declared, inner):
    """Catches a part that is replayed in the form of another one, or in the one it was not declared in."""
    taps = {"fwd/L0/resid": np.zeros(1), "dec8/L0/resid": np.zeros(1)} | (
        {f"dec8/L0/{inner}": np.zeros(1)} if inner else {}
    )
    header = dataclasses.replace(recording("hf-float32").header, layouts={"mla": declared} if declared else {})
    run = Run(case(), Trace(header, taps), declared_precision({}), {})
    assert {p.name: p.attend for p in run.parts} == {
        "fwd": declared or "expanded",
        "dec8": declared or ("absorbed" if inner else "expanded"),
    }


def test_the_command_records_parts_and_steps(tmp_path, capsys):
    """Catches options that the library has and the command line has not."""
    out = str(tmp_path / "t.safetensors")
    assert main(["trace", str(TINY), "-o", out, "--phases", "fwd,dec20", "--attend", "auto"]) == 0
    assert main(["diff", str(TINY), out, "--quiet"]) == 0
    assert (
        main(["trace", str(TINY), "-o", out, "--training", "aux_weight=0.01,gamma=0.001", "--precision", "bf16"]) == 0
    )
    assert main(["diff", str(TINY), out, "--quiet"]) == 0
    assert main(["trace", str(TINY), "-o", out, "--training", "gamma"]) == 3
    assert "gamma=NUMBER" in capsys.readouterr().err
    for adam, says in ((["lr"], "expected KEY=VALUE"), (["lr=x"], "lr is 'x'")):
        assert main(["trace", str(TINY), "-o", out, "--training", "", "--optimizer", *adam]) == 3
        assert says in capsys.readouterr().err
    assert Trace.read(out).taps["bwd/L1/resid"].dtype == ml_dtypes.bfloat16
