"""Arrays that hold several taps, log-sum-exps, masks and tables in other forms: recognised, and every part of them judged.

The recordings are transformers' of preset tiny in bfloat16 and our own of a model without a query latent; fused arrays are made of
their taps with NumPy, so that the taps are the oracle.
"""

import dataclasses
import functools
import math
import pathlib

import numpy as np
import pytest

import refimpl
from refimpl.diff import Case, Trace, render
from refimpl.diff.judge import judge
from refimpl.layers import PRESETS
from refimpl.layers.stage import STAGES, Patch
from refimpl.record import new_case, trace_case

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"


@pytest.fixture(scope="module")
def full_rank(tmp_path_factory):
    config = PRESETS["tiny"].replace(q_lora_rank=None, num_nextn_predict_layers=0)
    return Case.read(new_case(tmp_path_factory.mktemp("case"), config, seed=3, length=16, margin=0.05))


@functools.cache
def hf(dtype):
    trace = Trace.read(TINY / f"hf-{dtype}.safetensors")
    return Trace(trace.header, {t: np.asarray(a) for t, a in trace.taps.items()})


@pytest.fixture(params=["tiny in bfloat16", pytest.param("full rank", marks=pytest.mark.slow)])
def recorded(request, full_rank):
    """A case and a sound recording of it."""
    if request.param == "full rank":
        return full_rank, trace_case(full_rank)
    return Case.read(TINY), hf("bfloat16")


def changed(trace, taps):
    header = dataclasses.replace(trace.header, expected=sorted(taps), dims={})
    return Trace(header, {t: np.ascontiguousarray(a) for t, a in taps.items()})


def cat(*parts):
    return np.concatenate(parts, axis=-1)


def flat(a):
    return a.reshape(*a.shape[:2], -1)


def every_head(r, n):
    return np.repeat(r[:, :, None], n, axis=2)


FUSED = {  # how -> taps that are gone, name of what is there instead, made from taps g(name), n heads, d channels without rotation
    "both latents": (
        "mla.q_a mla.kv_a",
        "layers.i.self_attn.fused_qkv_a_proj",
        lambda g, n, d: cat(g("mla.q_a"), g("mla.kv_a")),
    ),
    "both latents under one's name": (
        "mla.q_a mla.kv_a",
        "fwd/Li/mla.q_a",
        lambda g, n, d: cat(g("mla.kv_a"), g("mla.q_a")),
    ),
    "query and latent": ("mla.q mla.kv_a", "layers.i.qkv_a", lambda g, n, d: cat(flat(g("mla.q")), g("mla.kv_a"))),
    "gate and up": (
        "shared.gate shared.up",
        "layers.i.gate_up_proj",
        lambda g, n, d: cat(g("shared.gate"), g("shared.up")),
    ),
    "gate and up in turn": (
        "shared.gate shared.up",
        "layers.i.gate_up_proj",
        lambda g, n, d: np.stack([g("shared.gate"), g("shared.up")], axis=-1).reshape(*g("shared.up").shape[:-1], -1),
    ),
    "up and gate of rows": ("moe.gate moe.up", "w13_i", lambda g, n, d: cat(g("moe.up"), g("moe.gate"))),
    "up and gate, tokens flattened": (
        "mlp.gate mlp.up",
        "dump_i",
        lambda g, n, d: cat(g("mlp.up"), g("mlp.gate")).reshape(-1, 2 * g("mlp.up").shape[-1]),
    ),
    "a kernel's queries": (
        "mla.q mla.q_rope",
        "layers.i.query_states",
        lambda g, n, d: cat(g("mla.q")[..., :d], g("mla.q_rope")).swapaxes(1, 2),
    ),
    "rotated queries under the name of queries": (
        "mla.q_rope",
        "fwd/Li/mla.q",
        lambda g, n, d: cat(g("mla.q")[..., :d], g("mla.q_rope")),
    ),
    "a kernel's keys": (
        "mla.kv_b mla.k_rope",
        "layers.i.key_states",
        lambda g, n, d: cat(g("mla.kv_b")[..., :d], every_head(g("mla.k_rope"), n)).swapaxes(1, 2),
    ),
    "all keys, then all values": (
        "mla.kv_b",
        "fwd/Li/mla.kv_b",
        lambda g, n, d: cat(flat(g("mla.kv_b")[..., :d]), flat(g("mla.kv_b")[..., d:])),
    ),
    "a head's value before its key": (
        "mla.kv_b",
        "fwd/Li/mla.kv_b",
        lambda g, n, d: cat(g("mla.kv_b")[..., d:], g("mla.kv_b")[..., :d]),
    ),
    "the cache": ("mla.c_kv mla.k_rope", "layers.i.kv_cache", lambda g, n, d: cat(g("mla.c_kv"), g("mla.k_rope"))),
}


