"""The diff: gates, replay of each stage on the candidate's own inputs, verdict, exit codes."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from refimpl.autograd import SpecError, nn_ops, ops
from refimpl.cli import main
from refimpl.diff import Case, Header, Trace, render, summary, to_json
from refimpl.diff.judge import judge
from refimpl.layers import PRESETS, STAGES
from refimpl.layers.rope import RopeScaling
from refimpl.layers.stage import Patch, Recorder, observing
from refimpl.record import new_case, trace_case


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case.read(new_case(tmp_path_factory.mktemp("case"), PRESETS["tiny"], seed=1, length=16))


@pytest.fixture(scope="module")
def trace(case):
    return trace_case(case)


def changed(trace, taps=None, **header):
    """The trace with other taps or header entries."""
    return Trace(dataclasses.replace(trace.header, **header), dict(trace.taps if taps is None else taps))


def culprits(case, trace):
    return {f.stage for f in judge(case, trace).culprits}


@pytest.mark.parametrize("attend", ["expanded", "absorbed"])
@pytest.mark.parametrize("precision", ["float64", "float32", "bf16"])
def test_our_own_runs_conform(case, precision, attend):
    """Catches tolerances below honest rounding, and a replay that does something else than the model did."""
    judgement = judge(case, trace_case(case, precision=precision, attend=attend))
    assert judgement.verdict == "CONFORMS", render(judgement)
    assert len(judgement.findings) > 80


def stage_fn(name):
    return STAGES[name].fn


MUTANTS = {
    "R03 group score is the maximum": (
        "router.group_scores",
        lambda a, *, n_group, best: stage_fn("router.group_scores")(a, n_group=n_group, best=1),
    ),
    "R07 weights not renormalised": (
        "router.weights",
        lambda s, ids, **k: stage_fn("router.weights")(s, ids, **k | {"normalise": False}),
    ),
    "R09 scaling twice": ("router.weights", lambda s, ids, **k: stage_fn("router.weights")(s, ids, **k) * 2.5),
    "R10 scaling nowhere": (
        "router.weights",
        lambda s, ids, **k: stage_fn("router.weights")(s, ids, **k | {"scale": 1.0}),
    ),
    "R16 shared expert missing": ("moe.out", lambda routed, shared: routed * 1),
    "A01 half rotation of interleaved weights": (
        "mla.q_rope",
        lambda q, table, *, interleaved: stage_fn("mla.q_rope")(q, table, interleaved=False),
    ),
    "A04 missing mscale squared": (
        "mla.scores",
        lambda *a, scale: stage_fn("mla.scores")(*a, scale=scale / 1.3688879454113936**2),
    ),
    "A06 cos and sin times mscale": ("mla.rope_tables", lambda p, **k: stage_fn("mla.rope_tables")(p, **k) * 1.3688),
    "A11 no YaRN": ("mla.rope_tables", lambda p, **k: stage_fn("mla.rope_tables")(p, **k | {"yarn": None})),
    "A10 YaRN from the wrong length": (
        "mla.rope_tables",
        lambda p, **k: stage_fn("mla.rope_tables")(
            p, **k | {"yarn": RopeScaling(original_max_position_embeddings=163840)}
        ),
    ),
    "A12 norm epsilon 1e-5 becomes 1e-2": ("mla.c_kv", lambda kv, w, *, eps: stage_fn("mla.c_kv")(kv, w, eps=1e-2)),
    "A13 query latent not normalised": ("mla.q_a_norm", lambda x, w, *, eps: x * w),
    "A17 no causal mask": ("mask", lambda *a, **k: np.zeros_like(stage_fn("mask")(*a, **k))),
    "A17 scores ignore the mask": (
        "mla.scores",
        lambda q, r, kv, k, m, *, scale: stage_fn("mla.scores")(q, r, kv, k, 0.0, scale=scale),
    ),
    "values and keys swapped": (
        "mla.ctx",
        lambda p, kv, *, v_dim: ops.swapaxes(p @ ops.swapaxes(kv[..., :v_dim], 1, 2), 1, 2),
    ),
    "silu on the wrong half": ("mlp.act", lambda gate, up: nn_ops.swiglu(up, gate)),
}


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_known_mistake_is_located_at_its_stage_and_nowhere_else(case, name, precision):
    """Catches a diff that blames later stages for earlier ones, or that needs float32 to see a bug."""
    stage, fn = MUTANTS[name]
    with np.errstate(all="ignore"):
        bad = trace_case(case, precision=precision, patches=[Patch(stage, fn)])
    judgement = judge(case, bad)
    assert judgement.exit_code == 1
    assert {f.stage for f in judgement.culprits} == {stage}, render(judgement)


def test_a_leaking_bias_is_located(case):
    """R01, the corpus's commonest bug: weights gathered from the biased scores. Catches a replay that trusts
    `router.weights`.
    """
    bias = {n: w for n, w in case.weights().items() if n.endswith("bias")}
    queue = [bias[n] for n in sorted(bias)]

    def leak(s, ids, **k):
        return stage_fn("router.weights")(s + queue.pop(0), ids, **k)

    assert culprits(case, trace_case(case, patches=[Patch("router.weights", leak)])) == {"router.weights"}


def test_missing_taps_widen_the_region(case, trace):
    """Catches a diff that needs every tap: with only the residual stream recorded the region's end is blamed, or
    nothing.
    """
    few = {t: a for t, a in trace.taps.items() if t.endswith(("resid", "logits"))}
    coarse = changed(trace, few, expected=sorted(few))
    assert judge(case, coarse).verdict == "CONFORMS"
    bad = trace_case(case, patches=[Patch(*MUTANTS["R09 scaling twice"])])
    found = judge(case, changed(bad, {t: bad.taps[t] for t in few}, expected=sorted(few))).culprits
    assert {f.tap for f in found} == {"fwd/L1/resid", "fwd/L2/resid"}


def test_half_layout_is_a_layout(case, trace):
    """Catches a legal permutation called a bug, one that is passed over without a word, and half of one called legal."""

    def half(a):
        return np.concatenate([a[..., 0::2], a[..., 1::2]], axis=-1)

    taps = {t: half(a) if t.endswith(("q_rope", "k_rope")) else a for t, a in trace.taps.items()}
    declared = changed(trace, taps, layouts=trace.header.layouts | {"rope": "half"})
    assert judge(case, declared).verdict == "CONFORMS"
    undeclared = judge(case, changed(trace, taps))
    assert (undeclared.verdict, undeclared.exit_code) == ("CONFORMS_IN_GAUGE", 0)
    assert sorted({t.rpartition("/")[2] for t in undeclared.gauges["rotated channels in the other order"]}) == [
        "mla.k_rope",
        "mla.q_rope",
    ]
    only_q = {t: half(a) if t.endswith("q_rope") else a for t, a in trace.taps.items()}
    assert judge(case, changed(trace, only_q)).exit_code == 1
    assert "mla.q_rope" in culprits(case, changed(trace, only_q))


def test_expert_order_within_a_token_is_free(case, trace):
    """Catches sets compared as lists: torch.topk does not say in which order it returns."""
    taps = {t: a[..., ::-1] if t.endswith(("router.ids", "router.weights")) else a for t, a in trace.taps.items()}
    assert judge(case, changed(trace, {t: np.ascontiguousarray(a) for t, a in taps.items()})).verdict == "CONFORMS"


def test_one_wrong_number_is_enough(case, trace):
    """Catches an average that drowns a single bad token. The next stage sees the candidate's own number and is right again, or
    was computed from another: both are told."""
    x = np.array(trace.taps["fwd/L1/moe.shared"])
    x[1, 3, 5] *= 1.001
    assert culprits(case, changed(trace, trace.taps | {"fwd/L1/moe.shared": x})) == {"moe.shared", "moe.out"}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_is_blamed_on_the_stage_that_made_it(case, bad):
    """Catches NaN that compares as equal, and one NaN for which every later stage is blamed."""

    def spoil(p, kv, *, v_dim):
        y = np.array(stage_fn("mla.ctx")(p, kv, v_dim=v_dim))
        y[0, 3, 1, 2] = bad
        return y

    with np.errstate(all="ignore"):
        judgement = judge(case, trace_case(case, patches=[Patch("mla.ctx", spoil)]))
    assert {f.stage for f in judgement.culprits} == {"mla.ctx"}, render(judgement)
    assert "NaN or infinite" in render(judgement)


UNUSABLE = {
    "another hidden size": ("fwd/L0/resid", lambda a: a[..., :-1]),
    "a missing axis": ("fwd/L0/attn_out", lambda a: a[..., :1]),
    "a scalar": ("fwd/embed", lambda a: a[0, 0, 0]),
    "no tables": ("fwd/mla.rope_tables", lambda a: a[:1]),
    "fewer slots": ("fwd/L1/router.ids", lambda a: a[..., :2]),
    "ids as fractions": ("fwd/L1/router.ids", lambda a: a + np.float32(0.5)),
    "ids as bool": ("fwd/L1/router.ids", lambda a: a > 3),
    "ids beyond the experts": ("fwd/L1/router.ids", lambda a: a + 16),
    "negative ids": ("fwd/L1/router.ids", lambda a: a - 99),
    "integer activations": ("fwd/L1/attn_norm", lambda a: a.astype(np.int32)),
}


@pytest.mark.parametrize("flaw", UNUSABLE)
def test_a_tap_of_another_kind_is_a_finding_and_harms_no_other(case, trace, flaw):
    """Catches a traceback, whose exit code reads as a verdict, broadcasting that swallows an axis, and blame on the neighbours."""
    tap, change = UNUSABLE[flaw]
    judgement = judge(case, changed(trace, dict(trace.taps) | {tap: np.asarray(change(trace.taps[tap]))}))
    assert [f.tap for f in judgement.culprits] == [tap], render(judgement)
    assert "expected" in judgement.culprits[0].note


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint64])
def test_ids_of_any_integer_type(case, trace, dtype):
    """Catches ids that only int64 can carry."""
    taps = {t: a.astype(dtype) if t.endswith(("router.ids", "router.groups")) else a for t, a in trace.taps.items()}
    assert judge(case, changed(trace, taps)).verdict == "CONFORMS"


@pytest.mark.parametrize("precision", ["fp8", "fp8_ue8m0"])
def test_an_fp8_run_of_our_own_conforms(case, precision):
    """Catches twins that multiply in another arithmetic than the trace declares."""
    judgement = judge(case, trace_case(case, precision=precision))
    assert judgement.verdict == "CONFORMS", render(judgement)


def test_float64_candidates_are_held_to_float64(case):
    """Catches twins of a lower precision than the candidate's."""

    def nudged(p, kv, *, v_dim):
        return stage_fn("mla.ctx")(p, kv, v_dim=v_dim) * (1 + 1e-9)

    bad = trace_case(case, precision="float64", patches=[Patch("mla.ctx", nudged)])
    assert culprits(case, bad) == {"mla.ctx"}
    with pytest.raises(SpecError, match="precision 'int4'"):
        judge(case, changed(bad, precision={"storage": "int4"}))


