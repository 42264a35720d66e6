"""Dumps that the tools themselves have written: transformers' debugger, and tensors saved by torch."""

import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.diff import Case
from refimpl.diff.judge import judge
from refimpl.record import torch_map
from refimpl.record.dump_sglang import open_dump
from refimpl.record.tapmap import Part, read

from .test_dumps import imported
from .test_refimpl_tap import TINY


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="comes with the extra 'interop'; CI runs these tests with it")


@pytest.mark.parametrize("pruned", [False, True])
def test_transformers_own_debugger_gives_a_trace_that_conforms(pruned, tmp_path):
    """Catches an argument taken for a result, results out of order, and layers lost that the debugger leaves out of its JSON."""
    from transformers.model_debugging_utils import model_addition_debugger_context

    case = Case.read(TINY)
    with torch_map.built(case, read("transformers").build) as made:
        options = {"debug_path": str(tmp_path / "dump"), "use_repr": False, "do_prune_layers": pruned}
        with model_addition_debugger_context(made.module, **options):
            made.call(made.module, case.tokens)
        trace = imported(tmp_path / "dump", tmp_path / "t")
        direct = torch_map.trace_of(made, case, read("transformers"))
    assert len(trace.taps) == 52 and "fwd/L1/router.ids" in trace.taps
    for tap, x in trace.taps.items():
        np.testing.assert_array_equal(x, direct.taps[tap], err_msg=tap)
    assert judge(case, trace).verdict == "CONFORMS"


@pytest.mark.parametrize("wrapped", [False, True], ids=["the tensor", "value and meta"])
def test_tensors_that_torch_has_saved_are_read_and_bfloat16_is_kept(wrapped, tmp_path):
    """Catches the two ways in which SGLang has saved tensors, and a dtype that changes on the way."""
    import torch

    x = torch.randn(48, 16).bfloat16()
    path = tmp_path / "step=0___rank=0___dump_index=1___name=non_intrusive__lm_head.output.pt"
    torch.save({"value": x, "meta": {"name": "lm_head", "world": [1, 2]}} if wrapped else x, path)
    found = open_dump(tmp_path, Case.read(TINY)).find(Part("lm_head"))
    assert found.dtype.name == "bfloat16"
    np.testing.assert_array_equal(found.astype(np.float32), x.float().numpy())


def test_ranks_that_torch_has_saved_tell_their_place(tmp_path):
    """Catches ranks in the order of their files: what torch's restricted reader gives of `meta` says another."""
    import torch

    for rank, x in enumerate(torch.arange(24.0).reshape(2, 6, 2)):
        meta = {
            "world_rank": rank,
            "sglang_parallel_info": {"tp_rank": 1 - rank, "tp_size": 2, "enable_dp_attention": False},
        }
        name = f"step=0___rank={rank}___dump_index=1___name=non_intrusive__a.q_b_proj.output.pt"
        torch.save({"value": x, "meta": meta}, tmp_path / name)
    found = open_dump(tmp_path, Case.read(TINY)).find(Part("a.q_b_proj"))
    np.testing.assert_array_equal(found, [[12 + i, 13 + i, i, 1 + i] for i in range(0, 12, 2)])


def test_a_pt_file_with_code_in_it_is_refused_and_not_run(tmp_path):
    """Catches torch.load without its restriction, and torch's advice to lift it handed on."""
    import torch

    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (ran.write_text, ("run",))

    torch.save({"value": Bomb()}, tmp_path / "step=0___rank=0___dump_index=1___name=logits.pt")
    with pytest.raises(SpecError, match=r"name=logits.pt holds more than tensors: save the tensor alone") as refused:
        open_dump(tmp_path, Case.read(TINY))
    assert "(Weights only load failed)" in str(refused.value)
    assert not ran.exists()
