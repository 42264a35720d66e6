"""Tap maps: their grammar, what is refused, and how a map's places become taps. No framework is needed: calls are made up."""

import re
import sys

import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.cli import main
from refimpl.diff import Case
from refimpl.diff.names import frameworks, shipped
from refimpl.layers.stage import STAGES
from refimpl.record.hf_probes import expected_taps
from refimpl.record.tapmap import Part, at_layer, parsed, places, read, untested
from refimpl.record.watch import Watch

from .test_refimpl_tap import TINY
from .tree import ROOT, in_repository, project


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("norm", [Part("norm")]),
        ("input of a.w2", [Part("a.w2", input=True)]),
        ("input 3 of layers.i", [Part("layers.i", input=True, arg="3")]),
        ("input mask of layers.i", [Part("layers.i", input=True, arg="mask")]),
        ("moe.router[1]", [Part("moe.router", item="1")]),
        ("mlp.topk[topk_ids]", [Part("mlp.topk", item="topk_ids")]),
        ("q-i #3", [Part("q-i", nth=3)]),
        ("softmax in attn", [Part("attn", function="softmax")]),
        ("input of topk in mlp.gate #2", [Part("mlp.gate", function="topk", nth=2, input=True)]),
        ("topk in mlp.gate #2[1]", [Part("mlp.gate", function="topk", nth=2, item="1")]),
        ("fc1[0][..., F:]", [Part("fc1", item="0", cut=("F", ""))]),
        ("fc1[..., :Dn+Dr]", [Part("fc1", cut=("", "Dn+Dr"))]),
        ("layers.i[0] + layers.i[1]", [Part("layers.i", item="0"), Part("layers.i", item="1")]),
        ("cat(a[..., :F], b)", [Part("a", cut=("", "F")), Part("b")]),
    ],
)
def test_a_place_is_read_as_it_is_written(entry, parts):
    """Catches a word of the grammar that is taken for a part of a path."""
    (place,) = places(entry)
    assert list(place.parts) == parts and place.join == ("cat" if entry.startswith("cat") else "sum")


def test_alternatives_and_axes():
    """Catches axes that go to the wrong alternative, and parentheses of cat taken for axes."""
    first, second = places("a.b (S B D) | cat(c, d) (B H T Dn+Dv)")
    assert (first.axes, second.axes, len(second.parts)) == ("S B D", "B H T Dn+Dv", 2)


@pytest.mark.parametrize(
    ("below", "path", "i", "found"),
    [
        ("model.layers.i", "mlp.gate", 3, "model.layers.3.mlp.gate"),
        ("layers.i", "layers.i", 0, "layers.0"),
        ("", "q_pe-i", 11, "q_pe-11"),
        ("layers.i", "norm", None, "norm"),
        ("layers.i", "input_i.mini", 2, "layers.2.input_i.mini"),
    ],
)
def test_the_letter_i_is_the_layers_number_only_where_it_stands_alone(below, path, i, found):
    """Catches an i within a word replaced, and a layer's own path put below itself."""
    assert at_layer(path, below, i) == found


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[taps", "not TOML"),
        ("name = 'x'", r"no \[taps\]"),
        ("[taps]\n'mla.qq' = 'a'", "'mla.qq' is no tap"),
        ("[taps]\nembed = 'a b'", "'a b' is not a place"),
        ("[taps]\nembed = 'a[..., :Z]'", "no axis is called Z"),
        ("[taps]\nembed = 3", "expected a dict of texts"),
        ("tested = '1.0'\n[taps]\nembed = 'a'", "tested is '1.0'; expected a list of texts"),
        ("colour = 'red'\n[taps]\nembed = 'a'", "unknown keys: colour"),
        ("key = 'mine'\n[taps]\nembed = 'a'", "unknown keys: key"),
    ],
)
def test_a_map_that_cannot_be_meant_is_refused(text, complaint):
    """Catches a typing error that would only show as a tap that was never seen."""
    with pytest.raises(SpecError, match=complaint):
        parsed(text, "mine")


def test_a_map_is_a_file_or_the_name_of_one_that_is_shipped(tmp_path):
    """Catches a file that loses to a shipped map of its name, and a missing one passed over."""
    assert read("torchtitan").key == read("torchtitan.toml").key == "torchtitan"
    (tmp_path / "torchtitan.toml").write_text("[taps]\nembed = 'mine'")
    assert read(str(tmp_path / "torchtitan.toml")).taps == {"embed": "mine"}
    with pytest.raises(SpecError, match=r"cannot be read.*shipped are deepseek, .*torchtitan"):
        read("nowhere.toml")


