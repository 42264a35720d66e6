"""The claims about ranks, held to implementations with a fault in them; and what comes with us, by name."""

import json
from pathlib import Path

import numpy as np
import pytest

import refimpl
from refimpl import SpecError
from refimpl.cli import main
from refimpl.conformance import Lacking, subject
from refimpl.conformance.bench import Bench
from refimpl.conformance.parallel import by_stages, contribution, joined, whole_and_sum
from refimpl.conformance.ranks import Impl as Ranks
from refimpl.conformance.report import listed, unreasoned
from refimpl.conformance.shipped import PROFILES, SHIPPED, profiles_of
from refimpl.conformance.subject import Subject
from refimpl.diff.judge import judge
from refimpl.layers.stage import STAGES as OURS
from refimpl.layers.stage import Patch, observing
from refimpl.model import Impl


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(subject(), tmp_path_factory.mktemp("cases"))


class Scaled(Impl):
    """Its scale goes by the heads that it was loaded with, where a rank has fewer: a size that is the whole model's."""

    def _patch(self):
        heads = self.model.config.num_attention_heads

        def scores(q, q_rope, kv_b, k_rope, mask, **static):
            static["scale"] *= np.sqrt(q.shape[-2] / heads) if self.by == "stage" else np.sqrt(heads / 4)
            return OURS["mla.scores"].fn(q, q_rope, kv_b, k_rope, mask, **static)

        return Patch("mla.scores", scores)

    def stage(self, name, inputs, params=None):
        with observing(self._patch()):
            return super().stage(name, inputs, params)

    def forward(self, *args, **given):
        with observing(self._patch()):
            return super().forward(*args, **given)


def of(kind, **facts):
    impl = kind(attend="expanded")
    vars(impl).update(facts)
    return Subject(impl)


@pytest.mark.slow
def test_a_stage_that_knows_the_whole_models_heads_is_seen(bench):
    """Catches rank programs that never ask the implementation, or that are compared with themselves."""
    case = bench.loaded()
    wrong = of(Scaled, by="stage")
    wrong.load(case)
    assert bench.near("plain", by_stages(wrong, case, "tp", 2), by_stages(wrong, case))
    assert not bench.near("plain", by_stages(wrong, case, "ep", 2), by_stages(wrong, case))


@pytest.mark.slow
def test_parts_that_are_scaled_by_their_own_size_are_seen(bench):
    """Catches a sum that is taken of anything; the whole model is right, a cut one is not."""
    case, wrong = bench.case(), of(Scaled, by="load")
    assert bench.near_sum("heads", 2, *whole_and_sum(wrong, case, "heads", 2))
    assert not bench.near_sum("channels", 2, *whole_and_sum(wrong, case, "channels", 2))


def test_what_a_layer_adds_is_its_tap_or_the_difference_of_the_stream():
    """Catches attention's part taken from behind the feed-forward, and the first layer's from a layer before it."""
    rng = np.random.default_rng(0)
    stream = {
        n: rng.normal(size=(1, 2, 3)) for n in ("fwd/embed", "L0/resid_mid", "L0/resid", "fwd/L1/resid_mid", "L1/resid")
    }
    np.testing.assert_array_equal(contribution(stream, 0, "attn_out"), stream["L0/resid_mid"] - stream["fwd/embed"])
    np.testing.assert_array_equal(contribution(stream, 1, "attn_out"), stream["fwd/L1/resid_mid"] - stream["L0/resid"])
    np.testing.assert_array_equal(contribution(stream, 1, "ffn_out"), stream["L1/resid"] - stream["fwd/L1/resid_mid"])
    own = {"L1/ffn_out": np.ones(3), "dims": {}} | stream
    np.testing.assert_array_equal(contribution(own, 1, "ffn_out"), np.ones(3))
    with pytest.raises(Lacking, match="taps L2/attn_out, or L1/resid and L2/resid_mid"):
        contribution(stream, 2, "attn_out")


class Told(Ranks):
    """Ourselves on ranks, whose answers are changed on the way."""

    def ranks(self, *args, **given):
        return self.change(super().ranks(*args, **given))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "blamed"),
    [
        (lambda found: found, set()),
        (lambda found: found[::-1], {"mla.q", "mla.kv_b"}),  # heads in another order
        (
            lambda found: [f | {"dims": {t: d.replace(" +tp", "") for t, d in f["dims"].items()}} for f in found],
            {"attn_out"},
        ),
    ],
    ids=["as it is", "ranks exchanged", "sums taken for wholes"],
)
def test_its_own_ranks_are_put_together_as_it_says(bench, tmp_path, change, blamed):
    """Catches parts put together in any order, and partial sums that are believed whole."""
    case, there = bench.case(), of(Told, change=change)
    there.load(case)
    judgement = judge(case, joined(there, case, {"tp": 2}, tmp_path))
    culprits = {f.tap.rpartition("/")[2] for f in judgement.culprits}
    assert (judgement.verdict == "DIVERGES") == bool(blamed) and blamed <= culprits, culprits