def fused(case, trace, how, change=lambda x: x):
    """The trace with the fused array of every layer that has its taps; their number."""
    gone, name, made = FUSED[how]
    taps, c, n = dict(trace.taps), case.config, 0
    for i in range(c.num_hidden_layers):
        if all(f"fwd/L{i}/{t}" in taps for t in gone.split()):
            x = made(lambda t, i=i: trace.taps[f"fwd/L{i}/{t}"], c.num_attention_heads, c.qk_nope_head_dim)
            for t in gone.split():
                del taps[f"fwd/L{i}/{t}"]
            taps[name.replace("i", str(i), 1) if name.startswith("dump") else _at(name, i)] = change(x)
            n += 1
    return changed(trace, taps), n


def _at(name, i):
    return name.replace("Li/", f"L{i}/").replace(".i.", f".{i}.").replace("_i", f"_{i}")


@pytest.mark.parametrize("how", FUSED)
def test_fused_arrays_are_taken_apart_and_conform(how, recorded):
    """Catches a fused array blamed for its shape, left unjudged for its name, or split in the wrong order."""
    case, trace = recorded
    if how.startswith("both latents") and case.config.q_lora_rank is None:
        pytest.skip("no query latent")
    part, n = fused(case, trace, how)
    judgement = judge(case, part)
    assert n and judgement.verdict == "CONFORMS", render(judgement)
    assert any("record " in note and "[..., " in note for note in judgement.notes), judgement.notes
    assert {f.tap for f in judgement.findings} == set(trace.taps)
    if how == "gate and up in turn":
        assert any("shared.gate = [..., 0::2], shared.up = [..., 1::2]" in note for note in judgement.notes)
    if how == "both latents":  # not by its two summands
        assert any("mla.q_a = [..., 0:24], mla.kv_a = [..., 24:52]" in note for note in judgement.notes)


@pytest.mark.parametrize("how", ["both latents", "gate and up", "the cache", "a kernel's keys", "a kernel's queries"])
def test_fused_arrays_of_bfloat16_numbers_in_float32_conform(how):
    """Catches parts held to float32 because of their array, when the run is in bfloat16; tokens flattened, or heads first."""
    case, trace = Case.read(TINY), hf("bfloat16")
    part, _ = fused(case, trace, how)
    kept = {t: a if a.dtype.kind in "iu" else a.astype(np.float32) for t, a in part.taps.items()}
    kept = {t: a.reshape(-1, a.shape[-1]) if a.ndim == 3 else a for t, a in kept.items()}
    judgement = judge(case, changed(trace, kept))
    assert judgement.verdict == "CONFORMS", render(judgement)
    assert any("[..., " in note for note in judgement.notes), judgement.notes


@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 24, 0)])
@pytest.mark.parametrize("name", ["fwd/L1/mla.kv_b", "layers.1.qkv"])
def test_arrays_of_nothing_are_no_fused_ones(name, shape):
    """Catches a traceback for a tap without axes or without numbers."""
    trace = hf("float32")
    judgement = judge(Case.read(TINY), changed(trace, trace.taps | {name: np.ones(shape, np.float32)}))
    assert judgement.exit_code in (1, 2)


@pytest.mark.parametrize(
    ("how", "stage", "where"),
    [
        ("a kernel's queries", "mla.q", np.s_[..., 3]),
        ("a kernel's queries", "mla.q_rope", np.s_[..., -2]),
        ("the cache", "mla.k_rope", np.s_[..., -1]),
        ("both latents", "mla.kv_a", np.s_[..., -1]),
        ("gate and up", "shared.gate", np.s_[..., 0]),
    ],
)
def test_a_wrong_number_in_a_fused_array_is_blamed_on_its_part(how, stage, where):
    """Catches parts that are recognised and then not compared, or one blamed for the other."""

    def wrong(x):
        x = x.copy()
        x[where] = x[where] * np.asarray(1.5, x.dtype)
        return x

    case, trace = Case.read(TINY), hf("float32")
    judgement = judge(case, fused(case, trace, how, wrong)[0])
    first = {f.tap.rpartition("/")[2] for f in judgement.culprits if len(f.region) == 1 or f.stage == stage}
    assert stage in first and first.isdisjoint({s for s in FUSED[how][0].split() if s != stage}), render(judgement)


@pytest.mark.parametrize("size", [2.0**-30, 2.0**20], ids=["small", "large"])
def test_what_an_array_is_does_not_depend_on_its_size(size):
    """Catches parts told by a product that is compared with a number: small activations would be an unknown array."""
    case, trace = Case.read(TINY), hf("float32")
    scaled = {
        t: a * np.float32(size) if t.endswith(("ffn_norm", "shared.gate", "shared.up")) else a
        for t, a in trace.taps.items()
    }
    judgement = judge(case, fused(case, changed(trace, scaled), "gate and up")[0])
    assert any("shared.gate = [..., 0:16], shared.up = [..., 16:32]" in note for note in judgement.notes), (
        judgement.notes
    )
    assert {f.stage for f in judgement.culprits}.isdisjoint({"shared.gate", "shared.up"})


