"""The corpus of known bugs: every family has its mutant or its reason, every mutant does something, and the diff names it."""

import functools
import inspect
import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from refimpl.diff import Trace, render
from refimpl.diff.corpus import MUTANTS, NOT_STAGES
from refimpl.diff.judge import judge
from refimpl.layers import STAGES, Recorder, observing
from refimpl.layers.fp8_parts import RECORDED
from refimpl.layers.precision import FLOAT64
from refimpl.layers.stage import Patch, tap_name
from refimpl.model import ForCausalLM, effective, introduce
from refimpl.record import trace_case
from refimpl.spec_tests.cases.mtp import mtp_case
from refimpl.spec_tests.cases.mutated import Mutated

from .test_diff_partial import case, recording

FAMILIES = {"R": 22, "A": 22, "F": 16, "T": 8, "L": 8}
QUIET = {
    "R02": "every biased score is above 0 here",
    "R05": "the case's biases are bfloat16 numbers already",
    "R12": "no chosen score underflows here",
    "R12b": "no logit lies below -88 here",
    **dict.fromkeys(("R13", "R13b"), "the sums are not small here"),
    "A14": "positions are short here: bfloat16 holds them",
    "A06b": "the ratio of the mscales is 1 here",
    "A17g": "nothing is padding here",
    "X06": "no groups tie here",
    "X24": "positions are counted from 0 here",
    "A12-q_a_norm-1e-06": "that is the case's eps",
    "A12-c_kv-1e-06": "that is the case's eps",
    **dict.fromkeys(("A18", "A18b", "A20"), "nothing is cached here"),  # named in test_diff_phases.py
    **{f"N01-{n}-1e-06": "that is the case's eps" for n in ("attn_norm", "ffn_norm", "final_norm", "all")},
}
QUIET |= {id: "no product is over more than 128 channels here" for id in MUTANTS if id.startswith("X50")}
"""Mutants that the committed case cannot show, and why."""
LOUD = [
    m.under(case().config)
    for m in MUTANTS.values()
    if m.applies(case().config)
    and m.id not in QUIET
    and m.regime not in ("cache", "training", "fp8")
    and m.stage[:4] != "mtp."
]
"""What one forward pass of the case shows; MTP has a test below, caches and training are
test_diff_phases.py's, FP8 is test_diff_fp8.py's.
"""

ABSORBED = ("mla.q_absorbed", "mla.scores_absorbed", "mla.ctx_latent", "mla.ctx_absorbed")


def form(m):
    """The form of attention in which a mistake shows."""
    return "absorbed" if {m.stage, *m.also} & set(ABSORBED) else "expanded"


def test_every_family_has_its_mutant_or_its_reason():
    """Catches a family of real bugs that nobody looks for, and one that is listed on both sides."""
    families = [f"{letter}{i:02d}" for letter, n in FAMILIES.items() for i in range(1, n + 1)]
    mutated = {re.match(r"[A-Z]\d\d", id)[0] for id in MUTANTS}
    assert [f for f in families if f not in mutated and f not in NOT_STAGES] == []
    assert mutated & set(NOT_STAGES) == set()
    assert all(len(why) > 10 for why in NOT_STAGES.values()) and set(NOT_STAGES) <= set(families)


def test_mutants_are_well_formed():
    """Catches an id used twice, a stage that does not exist, a thread without its number."""
    for id, m in MUTANTS.items():
        assert id == m.id and m.stage in (*STAGES, *RECORDED) and m.title[0] != " " and not m.title.endswith("."), id
        assert all(re.fullmatch(r"[\w/.-]+ #\d+", t) for t in m.threads), (id, m.threads)
        assert re.fullmatch(r"[RAFTLNXO]\d\d[a-z]?(-[\w.-]+)?|A0[12][qk]", id), id


