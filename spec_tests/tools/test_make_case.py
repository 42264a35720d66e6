"""New cases, and the committed one: what they promise is what makes a diff of them mean something."""

import json
import pathlib
import sys

import numpy as np
import pytest

import refimpl
from refimpl.autograd.errors import SpecError
from refimpl.cli import main
from refimpl.diff import Case, Trace
from refimpl.layers.presets import PRESETS
from refimpl.model import expected_tensors
from refimpl.record import hf
from refimpl.record.make_case import draw_weights, margins, new_case
from refimpl.spec_tests.oracles.model import forward

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
SMALL = PRESETS["tiny"].replace(num_hidden_layers=2)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def closest(choice, c):
    """By how much the closest decision of one token was won: its biased scores sorted, group by group."""
    size = len(choice) // c.n_group
    group = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(c.n_group)]
    order = sorted(range(c.n_group), key=lambda g: group[g], reverse=True)
    inside = sorted((choice[e] for e in range(len(choice)) if e // size in order[: c.topk_group]), reverse=True)
    gaps = [inside[c.num_experts_per_tok - 1] - inside[c.num_experts_per_tok]]
    if c.topk_group < c.n_group:
        gaps.append(group[order[c.topk_group - 1]] - group[order[c.topk_group]])
    return min(gaps)


def test_the_committed_case_is_what_its_command_writes(tmp_path):
    """Catches a case edited by hand, and a generator that has come to draw other numbers. (NumPy's policy lets the
    stream of standard_normal change one day: then this test goes and the case stays.)
    """
    new_case(tmp_path, PRESETS["tiny"], seed=1)
    assert contents(tmp_path) == {name: (TINY / name).read_bytes() for name in contents(tmp_path)}


def test_a_seed_is_a_case(tmp_path):
    """Catches a generator with a memory, and a seed that is ignored."""
    a, b, c = (
        contents(new_case(tmp_path / name, SMALL, seed=s, length=5)) for name, s in (("a", 1), ("b", 1), ("c", 2))
    )
    assert a == b
    assert [a[name] == c[name] for name in ("config.json", "weights.safetensors", "tokens.json")] == [
        True,
        False,
        False,
    ]


def test_every_decision_is_won_by_the_margin():
    """Catches routing that rounding decides, which would make a right port look wrong: in the oracle's run of the
    committed case every token's closest decision is won by 0.11, and `margins` says the same.
    """
    case = Case.read(TINY)
    taps = forward(case.raw_config | {"rope_theta": 10000.0}, case.weights(), case.tokens)
    ours = margins(Trace.read(TINY / "hf-float32.safetensors").taps, case.config)
    layers = [taps[f"fwd/L{i}/router.choice"] for i in (1, 2)]
    naive = np.min([[[closest(list(t), case.config) for t in row] for row in a] for a in layers], axis=0)
    np.testing.assert_allclose(ours, naive, atol=1e-5)  # sigmoids of float32 logits of size 2
    assert naive.min() > 0.11


def test_bfloat16_makes_the_same_decisions_as_float32():
    """Catches a case too close to call, whose bfloat16 recording could be excused but not judged; and one that leaves
    an expert out, whose weights could then be anything.
    """
    one, other = (Trace.read(TINY / f"hf-{name}.safetensors").taps for name in ("float32", "bfloat16"))
    for tap in one:
        if tap.endswith(("router.ids", "router.groups")):
            np.testing.assert_array_equal(np.sort(one[tap]), np.sort(other[tap]))
            assert len(np.unique(one[tap])) == (16 if tap.endswith("ids") else 4)


def test_the_bug_of_the_committed_bug_trace_shows():
    """Catches a case in which the recorded bug stays within rounding."""
    right, wrong = (Trace.read(TINY / f"hf-{name}.safetensors").taps["fwd/logits"] for name in ("float32", "bug"))
    assert np.abs(right - wrong).max() > 0.05 * right.std()


def test_weights_are_spread_as_described_and_representable():
    """Catches weights so small that mistakes hide in the tolerance, and weights that a bfloat16 run would round."""
    config = PRESETS["tiny"].replace(attention_bias=True)
    weights = draw_weights(config, 3)
    assert {n: w.shape for n, w in weights.items()} == expected_tensors(config)
    spread = {"norm.weight": 0.2, "gate.weight": 0.25, "correction_bias": 0.15, ".bias": 0.3, "embed_tokens.weight": 1}
    for name, w in weights.items():
        w32 = w.astype(np.float32)
        assert not (w32.view(np.uint32) & 0xFFFF).any(), name
        assert w.dtype.name == ("float32" if name.endswith("correction_bias") else "bfloat16")
        deviation = next((s for end, s in spread.items() if name.endswith(end)), 1.3 / np.sqrt(w.shape[-1]))
        center = 1 if name.endswith("norm.weight") else 0
        n = w.size  # five standard errors of the mean and of the standard deviation
        assert abs(w32.mean() - center) < 5 * deviation / np.sqrt(n), name
        assert abs(w32.std() / deviation - 1) < 5 / np.sqrt(2 * n), name
    bias = weights["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert (bias > 0).any() and (bias < 0).any()


def test_mtp_layers_only_when_asked_for(tmp_path):
    """Catches a case whose MTP weights another implementation ignores and the weights gate then misses."""
    for mtp in (False, True):
        case = Case.read(new_case(tmp_path / str(mtp), SMALL, length=4, mtp=mtp))
        assert case.config.num_nextn_predict_layers == mtp
        assert ("model.layers.2.eh_proj.weight" in case.weights()) == mtp


def test_a_model_without_experts_has_no_margins_to_keep(tmp_path):
    """Catches a search that waits for router taps of a dense model."""
    case = Case.read(new_case(tmp_path, SMALL.replace(first_k_dense_replace=2), batch=3, length=4))
    assert np.shape(case.tokens) == (3, 4)


def test_an_impossible_margin_is_refused_and_nothing_written(tmp_path):
    """Catches an endless search, and half a case left behind."""
    with pytest.raises(SpecError, match=r"no margin of 0\.9 after 0 tokens; the best is \d\.\de-01"):
        new_case(tmp_path / "case", SMALL, margin=0.9)
    assert not list(tmp_path.iterdir())


def test_the_recorder_without_its_libraries_names_the_extra(monkeypatch, tmp_path):
    """Catches a bare ImportError where `pip install ...[interop]` is the answer."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SpecError, match=r"torch cannot be imported.*deepseek-v3-refimpl\[interop\]"):
        hf.record(TINY, tmp_path / "t.safetensors")


def test_the_files_are_those_of_a_checkpoint():
    """Catches a config.json that Hugging Face would not read, and tokens under another key."""
    config = json.loads((TINY / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and config["rope_scaling"]["type"] == "yarn"
    assert set(json.loads((TINY / "tokens.json").read_text())) == {"tokens"}
    weights = Case.read(TINY).weights()
    assert sum(w.size for n, w in weights.items() if not n.endswith("correction_bias")) == 128_436
    size = sum(p.stat().st_size for p in TINY.iterdir())
    assert size < 3_000_000  # it travels in every wheel


def test_a_place_that_can_hold_no_folder_is_refused(tmp_path):
    """Catches a traceback, called a bug of ours, where a file is in the way."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="cannot be written: Not a directory"):
        new_case(tmp_path / "file" / "case", PRESETS["tiny"])


def test_a_case_that_is_there_is_kept(tmp_path, capsys):
    """Catches a case written over in silence, with which recordings made of it are worth nothing any more, and the command that
    wrote it refused when it comes again.
    """
    out = str(tmp_path / "a")
    assert main(["case", out, "--seed", "1"]) == 0
    before = contents(tmp_path / "a")
    assert main(["case", out, "--seed", "2"]) == 3
    assert "config.json is there already" in capsys.readouterr().err and contents(tmp_path / "a") == before
    assert main(["case", out, "--seed", "1"]) == 0 and contents(tmp_path / "a") == before
    assert main(["case", out, "--seed", "2", "--force"]) == 0 and contents(tmp_path / "a") != before


def test_options_that_make_no_sense_together_are_refused(tmp_path, capsys):
    """Catches a preset that is ignored, and regimes of no name taken for a plain case."""
    config = str(TINY / "config.json")
    for command in (["case", str(tmp_path / "a")], ["cluster"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--config", config, "--preset", "tiny"])
        assert stop.value.code == 3 and "not allowed with" in capsys.readouterr().err
    served = ["case", str(tmp_path / "a"), "--servable", "--from", str(TINY)]
    for option in (["--shrink"], ["--regime", "mscale"], ["--seed", "3"]):
        assert main([*served, *option]) == 3 and f"{option[0]} is for a new case" in capsys.readouterr().err
    for regimes in ("", " , "):
        assert main(["case", str(tmp_path / "a"), "--regime", regimes]) == 3
        assert "names none" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
