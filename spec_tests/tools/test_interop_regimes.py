"""transformers' DeepSeek-V3 in every regime: an independent, right implementation stays right where values are rare."""

import pytest

from refimpl.autograd.errors import SpecError
from refimpl.diff import Trace, render
from refimpl.diff.judge import judge
from refimpl.record import hf
from refimpl.record.regimes import REGIMES

from .test_regimes import made

ABSENT = {"mtp-2": "transformers runs no MTP modules", "padding": "what it attends to from padding is not defined"}
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


def test_padding_is_refused_by_the_recorder(tmp_path):
    """Catches an excuse that is none: when the recorder takes padding, the regime belongs above."""
    with pytest.raises(SpecError, match="padding"):
        hf.record(made("padding").path, tmp_path / "t.safetensors")