def ran(attend):
    """Every stage call of the case in float64: stage -> [(tap, args, static, output)], what each tap held, and the weights."""
    model = ForCausalLM.from_weights(case().config, effective(case().weights(), FLOAT64))
    inputs, seen = model.inputs(case().tokens), {}
    recorder = introduce(Recorder(), model, inputs)

    def note(stage, run, /, *args, **static):
        out = run(*args, **static)
        seen.setdefault(stage.name, []).append((tap_name(stage), args, static, out))
        return out

    with observing(note, recorder):
        model(inputs, attend=attend, name="fwd")
    return seen, dict(recorder.taps), dict(model.named_weights())


@functools.cache
def calls():
    """As `ran`, with the stages of both forms of attention."""
    seen, taps, weights = ran("expanded")
    return ran("absorbed")[0] | seen, taps, weights


@pytest.mark.parametrize("m", LOUD, ids=lambda m: m.id)
def test_a_mutant_changes_its_stage(m):
    """Catches a mutant that is the specification: it would never be found, and would pass for a hypothesis."""
    seen, taps, weights = calls()
    if m.stage not in seen:
        pytest.skip(f"this model has no stage {m.stage}")
    changed = []
    for tap, args, static, out in seen[m.stage]:
        unit = tap.rpartition("/")[0]
        layer = f"model.layers.{unit.rpartition('/L')[2]}."
        reads = tuple(weights[layer + n[2:]] if n.startswith("w:") else taps[f"{unit}/{n}"] for n in m.reads)
        with np.errstate(all="ignore"):
            ours = m.fn(*args, **static, **({"reads": reads} if m.reads else {}))
        assert ours.shape == out.shape and ours.dtype.kind == out.dtype.kind, m.id
        changed.append(not np.allclose(ours, out, rtol=1e-9, atol=0, equal_nan=True))
    assert any(changed), m.id


@functools.cache
def right():
    """Our own run of the case, and that it conforms."""
    trace = trace_case(case())
    assert judge(case(), trace).exit_code == 0
    return trace


@pytest.mark.parametrize("id", [id for id in QUIET if MUTANTS[id].applies(case().config)])
def test_a_mutant_that_the_case_cannot_show_is_quiet_for_its_reason(id):
    """Catches an excuse that is none: what is said to be invisible here is."""
    with np.errstate(all="ignore"):
        trace = trace_case(case(), patches=[Mutated(MUTANTS[id], case())])
    if any(trace.taps[t].tobytes() != a.tobytes() for t, a in right().taps.items()):  # which conforms
        judgement = judge(case(), trace)
        assert judgement.exit_code == 0, render(judgement)


FAINT = {"N01-all-1e-12": {"final_norm"}}
"""Stages that a mistake changes by less than a rounding on this case."""
NAMED = [m for m in LOUD if not m.reads and m.stage in calls()[0]]


@pytest.mark.slow
@pytest.mark.parametrize("m", NAMED, ids=lambda m: m.id)
def test_the_diff_names_a_known_mistake(m):
    """Catches a diagnosis that finds nothing, something else, or several things; and blame on another stage."""
    with np.errstate(all="ignore"):
        patches = [Patch(name, fn) for name, fn in {m.stage: m.fn, **m.also}.items()]
        judgement = judge(case(), trace_case(case(), patches=patches, attend=form(m)))
    if not judgement.culprits:
        pytest.skip("below what float32 shows on this case")
    assert {f.stage for f in judgement.culprits} | FAINT.get(m.id, set()) == {m.stage, *m.also}, render(judgement)
    titles = [d.title for d in judgement.causes if set(d.taps) == {f.tap for f in judgement.culprits}]
    assert titles == [m.title], render(judgement)


@pytest.mark.parametrize("id", ["R03", "R07", "R09", "A04", "A04-absorbed", "A13", "X20", "R17", "N01-attn_norm-1e-05"])
def test_some_are_named_in_every_run(id):
    """Catches, without the slow tests, a diagnosis that has stopped working; also in the report and its JSON."""
    m = MUTANTS[id].under(case().config)
    with np.errstate(all="ignore"):
        judgement = judge(case(), trace_case(case(), patches=[Patch(m.stage, m.fn)], attend=form(m)))
    assert [d.title for d in judgement.causes] == [m.title]
    assert m.title in render(judgement)


