"""docs/taps.md and `refimpl taps`: what people who write traces by hand go by. Everything on it is true of a run."""

import dataclasses
import json
import re

import numpy as np
import pytest

from refimpl.cli import main
from refimpl.diff import Case, Trace, judge
from refimpl.diff.dims import Sizes, shape_of
from refimpl.diff.names import frameworks
from refimpl.layers import PRESETS, STAGES, Recorder, observing
from refimpl.layers.precision import FLOAT32
from refimpl.model import ForCausalLM, effective, introduce
from refimpl.model.phases import parts_of
from refimpl.record import catalogue, catalogue_text, trace_case
from refimpl.record.make_case import draw_weights

from .tree import ROOT, in_repository

CASE = "refimpl/cases/tiny"
CONFIGS = {
    "mtp": PRESETS["tiny"].replace(num_nextn_predict_layers=2),
    "plain": PRESETS["tiny"].replace(
        q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2, num_nextn_predict_layers=0
    ),
    "dense": PRESETS["tiny"].replace(n_routed_experts=0, n_shared_experts=0, num_nextn_predict_layers=1),
    "v2": PRESETS["tiny"].replace(
        topk_method="group_limited_greedy", scoring_func="softmax", num_nextn_predict_layers=0
    ),
}


def page():
    return (ROOT / "docs" / "taps.md").read_text(encoding="utf-8")


def example(mark):
    """The functions that a code block of the page defines."""
    (code,) = re.findall(rf"<!-- example: {mark} -->\n```python\n(.*?)```", page(), flags=re.DOTALL)
    found = {}
    exec(code, found)
    return found


@in_repository
def test_the_page_is_what_the_stages_say():
    """Catches a stage, a shape or a name elsewhere that changed without `refimpl taps --markdown docs/taps.md`."""
    assert catalogue_text.rewritten(page()) == page()


