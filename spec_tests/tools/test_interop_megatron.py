"""Megatron-core on a CPU: what it leaves behind, what is refused. Its verdicts and faults: test_interop_adapters.py."""

import pytest

from refimpl.autograd.errors import SpecError
from refimpl.diff import Case
from refimpl.record import build_megatron, suggest, torch_map
from refimpl.record.tapmap import read

from .test_refimpl_tap import TINY


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    pytest.importorskip("megatron.core", reason="comes with the extra 'megatron'; CI runs these tests with it")


@pytest.fixture
def case():
    return Case.read(TINY)


@pytest.fixture
def model(case):
    with torch_map.built(case, read("megatron").build) as made:
        yield made


def test_suggestions_leave_out_what_only_looks_alike(case, model):
    """Catches the weights of dispatched rows, which have as many numbers of the same size, proposed as router.weights."""
    found = suggest.suggest(model, case)
    assert len(found) == 19 and "router.weights" not in found
    assert (
        found["mla.ctx"][0].endswith("core_attention (S B H Dv)") and found["resid"][0] == "decoder.layers.i[0] (S B D)"
    )


def test_nothing_that_stood_in_outlives_the_model(case):
    """Catches a process left with CUDA's function replaced, or with a process group."""
    import torch

    before = torch.cuda.current_device
    with torch_map.built(case, read("megatron").build):
        assert torch.cuda.current_device is not before and torch.distributed.is_initialized()
    assert torch.cuda.current_device is before and not torch.distributed.is_initialized()


def test_what_it_has_no_words_for_here_is_refused(case):
    """Catches a setting that is passed over."""
    with pytest.raises(SpecError, match="rope_scaling is null"):
        build_megatron.supported(case.config.replace(rope_scaling=None))
    with pytest.raises(SpecError, match="num_nextn_predict_layers is 1"):
        build_megatron.supported(case.config.replace(num_nextn_predict_layers=1))
    with pytest.raises(SpecError, match="norm_topk_prob is False"):
        build_megatron.supported(case.config.replace(norm_topk_prob=False))
