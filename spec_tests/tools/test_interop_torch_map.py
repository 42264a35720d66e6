"""Torch models through a tap map: transformers, and one of one's own. torchtitan's verdicts: test_interop_adapters.py."""

import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.cli import main
from refimpl.diff import Case, Trace
from refimpl.diff.judge import judge
from refimpl.record import hf, suggest, torch_map
from refimpl.record.candidate import Candidate
from refimpl.record.hf_bugs import injected
from refimpl.record.tapmap import parsed, read

from .test_refimpl_tap import TINY


@pytest.fixture(scope="module", autouse=True)
def _torch():
    pytest.importorskip("torch", reason="comes with the extra 'torch'; CI runs these tests with it")


@pytest.fixture
def case():
    return Case.read(TINY)


@pytest.fixture
def transformers_(case):
    pytest.importorskip("transformers", reason="comes with the extra 'interop'; CI runs these tests with it")
    with torch_map.built(case, read("transformers").build) as made:
        yield made


def culprits(made, case, name):
    """The stages that the diff blames, and the judgement."""
    found = judge(case, torch_map.trace_of(made, case, read(name)))
    return {f.tap for f in found.culprits}, found


# ---- transformers


def test_transformers_conforms_and_shows_the_map_what_it_shows_its_own_recorder(case, transformers_, tmp_path):
    """Catches a place of the map that holds something else: bit for bit what `record hf` sees, but for the mask's lowest number."""
    trace = torch_map.trace_of(transformers_, case, read("transformers"))
    full = Trace.read(hf.record(TINY, tmp_path / "hf"))
    assert set(trace.taps) == set(trace.header.expected) and len(trace.taps) == 79
    for tap in set(trace.taps) - {"fwd/mask"}:
        theirs = np.asarray(full.taps[tap])
        turned = trace.header.dims.get(tap) == "B H S Dr"
        theirs = theirs.transpose(0, 2, 1, 3) if turned else theirs
        np.testing.assert_array_equal(trace.taps[tap].ravel(), theirs.ravel(), err_msg=tap)
    assert trace.header.self_check == {"logits_taps_off_vs_on": 0.0, "repeat": 0.0}
    assert judge(case, trace).verdict == "CONFORMS"


@pytest.mark.parametrize(("bug", "stage"), [("R01", "router.weights"), ("A04", "mla.probs"), ("R09", "moe.routed")])
def test_faults_of_transformers_are_placed(bug, stage, case, transformers_):
    """Catches a map whose taps are too few or too far apart to place a fault."""
    with injected(transformers_.module, bug):
        blamed, _ = culprits(transformers_, case, "transformers")
    assert {tap.rpartition("/")[2] for tap in blamed} == {stage}