ENGINE = ("attn_norm", "mla.q", "mla.c_kv", "mla.q_rope", "mla.k_rope", "attn_out", "resid_mid", "resid", "logits")


@pytest.mark.parametrize(
    ("id", "precision"),
    [
        ("A04", "bf16"),
        ("X26", "float32"),
        *[pytest.param(i, p, marks=pytest.mark.slow) for i in ("A05", "A09") for p in ("float32", "bf16")],
    ],
)
def test_a_wrong_scale_of_absorbed_attention_is_named(id, precision):
    """Catches a scale that is placed and not named because a kernel attends to latents and shows nothing between q and the output;
    and blame where that kernel is right.
    """
    m = MUTANTS[f"{id}-absorbed"].under(case().config)
    for patches in ([], [Patch(m.stage, m.fn)]):
        trace = trace_case(
            case(), precision=precision, attend="absorbed", patches=patches, taps=[f"*{t}" for t in ENGINE]
        )
        assert not any(t.endswith(("mla.scores", "mla.ctx_latent")) for t in trace.taps)
        judgement = judge(case(), trace)
        assert [d.ids for d in judgement.causes] == [(m.id,)] * len(patches), render(judgement)
        assert {f.stage for f in judgement.culprits} == ({"attn_out"} if patches else set()), render(judgement)


def test_a_scale_that_is_wrong_in_one_kernel_is_named_there():
    """Catches A08: prefill attends to keys, decoding to latents, and only one of the two has its mscale squared."""
    phases, m = ("fwd", "dec22", "dec23"), MUTANTS["A04-absorbed"].under(case().config)
    for patches in ([], [Patch(m.stage, m.fn)]):
        judgement = judge(case(), trace_case(case(), attend="auto", phases=phases, patches=patches))
        assert [d.ids for d in judgement.causes] == [(m.id,)] * len(patches), render(judgement)
        assert all(f.tap.startswith("dec2") for f in judgement.culprits)


@pytest.mark.parametrize("id", ["A04", "A05", "A05b", "A09", "A09b", "X17", "X18", "X19", "X26"])
def test_both_forms_of_a_wrong_scale_are_the_same_mistake(id):
    """Catches an absorbed form that computes another scale: each gives as many times the right scores as the other."""
    c = case().config
    rng, wide = np.random.default_rng(3), c.qk_nope_head_dim + c.qk_rope_head_dim
    q, keys = rng.normal(size=(1, 5, 4, wide)), rng.normal(size=(1, 5, 4, c.qk_nope_head_dim + c.v_head_dim))
    k_rope, mask = rng.normal(size=(1, 5, c.qk_rope_head_dim)), np.zeros((1, 1, 5, 5))
    latents = rng.normal(size=(1, 5, 4, c.kv_lora_rank)), rng.normal(size=(1, 5, c.kv_lora_rank))
    found = []
    for mutant, (a, b) in ((id, (q, keys)), (f"{id}-absorbed", latents)):
        m = MUTANTS[mutant].under(c)
        given = (a, q[..., c.qk_nope_head_dim :], b, k_rope, mask)
        found.append(m.fn(*given, scale=c.softmax_scale) / STAGES[m.stage].fn(*given, scale=c.softmax_scale))
    np.testing.assert_allclose(found[1], np.full_like(found[1], found[0].flat[0]), rtol=1e-9)


def test_the_bundled_bug_is_named_with_its_threads():
    """Catches a name without its precedent: the recording with the bias in the weights is R01, and where that happened."""
    judgement = judge(case(), recording("hf-bug"))
    (d,) = judgement.causes
    assert d.id == "R01" and "vLLM #11971" in d.threads and len(d.taps) == 2


def test_a_common_cause_is_said_once():
    """Catches thirteen findings for one wrong constant: eps 1e-5 in every norm of the stream."""
    names = ("attn_norm", "ffn_norm", "final_norm")
    patches = [Patch(n, MUTANTS[f"N01-{n}-1e-05"].fn) for n in names]
    judgement = judge(case(), trace_case(case(), patches=patches))
    (d,) = judgement.causes
    assert (
        d.title == "the norms' eps is 1e-05" and set(d.taps) == {f.tap for f in judgement.culprits} and len(d.taps) >= 5
    )