def test_mtp_modules_are_judged_too(tmp_path):
    """Catches a diff that stops at the main model: swapped halves of the concatenation (T01) are located in both depths."""
    config = PRESETS["tiny"].replace(num_nextn_predict_layers=2)
    mtp = Case.read(new_case(tmp_path / "mtp", config, seed=1, length=12, mtp=True))
    good = trace_case(mtp)
    assert judge(mtp, good).verdict == "CONFORMS" and "fwd/mtp2/logits" in good.taps

    def swapped(embedding, hidden, *, hidden_first):
        return stage_fn("mtp.cat")(embedding, hidden, hidden_first=not hidden_first)

    bad = judge(mtp, trace_case(mtp, patches=[Patch("mtp.cat", swapped)]))
    assert [f.tap for f in bad.culprits] == ["fwd/mtp1/cat", "fwd/mtp2/cat"]
    without = {t: a for t, a in good.taps.items() if "/mtp" not in t}
    assert judge(mtp, changed(good, without, expected=[])).exit_code == 2


def test_weights_gate(case, trace):
    """Catches wrong weights taken for wrong maths (a third of the corpus): changed, unloaded, surplus, undeclared."""
    name = "model.layers.1.mlp.gate.weight"
    weights = dict(trace.header.weights)
    wrong = judge(case, changed(trace, weights=weights | {name: "sha256:0"}))
    assert wrong.exit_code == 1 and name in render(wrong)
    lost = judge(case, changed(trace, weights={n: d for n, d in weights.items() if n != name}))
    assert lost.exit_code == 1 and "1 tensors not loaded" in render(lost)
    surplus = judge(case, changed(trace, weights=weights | {"model.layers.9.x": "sha256:0"}))
    assert surplus.exit_code == 1 and "model.layers.9.x" in render(surplus)
    assert judge(case, changed(trace, weights={})).exit_code == 2