@pytest.mark.parametrize("name", [f.key for f in frameworks()])
def test_the_shipped_maps_are_maps(name):
    """Catches an entry that the recorder cannot read, a tap told twice, a map that says it is tested and not of what."""
    map_ = parsed(shipped(name), name)
    assert map_ == read(name)
    assert not set(map_.taps) & set(map_.words) and set(map_.words) <= {s.tap for s in STAGES.values()}
    assert map_.version and (map_.package or not map_.tested)


def test_the_map_of_transformers_and_its_recorder_speak_of_the_same_taps():
    """Catches a tap that one of the two has and the other has not."""
    f, c = read("transformers"), Case.read(TINY).config
    assert set(f.taps) | set(f.words) == {tap.rpartition("/")[2] for tap in expected_taps(c)}


def test_versions_outside_the_tested_ones_are_warned_of():
    """Catches 0.30 taken for 0.3, a map that nobody has run and that does not say so, and one of the user's own, which is being
    run, called one that never was.
    """
    titan = read("torchtitan")
    assert untested(titan, "0.3.0") == untested(titan, "0.3") == ""
    assert untested(titan, "0.30.1") == "warning: torchtitan 0.30.1: the map torchtitan was tested with 0.3"
    assert "never run" in untested(read("vllm"), "1.0")
    assert "run on a stand-in" in untested(read("deepseek"), "")
    assert untested(parsed("[taps]\nembed = 'a'", "vllm"), "") == ""
    mine = parsed("package = 'mine'\ntested = ['1']\n[taps]\nembed = 'a'", "mine")
    assert "mine 2.0: the map mine was tested with 1" in untested(mine, "2.0")


# ---- From calls to taps


def watch(text, case=None):
    return Watch(parsed(f"layer = 'layers.i'\n[taps]\n{text}", "mine"), case or Case.read(TINY))