def test_ranks_that_do_not_all_answer_are_refused(bench, tmp_path):
    """Catches one rank's answer taken for all of them, and axes that nobody has."""
    case, there = bench.case(), of(Told, change=lambda found: found[:1])
    there.load(case)
    with pytest.raises(SpecError, match="1 ranks answered; 2 were asked for"):
        joined(there, case, {"tp": 2}, tmp_path)
    with pytest.raises(SpecError, match="axes cp"):
        there.call("ranks", case.tokens, axes={"cp": 2})


def test_experts_over_ranks_are_cut_as_a_reader_would(bench):
    """Catches experts of another rank kept, shared experts counted twice. The oracle is a loop over names."""
    from refimpl.conformance.parallel import parts

    case = bench.case()
    cuts = list(parts(case, "experts", 2))
    for name, w in case.weights().items():
        held = [np.asarray(cut.weights[name], np.float32) for cut in cuts]
        if ".experts." in name and "down_proj" in name:
            home = int(name.split(".experts.")[1].split(".")[0]) >= 8
            assert held[home].any() and not held[not home].any(), name
        elif "shared_experts.down_proj" in name:
            assert held[0].any() and not held[1].any()
        else:
            assert all(np.array_equal(x, np.asarray(w, np.float32)) for x in held), name


# ---- What comes with us


def test_what_comes_with_us_is_there_and_its_exceptions_have_reasons():
    """Catches a name that leads nowhere, an exception without a reason, one of a claim that there is not, a profile of none."""
    from .test_conformance import ids

    known = {line.split()[0] for line in ids()}
    for name, shipped in SHIPPED.items():
        assert set(profiles_of(name)) <= set(PROFILES) and bool(shipped.impl) != bool(shipped.command), name
        entries = listed(shipped.known.read_text()) if shipped.known else {}
        assert bool(entries) == (shipped.known is not None) and not unreasoned(entries.items()), name
        assert {entry.partition("@")[0] for entry in entries} <= known, name
    assert profiles_of("my.port:Impl") == PROFILES


@pytest.mark.parametrize("name", ["float32", "bf16", "fp8", "ranks"])
def test_our_own_are_made_by_name(name):
    """Catches a short name that makes something else."""
    found = subject(name)
    assert found.precision["storage"] == {"bf16": "bfloat16", "fp8": "fp8"}.get(name, "float32")
    assert hasattr(found.impl, "ranks") == (name == "ranks")


def test_a_plans_bfloat16_values_are_told_from_float32s(bench):
    """Catches taps of an FP8 run, which come as float32 arrays, held to float32's roundings."""
    case = bench.case()
    half = np.arange(64, dtype=np.float32).reshape(8, 8)
    wide = half / 3
    trace = of(Impl).trace(case, {"L0/attn_norm": half})
    assert trace.taps["fwd/L0/attn_norm"].dtype == np.float32
    fp8 = subject("fp8").trace(case, {"L0/attn_norm": half, "L0/resid": wide, "dims": {"L0/attn_norm": "B D"}})
    assert [str(fp8.taps[f"fwd/L0/{t}"].dtype) for t in ("attn_norm", "resid")] == ["bfloat16", "float32"]
    assert fp8.header.dims == {"fwd/L0/attn_norm": "B D"}


@pytest.mark.slow
def test_a_known_failure_is_named_by_its_run_and_may_be_of_a_profile_that_is_not_asked_for(tmp_path, monkeypatch):
    """Catches an exception for one run that hides the others of its claim, and one of another profile that is called stale."""
    monkeypatch.setenv("PYTHONPATH", str(Path(refimpl.__file__).parent.parent))
    known = tmp_path / "known.txt"
    known.write_text("RN-008@-3.0  # R02\nRN-010  # of another profile\n")
    out = tmp_path / "r.json"
    words = [
        "--quick",
        "--profile",
        "core",
        "--xfails",
        str(known),
        "--json",
        str(out),
        "refimpl.conformance.mutated:R02",
    ]
    assert main(["conform", *words, "--pytest", "-k 'share_means or later'"]) == 0
    told = json.loads(out.read_text())
    assert told["stale"] == [] and [o["state"] for o in told["outcomes"]] == ["passed", "known", "passed"]