def test_a_bfloat16_candidate_of_float32_weights(case, tmp_path):
    """Catches a weights gate that calls the declared rounding of weights a difference."""
    from refimpl.checkpoint import write_file

    rng = np.random.default_rng(0)
    folder = tmp_path / "case"
    new_case(folder, PRESETS["tiny"], seed=1, length=8)
    weights = {n: np.array(w, np.float32) for n, w in Case.read(folder).weights().items()}
    weights = {n: w * np.float32(1 + 1e-4 * rng.random()) for n, w in weights.items()}
    write_file(folder / "weights.safetensors", weights)
    judgement = judge(Case.read(folder), trace_case(Case.read(folder), precision="bf16"))
    assert judgement.verdict == "CONFORMS" and "after rounding" in render(judgement)


def test_inputs_gate(case, trace):
    """Catches a comparison of two different experiments."""
    tokens = [list(row) for row in trace.header.tokens]
    tokens[0][0] += 1
    with pytest.raises(SpecError, match="other tokens"):
        judge(case, changed(trace, tokens=tokens))
    other = judge(case, changed(trace, config=trace.header.config | {"rms_norm_eps": 1e-5}))
    assert other.exit_code == 1 and "rms_norm_eps" in render(other)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([[1, 2], [3]], "not a rectangular array"),
        ([[1.5, 2]], "expected integers"),
        ([[999]], "token id 999"),
        ([], "not empty"),
    ],
)
def test_a_cases_tokens_that_are_none_are_not_the_traces_fault(case, trace, tokens, says):
    """Catches "the trace was recorded with other tokens ...; record it again" of a case with a broken tokens.json."""
    with pytest.raises(SpecError, match=rf"{says}(.|\n)*tokens\.json"):
        judge(dataclasses.replace(case, tokens=tokens), trace)