@pytest.mark.parametrize("attend", ["expanded", "absorbed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_entries_are_those_of_a_run_with_weights(name, attend):
    """Catches a shape whose letters mean other numbers, a tap that the shrunken model has not, sources in another order."""
    c = CONFIGS[name]
    model = ForCausalLM.from_weights(c, effective(draw_weights(c, 0), FLOAT32))
    inputs = model.inputs(np.arange(14).reshape(2, 7))
    recorder = introduce(Recorder(), model, inputs)
    with observing(recorder):
        model(inputs, with_mtp=bool(model.n_mtp), attend=attend)
    entries = catalogue.entries(c, batch=2, length=7, attend=attend)
    assert {e.tap: e.shape for e in entries} == {t: a.shape for t, a in recorder.taps.items()}
    experts = re.compile(r"w/.*\.experts\.\d+\..*")  # the shrunken model has fewer of them
    for e, call in zip(entries, recorder.program, strict=True):
        flat = [n for a in call.args for n in (a if isinstance(a, tuple) else [a]) if isinstance(n, str)]
        assert [s for s in e.sources if not experts.fullmatch(s)] == [n for n in flat if not experts.fullmatch(n)]
        assert (e.kind == "float") == (recorder.taps[e.tap].dtype.kind == "f")


def test_the_keys_of_a_decoding_run_are_more_than_its_queries():
    """Catches T taken for S."""
    c = PRESETS["tiny"]
    program, _ = catalogue._forward(catalogue.smallest(c), n_mtp=0, attend="expanded")
    (scores,) = [call for call in program if call.tap == "fwd/L1/mla.scores"]
    step = dataclasses.replace(scores, tap="dec8/L1/mla.scores")
    assert shape_of(step, c, Sizes(3, parts_of(["fwd", "dec8"], 9))) == (3, c.num_attention_heads, 1, 9)


def test_every_stage_is_on_the_page_with_what_it_reads():
    """Catches a stage that no run of the catalogue calls, and sources that are names of nothing."""
    entries = catalogue.everything()
    assert [e.stage.name for e in entries] == list(STAGES)
    taps = {s.tap for s in STAGES.values()}
    loose = {"tokens", "positions", "valid", "documents", "labels"}
    for e in entries:
        if not e.tap.startswith(("int8.", "variant.")):
            assert e.sources, e.tap
            assert all(s in taps | loose or s.endswith(("weight", "bias")) for s in e.sources), (e.tap, e.sources)


def test_sixty_one_layers_are_described_in_a_moment():
    """Catches a catalogue that builds the model it describes."""
    entries = catalogue.entries(PRESETS["deepseek-v3"], batch=1, length=4)
    shapes = {e.tap: e.shape for e in entries}
    assert shapes["fwd/L60/mla.q"] == (1, 4, 128, 192) and shapes["fwd/L60/moe.gate"] == (32, 2048)
    assert shapes["fwd/mtp1/logits"] == (1, 3, 129280)


def test_names_elsewhere_are_of_taps_that_exist():
    """Catches a misspelt tap in elsewhere/*.toml, which no table row would show."""
    taps = {s.tap for s in STAGES.values()}
    known = frameworks()
    assert [f.name for f in known] == [
        "transformers",
        "DeepSeek inference",
        "llama.cpp",
        "Megatron",
        "mlx-lm",
        "SGLang",
        "torchtitan",
        "vLLM",
    ]
    for f in known:
        assert f.taps and set(f.taps) | set(f.words) <= taps, f.name


@in_repository
def test_the_numpy_example_writes_a_trace_that_conforms(tmp_path):
    """Catches a page that nobody could have followed: the code as printed, fed with our own run, judged by the diff."""
    case = Case.read(ROOT / CASE)
    ours = trace_case(case)
    example("numpy")["write_trace"](
        tmp_path / "t.safetensors", ours.taps, case.raw_config, case.tokens, dict(case.weights())
    )
    found = judge.judge(case, Trace.read(tmp_path / "t.safetensors"))
    assert found.verdict == "CONFORMS" and len(found.findings) == len(ours.taps)


@in_repository
def test_the_command_prints_a_case_with_its_sizes(capsys):
    """Catches a table without the sizes, a pattern that is ignored, JSON that is not."""
    assert main(["taps", str(ROOT / CASE), "--pattern", "L1/router.*,logits"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["fwd/L1/router.logits", "fwd/L1/router.scores"]
    assert "2x24x16" in lines[1] and lines[-1].startswith("fwd/logits") and "2x24x128" in lines[-1]
    assert main(["taps", str(ROOT / CASE), "--json", "--pattern", "L2/router.ids"]) == 0
    (tap,) = json.loads(capsys.readouterr().out)["taps"]
    assert (tap["shape"], tap["dtype"], tap["compare"]) == ([2, 24, 4], "ids", "set")
    assert tap["from"] == ["fwd/L2/router.choice", "fwd/L2/router.groups"]
    assert tap["elsewhere"]["llama.cpp"] == "ffn_moe_topk-i"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--pattern", "L9/*"], "no tap matches 'L9/*'"),
        (["nowhere"], "not a folder"),
        (["--markdown", "nowhere.md"], "cannot be read"),
    ],
)
def test_the_command_refuses(words, complaint, capsys):
    """Catches an empty list that looks like an answer."""
    assert main(["taps", *words]) == 3
    assert complaint in capsys.readouterr().err


def test_an_unknown_mark_of_a_page_is_refused(tmp_path, capsys):
    """Catches a table that is never filled because its mark is misspelt; and the page is left as it was."""
    text = "<!-- generated: tapps -->\nold\n<!-- end -->\n"
    (tmp_path / "p.md").write_text(text)
    assert main(["taps", "--markdown", str(tmp_path / "p.md")]) == 3
    assert "no table 'tapps'" in capsys.readouterr().err and (tmp_path / "p.md").read_text() == text
