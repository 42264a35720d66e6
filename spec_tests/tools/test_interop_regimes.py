"""transformers' DeepSeek-V3 in every regime: an independent, right implementation stays right where values are rare."""

import numpy as np
import pytest

from refimpl.diff import Trace, render
from refimpl.diff.judge import judge
from refimpl.record import hf
from refimpl.record.regimes import REGIMES

from .test_regimes import made

ABSENT = {"mtp-2": "transformers runs no MTP modules", "padding": "below, with the kernel that masks it"}
ALL = "bias-negative,near-ties,small-latents,eps,long-positions,mscale,raw-weights,scaling-1,ragged-128,fp8-weights"


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="comes with the extra 'interop'; CI runs these tests with it")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("regimes", [*(r for r in REGIMES if r not in ABSENT), ALL])
def test_transformers_conforms(regimes, dtype, tmp_path):
    """Catches a regime that blames a right implementation, and a specification that is wrong where plain cases do not look."""
    case = made(regimes)
    hf.record(case.path, tmp_path / "t.safetensors", dtype=dtype)
    judgement = judge(case, Trace.read(tmp_path / "t.safetensors"))
    assert judgement.verdict == "CONFORMS", render(judgement)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_conforms_where_the_kernel_masks_it(dtype, tmp_path):
    """Catches a mask or positions that padding in front moves. Under eager attention a query of padding, which sees no key, weighs
    all alike: the trace says so, only rows of padding are so, and what is held in padding is not judged.
    """
    case, place = made("padding"), tmp_path / "t.safetensors"
    judgement = judge(case, Trace.read(hf.record(case.path, place, dtype=dtype, attention="sdpa")))
    assert judgement.verdict == "CONFORMS", render(judgement)
    trace = Trace.read(hf.record(case.path, place, dtype=dtype))
    judgement = judge(case, trace)
    assert judgement.verdict == "CONFORMS" and "padding: " in trace.header.notes, render(judgement)
    padding = np.argwhere(np.asarray(case.valid) == 0)
    for i in range(case.config.num_hidden_layers):
        probs = np.asarray(trace.taps[f"fwd/L{i}/mla.probs"], np.float32)
        alike = np.argwhere((probs == probs[..., :1]).all(-1).all(1))  # (b, s) whose keys weigh the same
        assert {tuple(r) for r in alike} - {(0, 0), (1, 0)} <= {tuple(r) for r in padding}
