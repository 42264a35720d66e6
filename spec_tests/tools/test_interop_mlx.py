"""mlx-lm through its adapter: as it is, with faults put into it, and on a case that shows what it does otherwise."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from refimpl.checkpoint import safetensors
from refimpl.cli import main
from refimpl.diff import Case, Trace
from refimpl.diff.judge import judge
from refimpl.record import mlx

from .test_refimpl_tap import TINY


@pytest.fixture(scope="module", autouse=True)
def _mlx():
    for name in ("mlx.core", "mlx_lm"):
        pytest.importorskip(name, reason="comes with the extra 'mlx'; CI runs these tests with it")


@pytest.fixture
def case():
    return Case.read(TINY)


@pytest.fixture
def model(case):
    with mlx.on_cpu():
        yield mlx.load(case)


def blamed(model, case):
    return {f.tap for f in judge(case, mlx.trace_of(model, case)).culprits}


def test_mlx_lm_conforms_in_float32(case, model):
    """Catches a tap named for another place, a conversion that is ours and not mlx-lm's, and a probe that changes something."""
    trace = mlx.trace_of(model, case)
    assert set(trace.taps) == set(trace.header.expected) and len(trace.taps) == 65
    assert trace.header.self_check == {"logits_taps_off_vs_on": 0.0, "repeat": 0.0}
    assert trace.taps["fwd/L1/router.ids"].dtype == np.uint32
    assert judge(case, trace).verdict == "CONFORMS"


def _scale(model):
    model.model.layers[1].self_attn.scale *= 1.1


def _route(model):
    model.model.layers[2].mlp.gate.routed_scaling_factor *= 2


def _swap(model):
    mlp = model.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


@pytest.mark.parametrize(
    ("fault", "taps"),
    [
        (_scale, {"fwd/L1/mla.ctx"}),
        (_route, {"fwd/L2/router.weights"}),
        (_swap, {"fwd/L0/mlp.gate", "fwd/L0/mlp.up"}),
    ],
)
def test_faults_are_placed(fault, taps, case, model):
    """Catches taps too few or too far apart to place a fault."""
    fault(model)
    assert blamed(model, case) == taps


def test_masked_groups_filled_with_zero_show_where_every_score_is_negative(tmp_path):
    """Catches a recorder that repairs what mlx-lm does: experts of dropped groups count as 0, and win
    where all biases are below -1.
    """
    for name in ("config.json", "tokens.json"):
        shutil.copy(TINY / name, tmp_path / name)
    tensors = Case.read(TINY).weights()
    low = {n: w - np.float32(3) if n.endswith("correction_bias") else w for n, w in tensors.items()}
    safetensors.write_file(tmp_path / "weights.safetensors", low)
    case = Case.read(tmp_path)
    with mlx.on_cpu():
        found = judge(case, mlx.trace_of(mlx.load(case), case))
    assert {f.tap for f in found.culprits} == {"fwd/L1/router.ids", "fwd/L2/router.ids"}
    assert "R02" in str(found.causes)


def test_recording_twice_gives_the_same_file_and_leaves_mlx_as_it_was(tmp_path, capsys, model, case):
    """Catches a date or an address in the header, arithmetic that depends on threads, and classes or functions left wrapped."""
    from mlx_lm.models import deepseek_v3

    before = deepseek_v3.group_expert_select, {n: type(m) for n, m in model.named_modules()}
    mlx.trace_of(model, case)
    assert (deepseek_v3.group_expert_select, {n: type(m) for n, m in model.named_modules()}) == before
    for out in ("a", "b"):
        assert main(["record", "mlx", str(TINY), "-o", str(tmp_path / out)]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    done = capsys.readouterr()
    assert done.out.splitlines()[0] == str(tmp_path / "a") and "weights: those of the case's files" in done.err


def test_another_version_is_warned_of_in_the_trace_and_on_the_screen(tmp_path, capsys, monkeypatch):
    """Catches places that are believed of a version that nobody has looked at."""
    from refimpl.record import candidate

    monkeypatch.setattr(candidate, "version_of", lambda package: "0.99.0")
    assert main(["record", "mlx", str(TINY), "-o", str(tmp_path / "t")]) == 0
    warning = "warning: mlx-lm 0.99.0: the map mlx_lm was tested with 0.32"
    assert warning in capsys.readouterr().err and warning in Trace.read(tmp_path / "t").header.notes


def test_a_case_with_positions_of_its_own_is_refused(tmp_path, capsys):
    """Catches positions that the model is never told of, whose difference would be called mlx-lm's."""
    for name in ("config.json", "weights.safetensors"):
        shutil.copy(TINY / name, tmp_path / name)
    run = json.loads(pathlib.Path(TINY / "tokens.json").read_text())
    run["positions"] = [[i + 5 for i in range(len(row))] for row in run["tokens"]]
    (tmp_path / "tokens.json").write_text(json.dumps(run))
    assert main(["record", "mlx", str(tmp_path), "-o", str(tmp_path / "t")]) == 3
    assert "positions of its own" in capsys.readouterr().err