def test_a_header_of_the_first_sequences_is_one_of_the_case(case, trace):
    """Catches a run of the first sequence refused for an honest header; one of the second, or of none, taken for it."""
    first = {t: a[:1] for t, a in trace.taps.items() if t.endswith(("resid", "embed", "/logits"))}
    judgement = judge(case, Trace(dataclasses.replace(trace.header, tokens=case.tokens[:1], expected=[]), first))
    assert not judgement.culprits and "16 tokens of the first 1 of 2 sequences" in render(judgement)
    for other in (case.tokens[1:], [], [*case.tokens, case.tokens[0]]):
        with pytest.raises(SpecError, match="other tokens"):
            judge(case, changed(trace, tokens=other))


def test_positions_may_be_spelled_out(case, trace):
    """Catches a trace refused because it writes down the positions that the case leaves to be counted, or the other way."""
    counted = [list(range(len(row))) for row in case.tokens]
    assert judge(case, changed(trace, positions=counted)).verdict == "CONFORMS"
    assert judge(dataclasses.replace(case, positions=counted), trace).verdict == "CONFORMS"
    with pytest.raises(SpecError, match="other positions"):
        judge(case, changed(trace, positions=[[p + 1 for p in row] for row in counted]))
    away = dataclasses.replace(case, positions=[[p + 1 for p in row] for row in counted])
    with pytest.raises(SpecError, match="header has no positions, which are then counted from 0"):
        judge(away, trace)
    with pytest.raises(SpecError, match="header has no padding"):
        judge(dataclasses.replace(case, valid=[[0, *row[1:]] for row in [[1] * len(r) for r in case.tokens]]), trace)
    with pytest.raises(SpecError, match="other padding"):
        judge(case, changed(trace, valid=[[0, *row[1:]] for row in [[1] * len(r) for r in case.tokens]]))


