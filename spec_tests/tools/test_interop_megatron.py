"""Megatron-core on a CPU through its tap map: as it is, and with faults put into it."""

import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.diff import Case
from refimpl.diff.judge import judge
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


def _scale(model):
    model.module.decoder.layers[1].self_attention.core_attention.scale *= 1.1


def _route(model):
    model.module.decoder.layers[1].mlp.router.config.moe_router_topk_scaling_factor *= 2  # one config for all layers


def _swap(model):
    import torch

    fc1 = model.module.decoder.layers[0].mlp.linear_fc1
    fc1.weight.data = torch.cat(fc1.weight.data.chunk(2)[::-1])


def test_megatron_conforms(case, model):
    """Catches axes (S B D) read as (B S D), a bias taken for the output, and a run that is not the case's."""
    trace = torch_map.trace_of(model, case, read("megatron"))
    assert set(trace.taps) == set(trace.header.expected) and len(trace.taps) == 73
    assert trace.header.self_check == {"logits_taps_off_vs_on": 0.0, "repeat": 0.0}
    assert judge(case, trace).verdict == "CONFORMS"
    again = torch_map.trace_of(model, case, read("megatron"))
    assert again.header == trace.header
    for tap, x in trace.taps.items():
        np.testing.assert_array_equal(again.taps[tap], x)


@pytest.mark.parametrize(
    ("fault", "taps"),
    [
        (_scale, {"fwd/L1/mla.ctx"}),
        (_route, {"fwd/L1/router.weights", "fwd/L2/router.weights"}),
        (_swap, {"fwd/L0/mlp.gate", "fwd/L0/mlp.up"}),
    ],
)
def test_faults_are_placed(fault, taps, case, model):
    """Catches taps too few or too far apart to place a fault."""
    fault(model)
    assert {f.tap for f in judge(case, torch_map.trace_of(model, case, read("megatron"))).culprits} == taps


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
