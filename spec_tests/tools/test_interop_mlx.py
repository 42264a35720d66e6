"""mlx-lm through its adapter: what it does otherwise, and what a recording leaves behind. Faults: test_interop_adapters.py."""

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


def test_its_sums_are_in_order():
    """Catches a twin that sums in an order which no engine has (`refimpl/diff/orders.py`): MLX adds one number after the other."""
    import mlx.core as mx

    squares = np.random.default_rng(0).standard_normal((48, 160)).astype(np.float32) ** 2
    with mlx.on_cpu():
        theirs = np.array(mx.sum(mx.array(squares), axis=-1))
    np.testing.assert_array_equal(theirs, np.cumsum(squares, axis=-1)[:, -1])
    assert (theirs != squares.sum(axis=-1)).any()


def test_recording_leaves_mlx_as_it_was(tmp_path, capsys, model, case):
    """Catches classes or functions left wrapped, ids that were cast, and weights that the model was not asked for."""
    from mlx_lm.models import deepseek_v3

    before = deepseek_v3.group_expert_select, {n: type(m) for n, m in model.named_modules()}
    assert mlx.trace_of(model, case).taps["fwd/L1/router.ids"].dtype == np.uint32
    assert (deepseek_v3.group_expert_select, {n: type(m) for n, m in model.named_modules()}) == before
    assert main(["record", "mlx", str(TINY), "-o", str(tmp_path / "t")]) == 0
    assert "weights: those of the case's files" in capsys.readouterr().err


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


def test_a_config_that_mlx_lm_does_not_take_is_said_of_mlx_lm(tmp_path, capsys, case):
    """Catches its exception called a bug of ours."""
    for name in ("weights.safetensors", "tokens.json"):
        shutil.copy(TINY / name, tmp_path / name)
    config = case.raw_config | {"topk_method": "group_limited_greedy"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["record", "mlx", str(tmp_path), "-o", str(tmp_path / "t")]) == 3
    assert "mlx-lm raises AssertionError: Unsupported topk method" in capsys.readouterr().err