def test_recording_twice_gives_the_same_file(transformers_, tmp_path):
    """Catches an unordered set in the header; by the map, whose recording is not that of `record hf`."""
    for out in ("a", "b"):
        assert main(["record", "torch", str(TINY), "-o", str(tmp_path / out), "--map", "transformers"]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# ---- torchtitan


def test_building_torchtitan_leaves_it_as_it_was(case):
    """Catches FlexAttention replaced for good in a process that goes on."""
    attention = pytest.importorskip(
        "torchtitan.models.common.attention", reason="comes with the extra 'torchtitan'; CI runs these tests with it"
    )
    before = attention.FlexAttention.forward
    with torch_map.built(case, read("torchtitan").build):
        assert attention.FlexAttention.forward is not before
    assert attention.FlexAttention.forward is before


def test_one_mscale_is_not_taken_for_another(case):
    """Catches a setting that is passed over: torchtitan has one mscale, the config two."""
    from refimpl.layers.config import Config
    from refimpl.record.build_torchtitan import supported

    rope = case.config.to_dict()["rope_scaling"] | {"mscale": 0.5, "mscale_all_dim": 1.0}
    with pytest.raises(SpecError, match="torchtitan has one mscale"):
        supported(Config.from_dict(case.config.to_dict() | {"rope_scaling": rope}))


# ---- A model of one's own


def _small(case, **changes):
    """Embedding, one norm and a head, as torch modules that hold the case's weights."""
    import torch

    from refimpl.record.torch_arrays import to_torch

    w = {n: to_torch(x).float() for n, x in case.weights().items()}

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding.from_pretrained(w["model.embed_tokens.weight"])
            self.head = torch.nn.Linear(case.config.hidden_size, case.config.vocab_size, bias=False)
            self.head.weight.data = w["lm_head.weight"]

        def forward(self, tokens):
            return self.head(torch.nn.functional.relu(self.table(tokens)))

    return Small()


def test_a_model_that_is_mostly_missing_is_recorded_and_said_to_be(case):
    """Catches a recorder that refuses what it was made for: functions that are never called stay expected and are listed."""
    text = "[taps]\nembed = 'table'\nlogits = 'head'\n'final_norm' = 'relu in head'\nmask = 'softmax in table'"
    trace = torch_map.trace_of(Candidate(_small(case)), case, parsed(text, "mine"))
    assert set(trace.taps) == {"fwd/embed", "fwd/logits"}
    assert set(trace.header.expected) - set(trace.taps) == {"fwd/final_norm", "fwd/mask"}
    assert "fwd/final_norm was not seen at relu in head" in trace.header.notes
    assert "weights: those of the case's files" in trace.header.notes


def test_a_module_that_layers_share_is_seen_in_each_of_them(case):
    """Catches the first layer's call taken for every layer's (vLLM's layers share their rotary embedding), a path that counts as
    missing, and layers lost because they lie in two lists.
    """
    import torch

    class Layer(torch.nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.rope = shared

        def forward(self, x):
            return self.rope(x) + 1

    shared = torch.nn.Linear(1, 1, dtype=torch.float32)
    model = torch.nn.Sequential(torch.nn.Module(), *[Layer(shared) for _ in range(3)])
    model.forward = lambda tokens: model[3](model[2](model[1](tokens[..., None].float())))
    model[0].layers = torch.nn.ModuleList(list(model)[1:])
    text = "layer = '0.layers.i'\n[taps]\n'mla.q_rope' = 'rope'\nresid = '0.layers.i'"
    trace = torch_map.trace_of(Candidate(model), case, parsed(text, "mine"))
    for i in range(3):
        rope, resid = trace.taps[f"fwd/L{i}/mla.q_rope"], trace.taps[f"fwd/L{i}/resid"]
        np.testing.assert_array_equal(rope + 1, resid)
    assert len({trace.taps[f"fwd/L{i}/resid"].tobytes() for i in range(3)}) == 3


def test_what_a_model_raises_is_said_of_it(case):
    """Catches a stranger's exception that is called a bug of ours, and one of ours that is called a stranger's."""
    import torch

    class Failing(torch.nn.Module):
        def forward(self, tokens):
            raise KeyError("n_group")

    model = torch.nn.Sequential(torch.nn.Linear(1, 1), Failing())
    with pytest.raises(SpecError, match=r"mine raises RuntimeError: .* \(torch/nn/modules/linear\.py:\d+\)"):
        torch_map.trace_of(Candidate(model), case, parsed("name = 'mine'\n[taps]\nlogits = '1'", "mine"))


def test_no_hook_outlives_a_recording(case):
    """Catches hooks left on the user's model."""
    model = _small(case)
    torch_map.trace_of(Candidate(model), case, parsed("[taps]\nembed = 'table'\nlogits = 'head'", "mine"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_module_that_the_model_lacks_is_refused_with_what_it_has(case):
    """Catches a map of another version, which would only show as taps that were not seen."""
    with pytest.raises(
        SpecError, match=r"Small has no module 'tabel', where the map looks for fwd/embed; the model has head, table"
    ):
        torch_map.trace_of(Candidate(_small(case)), case, parsed("[taps]\nembed = 'tabel'", "mine"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--map", "nowhere.toml"], "cannot be read"),
        (["--map", "vllm"], "does not say how to make the model"),
        (["--map", "vllm", "--build", "json"], "expected pkg.mod:fn"),
        (["--map", "vllm", "--build", "nowhere.at:all"], "No module named 'nowhere'"),
        (["--map", "vllm", "--build", "json:nothing"], "has no attribute 'nothing'"),
        (["--map", "vllm", "--build", "builtins:str"], "gave str, not a torch module"),
        (["--map", "vllm", "--build", "json:dumps"], "--build json:dumps raises TypeError"),
        (["--map", "vllm", "--build", "brokenbuild:fn"], "brokenbuild cannot be imported: ZeroDivisionError"),
    ],
)
def test_the_command_refuses(words, complaint, tmp_path, capsys, monkeypatch):
    """Catches a traceback where a sentence was needed, a user's exception called a bug of ours, a file written all the same."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "brokenbuild.py").write_text("1 / 0")
    assert main(["record", "torch", str(TINY), "-o", str(tmp_path / "t"), *words]) == 3
    assert complaint in capsys.readouterr().err and not (tmp_path / "t").exists()


def test_suggestions_find_the_map_of_a_model_that_is_right(case, transformers_):
    """Catches entries proposed for the wrong tap. The oracle is the map that was written by hand: where both name a module's
    own output it is the same module, or one that holds the same bits.
    """
    found = suggest.suggest(transformers_, case)
    text = suggest.as_toml(found, "proposed")
    trace = torch_map.trace_of(transformers_, case, parsed(text, "proposed"))
    by_hand = torch_map.trace_of(transformers_, case, read("transformers"))
    assert len(found) >= 27
    for tap in set(trace.taps) & set(by_hand.taps):
        if tap.endswith("router.weights"):
            continue
        np.testing.assert_array_equal(trace.taps[tap].ravel(), by_hand.taps[tap].ravel(), err_msg=tap)


def test_a_suggestion_prefers_what_a_module_gives_to_what_goes_into_one(case):
    """Catches the shortest text chosen, which names the reader of a tensor, not its maker; and a tap that nothing holds."""
    import torch

    from refimpl.record.torch_arrays import to_torch

    table = torch.nn.Embedding.from_pretrained(to_torch(case.weights()["model.embed_tokens.weight"]).float())
    model = torch.nn.Sequential()
    model.add_module("the_embedding_of_all_tokens", table)
    model.add_module("h", torch.nn.Tanh())
    assert suggest.suggest(Candidate(model), case) == {"embed": ("the_embedding_of_all_tokens", "also input of h")}