def test_parts_are_summed_cut_and_joined():
    """Catches a sum in bfloat16, a slice of the wrong axis, halves in the wrong order, another layer's tensor."""
    import ml_dtypes

    w = watch("""
resid = "layers.i[0] + layers.i[1] + layers.i[0]"
"mlp.gate" = "fc1[..., :F]"
"mlp.up" = "fc1[..., F:]"
"mla.kv_b" = "cat(k, v) (B H T Dn+Dv)"
""")
    c, rng = Case.read(TINY).config, np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 24, c.hidden_size)).astype(ml_dtypes.bfloat16) for _ in range(2))
    both = rng.normal(size=(2, 24, 2 * c.intermediate_size))
    k, v = (rng.normal(size=(2, 4, 24, n)) for n in (c.qk_nope_head_dim, c.v_head_dim))
    w.see(("layers.2", ""), [], {}, (a, b))
    w.see(("layers.0.fc1", ""), [], {}, both)
    w.see(("layers.1.k", ""), [], {}, k)
    w.see(("layers.1.v", ""), [], {}, v)
    taps = w.taps()
    assert set(taps) == {"fwd/L2/resid", "fwd/L0/mlp.gate", "fwd/L0/mlp.up", "fwd/L1/mla.kv_b"}
    exact = 2 * a.astype(np.float64) + b.astype(np.float64)
    np.testing.assert_array_equal(taps["fwd/L2/resid"], exact.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(np.concatenate([taps["fwd/L0/mlp.gate"], taps["fwd/L0/mlp.up"]], -1), both)
    np.testing.assert_array_equal(taps["fwd/L1/mla.kv_b"][..., c.qk_nope_head_dim :], v)
    assert w.axes == {"fwd/L1/mla.kv_b": "B H T Dn+Dv"}


def test_only_the_layers_that_have_a_tap_are_looked_at():
    """Catches the dense layer's feed-forward looked for in layers with experts, which would refuse every model."""
    assert set(watch("'mlp.gate' = 'w1'\n'router.ids' = 'gate'").places) == {
        "fwd/L0/mlp.gate",
        "fwd/L1/router.ids",
        "fwd/L2/router.ids",
    }


def test_the_nth_call_and_what_was_called_too_often():
    """Catches the last call taken for the first, and a second run of a module that nobody hears of."""
    w = watch("'mla.q_rope' = 'rope'\n'mla.k_rope' = 'rope #2'\nembed = 'emb'\nresid = 'layers.i'")
    for i in range(3):
        w.see(("layers.0.rope", ""), [], {}, np.full((2, 24, 4), i))
        w.see(("layers.1", ""), [], {}, np.full((2, 24, 4), i))
    w.see(("emb", ""), [], {}, np.ones(1))
    taps = w.taps()
    assert taps["fwd/L0/mla.q_rope"].max() == 0 and taps["fwd/L0/mla.k_rope"].min() == 1
    assert taps["fwd/L1/resid"].max() == 0
    assert w.repeated() == ["called more than once, the first call is kept: layers.i"]


def test_what_was_not_seen_or_is_something_else_is_a_note_and_never_an_error():
    """Catches a recorder that refuses the model it was to judge."""
    w = watch("embed = 'emb[1]'\nlogits = 'head'\n'final_norm' = 'norm (B S D)'\n'router.ids' = 'gate[ids]'")
    w.see(("emb", ""), [], {}, np.ones(3))  # an array, not several results
    w.see(("norm", ""), [], {}, np.ones((5, 7)))  # another size than the map says
    w.see(("layers.1.gate", ""), [], {}, {"other": 1})
    taps, notes = w.taps(), "\n".join(w.notes)
    assert set(taps) == {"fwd/final_norm"} and taps["fwd/final_norm"].shape == (5, 7)
    for said in ("emb[1] is not there", "fwd/logits was not seen at head", "(5, 7), where the map says B S D", "'ids'"):
        assert said in notes


def test_alternatives_are_chosen_by_what_the_model_has():
    """Catches a path that no module has and that only shows as a tap that was not seen."""
    w = watch("ffn_out = 'moe | mlp'")
    has = {"layers.0", "layers.0.mlp", "layers.1.moe", "layers.2.moe"}
    w.choose(has.__contains__, has, "Model")
    assert {k[0] for k in w.keys} == {"layers.0.mlp", "layers.1.moe", "layers.2.moe"}
    with pytest.raises(SpecError, match=r"Model has no module 'layers.0.mlp', .* fwd/L0/ffn_out; layers.0 has ffn"):
        watch("ffn_out = 'moe | mlp'").choose(lambda p: False, ["layers.0", "layers.0.ffn"], "Model")


# ---- The command


def test_the_command_lists_and_shows(capsys):
    """Catches a list that hides what was never run, and a map printed as something other than its file."""
    assert main(["map", "list"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert " tested " in rows["torchtitan"] and " untested " in rows["vllm"] and len(rows) == len(frameworks())
    assert main(["map", "show", "torchtitan"]) == 0 and capsys.readouterr().out == shipped("torchtitan")
    assert main(["map", "show", "nothing"]) == 3 and "no shipped map" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "module", "extra"),
    [
        (["torch", "--map", "torchtitan"], "torch", "torchtitan"),
        (["torch", "--map", "megatron"], "torch", "megatron"),
        (["torch", "--map", "transformers"], "torch", "interop"),
        (["torch", "--map", "vllm", "--build", "json:dumps"], "torch", "torch"),
        (["mlx"], "mlx.core", "mlx"),
        (["llamacpp"], "llama_cpp", "llamacpp"),
    ],
)
def test_an_absent_framework_is_told_with_the_extra_that_brings_it(words, module, extra, monkeypatch, tmp_path, capsys):
    """Catches a traceback of an import, and an extra that does not bring the framework of a shipped map."""
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["record", words[0], str(TINY), "-o", str(tmp_path / "t"), *words[1:]]) == 3
    assert f"pip install 'deepseek-v3-refimpl[{extra}]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@in_repository
def test_the_extras_that_are_told_exist():
    """Catches an extra that an adapter names and nobody can install."""
    source = "".join([file.read_text(encoding="utf-8") for file in (ROOT / "refimpl" / "record").glob("*.py")])
    told = set(re.findall(r'library\("[\w.]+", "(\w+)"\)', source))
    assert (
        {"interop", "torch", "mlx", "llamacpp", "gguf", "torchtitan", "megatron", "text"}
        == told
        <= set(project()["project"]["optional-dependencies"])
    )
