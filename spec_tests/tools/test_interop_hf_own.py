"""A modelling file of the user's own: a copy of transformers', edited or not, is filled from the case and judged; what nothing
fills is said.
"""

import inspect
import logging
import pathlib

import pytest

import refimpl
from refimpl.cli.dispatch import main
from refimpl.diff import Case, Trace, render
from refimpl.diff.judge import judge
from refimpl.layers import PRESETS
from refimpl.record import hf, new_case

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
HOME = "transformers.models.deepseek_v3"
SUBCLASS = """
import torch
from transformers import DeepseekV3ForCausalLM


class MineForCausalLM(DeepseekV3ForCausalLM):
    {ignored}

    def __init__(self, config):
        super().__init__(config)
        {more}
        self.post_init()
"""
SINK = "self.model.layers[2].self_attn.sink = torch.nn.Parameter(torch.zeros(config.num_attention_heads))"
ROW = "self.model.norm.weight = torch.nn.Parameter(torch.ones(1, config.hidden_size))"


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="comes with the extra 'interop'; CI runs these tests with it")


@pytest.fixture
def copied(tmp_path):
    """edits (old, new) -> transformers' own file with its imports made absolute, and what a copy of it is told."""
    import transformers.models.deepseek_v3.modeling_deepseek_v3 as original

    def told(*edits, **options):
        source = inspect.getsource(original)
        up_two = (("from ... import", "from transformers import"), ("from ...", "from transformers."))
        for old, new in (*up_two, ("from .", f"from {HOME}."), *edits):
            assert old in source
            source = source.replace(old, new)
        file = tmp_path / "modeling_copied.py"
        file.write_text(source)
        path = hf.record(TINY, tmp_path / "t.safetensors", model=f"{file}:DeepseekV3ForCausalLM", **options)
        trace = Trace.read(path)
        return judge(Case.read(TINY), trace), trace

    return told


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "experts": "grouped_mm", "attention": "sdpa"}])
def test_a_copied_file_conforms(options, copied, caplog):
    """Catches fused experts left as they were initialised, since the loader converts none for code that is not its own; gate and up
    stacked in the other order; a right model said to lack something, by us or by transformers, whose log is then as before.
    """
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    level = log.level
    try:
        found, trace = copied(**options)
    finally:
        log.removeHandler(caplog.handler)
    assert found.verdict == "CONFORMS", render(found)
    assert "initialised" not in trace.header.notes and not caplog.records and log.level == level


def test_a_mistake_in_a_copied_file_is_placed(copied):
    """Catches an edit of a copied file drowned in experts that hold other weights."""
    found, _ = copied(("self.act_fn(gate) * up", "self.act_fn(gate) * up.clamp(-0.5, 0.5)"))
    assert {f.stage for f in found.culprits} == {"moe.act"}, render(found)


@pytest.mark.parametrize(
    ("more", "ignored", "name"),
    [
        (SINK, "", "model.layers.2.self_attn.sink"),
        (SINK, "_keys_to_ignore_on_load_missing = ['sink$', 'embed_tokens']", "model.layers.2.self_attn.sink"),
        (ROW, "", "model.norm.weight"),
    ],
)
def test_what_nothing_fills_is_said(more, ignored, name, tmp_path, capsys):
    """Catches a parameter left at random in silence: without a tensor of its name, kept quiet by its class, or of another shape;
    and one that was loaded said to be so.
    """
    file = tmp_path / "modeling_mine.py"
    file.write_text(SUBCLASS.format(more=more, ignored=ignored))
    assert main(["record", "hf", str(TINY), "-o", str(tmp_path / "t"), "--model", str(file)]) == 0
    said = f"1 parameters of the model have nothing in the case and are as they were initialised: {name}"
    assert said in capsys.readouterr().err and f"{said};" in f"{Trace.read(tmp_path / 't').header.notes};"
    found = judge(Case.read(TINY), Trace.read(tmp_path / "t"))
    assert found.verdict != "CONFORMS"


def test_a_tied_head_is_not_said_to_be_unfilled(tmp_path):
    """Catches the second name of a parameter, which no checkpoint of a tied model holds, taken for a parameter."""
    case = new_case(tmp_path / "case", PRESETS["tiny"].replace(tie_word_embeddings=True), seed=1)
    file = tmp_path / "modeling_mine.py"
    file.write_text(SUBCLASS.format(more="", ignored="_keys_to_ignore_on_load_missing = ['lm_head']"))
    trace = Trace.read(hf.record(case, tmp_path / "t", model=str(file)))
    assert "initialised" not in trace.header.notes and judge(Case.read(case), trace).verdict == "CONFORMS"