def test_what_reads_a_part_reads_the_candidates_part(full_rank):
    """Catches scores blamed for queries that are wrong only in the channels which were recorded fused."""

    def wide(x, w, *, n_heads):
        y = STAGES["mla.q"].fn(x, w, n_heads=n_heads)
        y[..., :4] *= 1.02
        return y

    trace = trace_case(full_rank, patches=[Patch("mla.q", wide)])
    judgement = judge(full_rank, fused(full_rank, trace, "a kernel's queries")[0])
    assert {f.stage for f in judgement.culprits} == {"mla.q"}, render(judgement)


def test_a_mistake_is_not_taken_for_another_order(full_rank):
    """Catches a port that reads keys where values lie, whose blame would vanish in a reordering of kv_b."""

    def values_first(p, kv, *, v_dim):
        return (p @ kv[..., :v_dim].transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)

    trace = trace_case(full_rank, patches=[Patch("mla.ctx", values_first)])
    assert {f.stage for f in judge(full_rank, trace).culprits} == {"mla.ctx"}
    tap = "fwd/L1/mla.kv_b"
    judgement = judge(full_rank, changed(trace, trace.taps | {tap: trace.taps[tap] * np.float32(1.01)}))
    assert tap in {f.tap for f in judgement.culprits} and not any("record " in note for note in judgement.notes)


def test_arrays_that_are_no_taps_are_left_alone():
    """Catches noise of a fused array's size taken apart, and a rotated key that differs between heads taken for the shared one."""
    case, trace = Case.read(TINY), hf("float32")
    noise = np.random.default_rng(0).standard_normal((2, 24, 52)).astype(np.float32)
    judgement = judge(case, changed(trace, trace.taps | {"layers.1.fused_qkv_a_proj": noise}))
    assert judgement.verdict == "INCONCLUSIVE" and not judgement.culprits
    assert list(judgement.unknown) == ["layers.1.fused_qkv_a_proj"]

    def uneven(x):
        x = x.copy()
        x[:, 1, :, -1] += 0.001
        return x

    judgement = judge(case, fused(case, trace, "a kernel's keys", uneven)[0])
    assert judgement.verdict == "INCONCLUSIVE" and "layers.0.key_states" in judgement.unknown


# ---- Log-sum-exp


def with_lse(trace, change, *, scores=True):
    """The trace with every layer's log-sum-exps (B, H, S), summed key by key in float64 and then changed."""
    taps = {t: a for t, a in trace.taps.items() if scores or not t.endswith(("mla.scores", "mla.probs"))}
    for tap in [t for t in trace.taps if t.endswith("/mla.scores")]:
        s = trace.taps[tap].astype(np.float64)
        rows = [math.log(math.fsum(math.exp(v) for v in row if v > -9e3)) for row in s.reshape(-1, s.shape[-1])]
        taps[tap.replace("scores", "lse")] = change(np.reshape(rows, s.shape[:-1])).astype(np.float32)
    return changed(trace, taps)


@pytest.mark.parametrize("scores", [pytest.param(True, marks=pytest.mark.slow), False])
def test_log_sum_exps_are_judged_in_every_unit(scores, recorded):
    """Catches units of base 2, or of products before they are scaled, that count as wrong; and other units that pass."""
    case, trace = recorded
    scale = case.config.softmax_scale
    for change, gauge in (
        (lambda y: y, ""),
        (lambda y: (y / np.log(2)).swapaxes(1, 2).reshape(-1, y.shape[1]), "to base 2"),
        (lambda y: y / scale, "divided by the softmax scale"),
        (lambda y: y / scale / np.log(2), "to base 2, divided by"),
    ):
        judgement = judge(case, with_lse(trace, change, scores=scores))
        assert judgement.verdict == ("CONFORMS_IN_GAUGE" if gauge else "CONFORMS"), render(judgement)
        assert all(gauge in told for told in judgement.gauges)
        assert sum(f.stage == "mla.lse" for f in judgement.findings) == case.config.num_hidden_layers
    for change in (lambda y: y / np.log(10), lambda y: y * 1.1):
        assert {f.stage for f in judge(case, with_lse(trace, change, scores=scores)).culprits} == {"mla.lse"}