def test_silence_is_not_conformance(case, trace):
    """Catches 'OK' after checking nothing: no known tap, an expected tap that never fired, unknown names, a probing
    recorder.
    """
    assert judge(case, changed(trace, {"something": np.zeros(3, np.float32)}, expected=[])).exit_code == 2
    for one in ("fwd/embed", "fwd/mask", "fwd/logits"):
        assert judge(case, changed(trace, {one: trace.taps[one]}, expected=[])).exit_code == 2
    assert judge(case, changed(trace, self_check={"repeat": 99.0})).exit_code == 2
    lost = {t: a for t, a in trace.taps.items() if t != "fwd/L1/router.weights"}
    undecided = judge(case, changed(trace, lost))
    assert undecided.exit_code == 2 and "fwd/L1/router.weights" in render(undecided)
    unknown = judge(case, changed(trace, dict(trace.taps) | {"fwd/L9/resid": np.zeros(3, np.float32)}))
    assert unknown.exit_code == 2 and "fwd/L9/resid" in render(unknown)
    assert judge(case, changed(trace, self_check={"logits_taps_off_vs_on": 1e-3})).exit_code == 2


def test_trace_round_trip(case, trace, tmp_path):
    """Catches a tap, a dtype or a header entry lost in the file."""
    path = tmp_path / "t.safetensors"
    kept = {t: a.astype(ml_dtypes.bfloat16) if t.endswith("resid") else a for t, a in trace.taps.items()}
    changed(trace, kept, notes="n", slices={"tokens": [1]}).write(path)
    back = Trace.read(path)
    assert back.header == dataclasses.replace(trace.header, notes="n", slices={"tokens": [1]})
    assert set(back.taps) == set(kept)
    for tap, a in kept.items():
        assert back.taps[tap].dtype == a.dtype and np.array_equal(back.taps[tap], a)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "refimpl-trace/9"}, "schema"),
        ({"tokens": None}, "tokens"),
        ({"weights": []}, "weights"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_unsound_headers_are_refused(trace, change, says):
    """Catches a trace of another version or kind read as if it were ours."""
    text = json.dumps(dataclasses.asdict(trace.header) | change)
    with pytest.raises(SpecError, match=says):
        Header.from_json(text)
    with pytest.raises(SpecError, match="not JSON"):
        Header.from_json(text[:-3])


def test_command_line(case, trace, tmp_path, capsys):
    """Catches exit codes and output that scripts cannot rely on."""
    good, bad, cut = (tmp_path / f"{n}.safetensors" for n in ("good", "bad", "cut"))
    assert main(["trace", str(case.path), "-o", str(good)]) == 0
    trace_case(case, patches=[Patch(*MUTANTS["R09 scaling twice"])]).write(bad)
    cut.write_bytes(good.read_bytes()[:-100])
    capsys.readouterr()
    assert main(["diff", str(case.path), str(good), "--quiet"]) == 0
    assert capsys.readouterr().out == "CONFORMS (0 taps unseen)\n"
    assert main(["diff", str(case.path), str(bad)]) == 1
    shown = capsys.readouterr().out
    assert "the candidate is 2.5000 x ours" in shown and shown.endswith("taps unseen)\n")
    assert main(["diff", str(case.path), str(bad), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "DIVERGES" and report["schema"] == "refimpl-diff/1"
    assert {f["stage"] for f in report["findings"] if not f["ok"]} == {"router.weights"}
    assert main(["diff", str(case.path), str(bad), "--all"]) == 1
    assert len(capsys.readouterr().out.splitlines()) > 90
    for broken in (cut, tmp_path / "none", tmp_path):
        assert main(["diff", str(case.path), str(broken)]) == 3
        assert "while reading trace" in capsys.readouterr().err
    assert main(["diff", str(tmp_path), str(good)]) == 3
    assert "tokens.json" in capsys.readouterr().err


def test_every_array_has_a_stage(case):
    """Catches an array slipped into a stage that no stage produced: it could not be replayed alone."""
    recorder = Recorder()
    x = np.ones((1, 2, 4))
    recorder.know("x", x)
    with observing(recorder):
        y = STAGES["resid"](x, x)
        with pytest.raises(SpecError, match="no stage produced"):
            STAGES["resid_mid"](y, y * 2)
        with pytest.raises(SpecError, match="twice"):
            STAGES["resid"](x, y)


def test_summary_and_json_agree(case, trace):
    """Catches two renderings that tell different stories."""
    judgement = judge(case, trace)
    assert summary(judgement).startswith(json.loads(to_json(judgement))["verdict"])