def test_what_nobody_knows_is_said_to_be_unknown():
    """Catches a tool that always has an answer."""
    strange = Patch("moe.shared", lambda *a: STAGES["moe.shared"].fn(*a) + 0.01 * np.sin(np.arange(48) * a[0][..., :1]))
    judgement = judge(case(), trace_case(case(), patches=[strange]))
    assert judgement.exit_code == 1 and judgement.causes == []
    assert "no known mistake reproduces moe.shared in L1-L2" in render(judgement)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_part_in_a_narrower_dtype_is_named_as_such(dtype):
    """Catches routed experts in bfloat16 reported as a mistake of unknown kind, and float16 called bfloat16, which allows more."""

    def coarse(down, ids, weights):
        y = STAGES["moe.routed"].fn(down, ids, weights)
        return (
            (y.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            if dtype == "bfloat16"
            else np.float32(np.float16(y))
        )

    judgement = judge(case(), trace_case(case(), patches=[Patch("moe.routed", coarse)]))
    (d,) = judgement.causes
    assert f"computed in {dtype}:" in d.title and set(d.taps) == {"fwd/L1/moe.routed", "fwd/L2/moe.routed"}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_experts_in_a_narrower_dtype_from_end_to_end_are_named_as_such(dtype):
    """Catches the finer of two dtypes named because its roundings, stage after stage, add up to one of the coarser."""
    inner = ["moe.rows", "moe.gate", "moe.up", "moe.act", "moe.down"]

    def rounded(stage):
        return Patch(stage, lambda *a, **k: STAGES[stage].fn(*a, **k).astype(dtype).astype(np.float32))

    trace = trace_case(case(), patches=[rounded(s) for s in (*inner, "moe.routed")])
    taps = {t: a for t, a in trace.taps.items() if t.rpartition("/")[2] not in inner}
    (d,) = judge(case(), Trace(replace(trace.header, expected=[]), taps)).causes
    assert f"computed in {np.dtype(dtype).name}:" in d.title and set(d.taps) == {
        "fwd/L1/moe.routed",
        "fwd/L2/moe.routed",
    }


def test_one_wrong_row_is_no_dtype():
    """Catches a single wrong number, small enough for bfloat16, explained by a dtype that would spare no row."""
    trace = trace_case(case())
    wrong = trace.taps["fwd/L1/moe.shared"].copy()
    wrong[1, 7, int(np.argmax(abs(wrong[1, 7])))] *= np.float32(1.01)
    judgement = judge(case(), Trace(trace.header, dict(trace.taps) | {"fwd/L1/moe.shared": wrong}))
    assert {f.tap for f in judgement.culprits} == {"fwd/L1/moe.shared", "fwd/L1/ffn_out"} and judgement.causes == []


def _leaking(c):
    """R01 as a patch, which knows its bias by the layer it runs in: the corpus reads it from the unit's weights."""
    weights = c.weights()

    def fn(s, ids, **static):
        unit = tap_name(STAGES["router.weights"]).split("/")[1]
        layer = c.config.num_hidden_layers if unit == "mtp1" else int(unit[1:])
        bias = weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"].astype(s.dtype)
        return STAGES["router.weights"].fn(s + bias, ids, **static)

    return Patch("router.weights", fn)


def test_mutants_of_mtp_are_named():
    """Catches mutants that only the main model's stages can be found by."""
    mtp = mtp_case()
    for id in ("T01", "T03", "T08"):
        trace: Trace = trace_case(mtp, patches=[Patch(MUTANTS[id].stage, MUTANTS[id].fn)])
        assert [d.id for d in judge(mtp, trace).causes] == [id]
    assert [d.id for d in judge(mtp, trace_case(mtp, patches=[_leaking(mtp)])).causes] == ["R01"]
    assert inspect.signature(MUTANTS["T03"].fn).parameters.keys() >= {"depth"}