def test_a_log_sum_exp_is_of_scores_before_they_were_rounded():
    """Catches float32 values held to float32, although the kernel's scores are not those that were recorded in bfloat16."""
    trace, rng = hf("bfloat16"), np.random.default_rng(0)
    scores = {t: a.astype(np.float32) for t, a in trace.taps.items() if t.endswith("/mla.scores")}
    finer = {t: a * (1 + 2.0**-9 * rng.uniform(-1, 1, a.shape)) for t, a in scores.items()}
    lse = {t: a for t, a in with_lse(changed(trace, finer), lambda y: y).taps.items() if t.endswith("lse")}
    assert judge(Case.read(TINY), changed(trace, trace.taps | lse)).verdict == "CONFORMS"


# ---- Masks, tables


FORMS = {
    "one for all sequences": ("mask", lambda a: a[0, 0]),
    "one for every head": ("mask", lambda a: np.repeat(a, 4, axis=1)),
    "truth values": ("mask", lambda a: a == 0),
    "truth values that hide": ("mask", lambda a: (a != 0).astype(np.int64)),
    "numbers 1 and 0": ("mask", lambda a: (a == 0).astype(np.float32)),
    "every frequency twice": ("mla.rope_tables", lambda a: cat(a, a)),
    "every frequency twice, side by side": ("mla.rope_tables", lambda a: np.repeat(a, 2, axis=-1)),
    "tables of one sequence": ("mla.rope_tables", lambda a: a[:, 0]),
}


@pytest.mark.parametrize("how", FORMS)
def test_masks_and_tables_in_other_forms_are_read(how, recorded):
    """Catches a mask of truth values or of one sequence, and tables as transformers has them, blamed; and wrong ones that pass."""
    case, trace = recorded
    tap, form = FORMS[how]
    judgement = judge(case, changed(trace, trace.taps | {f"fwd/{tap}": form(trace.taps[f"fwd/{tap}"])}))
    assert judgement.verdict == "CONFORMS" and judgement.notes, render(judgement)
    wrong = trace.taps[f"fwd/{tap}"].copy()
    if tap == "mask":
        wrong[..., 5, 6] = 0  # a query sees the next key
    else:
        wrong[:, :, 7] = wrong[:, :, 6]
    assert f"fwd/{tap}" in {
        f.tap for f in judge(case, changed(trace, trace.taps | {f"fwd/{tap}": form(wrong)})).culprits
    }


def test_a_mask_that_differs_in_one_head_is_not_one_for_every_head():
    """Catches heads of which only the first is looked at."""
    trace = hf("float32")
    wrong = np.repeat(trace.taps["fwd/mask"], 4, axis=1)
    wrong[:, 3, 5, 6] = 0
    judgement = judge(Case.read(TINY), changed(trace, trace.taps | {"fwd/mask": wrong}))
    assert [f.tap for f in judgement.culprits] == ["fwd/mask"]


def test_frequencies_in_bfloat16_are_seen_in_tables_of_bfloat16():
    """Catches A14 hidden by the table's own rounding: rows are moved by less than that, numbers near 0 by more. Rounding the table
    twice is fair.
    """
    import ml_dtypes

    from refimpl.diff.corpus import MUTANTS

    case, trace = Case.read(TINY), hf("bfloat16")
    positions = np.tile(np.arange(24), (2, 1))
    c = case.config
    settings = {"dim": c.qk_rope_head_dim, "theta": c.rope_theta, "yarn": c.yarn, "dtype": np.float32}
    bug = MUTANTS["A14b"].fn(positions, **settings).astype(ml_dtypes.bfloat16)
    judgement = judge(case, changed(trace, {"fwd/mla.rope_tables": bug}))
    assert [f.stage for f in judgement.culprits] == ["mla.rope_tables"] and [d.id for d in judgement.causes] == ["A14b"]
    twice = (STAGES["mla.rope_tables"].fn(positions, **settings) * np.float32(1.001)).astype(ml_dtypes.bfloat16)
    twice = (twice.astype(np.float32) / np.float32(1.001)).astype(ml_dtypes.bfloat16)
    assert not judge(case, changed(trace, {"fwd/mla.rope_tables": twice})).culprits


def test_fused_arrays_of_a_training_step_are_taken_apart():
    """Catches losses, which have no axes, in the way of a search through a layer's taps."""
    case = Case.read(TINY)
    trace = trace_case(case, training={"aux_weight": 0.01})
    assert "fwd/L1/loss.seq_aux" in trace.taps
    taps = {t: a for t, a in trace.taps.items() if not t.startswith(("bwd/", "grad/"))}
    x = cat(taps.pop("fwd/L1/shared.gate"), taps.pop("fwd/L1/shared.up"))
    judgement = judge(case, changed(trace, taps | {"layers.1.gate_up": x}))
    assert not judgement.culprits and any("shared.up = [..., 16:32]" in note for note in judgement.notes), render(
        judgement
    )
