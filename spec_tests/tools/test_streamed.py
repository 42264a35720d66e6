"""Weights that are read a block of rows at a time are the weights, and a judgement on them is the same judgement."""

import hashlib
import itertools

import ml_dtypes
import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.checkpoint import Checkpoint, save
from refimpl.diff import render
from refimpl.diff import streamed as module
from refimpl.diff.judge import judge
from refimpl.diff.streamed import StageWeights
from refimpl.diff.trace import digest
from refimpl.layers import PRESETS
from refimpl.layers.precision import BF16, FLOAT32, FLOAT64
from refimpl.model import Streamed, by_rows, effective, expected_tensors

from .test_diff_partial import case, recording


@pytest.mark.parametrize("plan", [FLOAT32, FLOAT64, BF16], ids=lambda p: p.name)
@pytest.mark.parametrize("rounded", ["", "bfloat16", "float16"])
def test_rows_are_those_of_the_whole(plan, rounded, monkeypatch):
    """Catches a block that begins in the wrong row, and a plan that is not applied to parts."""
    monkeypatch.setattr(module, "LARGE", 1 << 10)
    monkeypatch.setattr(module, "EXPERT", 1 << 8)
    monkeypatch.setattr(by_rows, "BLOCK", 1 << 10)
    weights = StageWeights(case().checkpoint, dict.fromkeys(case().checkpoint, rounded))
    rng, x = np.random.default_rng(0), None
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.experts.3.up_proj.weight"):
        held = {name: case().checkpoint[name]}
        if rounded:
            dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[rounded]
            held = {name: held[name].astype(dtype).astype(np.float32)}
        whole = effective(held, plan)[name]
        lazy = weights(name, plan)
        assert isinstance(lazy, Streamed) and lazy.shape == whole.shape and lazy.dtype == whole.dtype
        x = rng.standard_normal((7, whole.shape[1])).astype(whole.dtype)
        np.testing.assert_allclose(x @ lazy.T, x @ whole.T, rtol=1e-5 if plan is not FLOAT64 else 1e-12, atol=1e-5)
        ids = rng.integers(0, len(whole), (2, 3))
        np.testing.assert_array_equal(lazy[ids], whole[ids])
        np.testing.assert_array_equal(np.asarray(lazy), whole)


@pytest.mark.parametrize(("near", "most"), [(0, 128), (1, 128), (40, 128), (1000, 128), (1000, 256)])
def test_rows_that_are_looked_up_are_read_with_those_between_them(near, most, monkeypatch):
    """Catches a row that is read twice or not at all, more rows read between two than are near, and a run of them longer than a
    block. Oracle: the matrix, and what was read.
    """
    monkeypatch.setattr(by_rows, "BLOCK", most * 6)
    w, read = np.random.default_rng(0).standard_normal((900, 6)), []

    class Rows:
        def read(self, name, plan, start, stop):
            read.append((start, stop))
            return w[start:stop]

    for n in (1, 3, 40, 400, 900):
        ids = np.random.default_rng(n).integers(0, 900, (2, n))
        read.clear()
        np.testing.assert_array_equal(Streamed(Rows(), "w", FLOAT64, w.shape, near)[ids], w[ids])
        wanted = np.unique(ids)
        assert all(stop - start <= most for start, stop in read) and read == sorted(read)
        runs = [wanted[(wanted >= start) & (wanted < stop)] for start, stop in read]
        assert np.concatenate(runs).tolist() == wanted.tolist()
        assert all((run[0], run[-1] + 1) == at for run, at in zip(runs, read, strict=True))
        assert all((np.diff(run) <= near + 1).all() for run in runs)
        assert all(b[0] - a[-1] > near + 1 or b[0] - a[0] >= most for a, b in itertools.pairwise(runs))


def test_a_judgement_on_streamed_weights_is_the_same(monkeypatch):
    """Catches findings that depend on how weights were read: with everything streamed the report is the same, bit for bit where
    sums are.
    """
    held = judge(case(), recording("hf-bug"))
    monkeypatch.setattr(module, "LARGE", 1 << 8)
    monkeypatch.setattr(module, "EXPERT", 1 << 8)
    monkeypatch.setattr(by_rows, "BLOCK", 1 << 8)
    streamed = judge(case(), recording("hf-bug"))
    assert [(f.tap, f.ok) for f in held.findings] == [(f.tap, f.ok) for f in streamed.findings]
    assert [d.id for d in streamed.causes] == ["R01"] and render(streamed).splitlines()[-1] == render(
        held
    ).splitlines()[-1]


def test_rows_of_fp8_weights_are_decoded_alone(tmp_path):
    """Catches scales of other blocks, and a last block that is not full."""
    rng = np.random.default_rng(1)
    name = "model.layers.0.mlp.up_proj.weight"
    save(tmp_path, {name: rng.standard_normal((300, 200), np.float32)}, PRESETS["tiny"].to_dict(), dtype="fp8")
    checkpoint = Checkpoint.open(tmp_path)
    whole = checkpoint[name]
    for a, b in ((0, 300), (0, 1), (127, 129), (128, 256), (131, 300), (299, 300)):
        np.testing.assert_array_equal(checkpoint.rows(name, a, b), whole[a:b])


def test_small_matrices_are_kept_and_large_ones_are_not():
    """Catches a small model's matrices decoded again for every lane, and a released model's kept: of the case here none is
    streamed, of V3 and V2-Lite every projection and table that is only multiplied by.
    """
    weights = StageWeights(case().checkpoint, {})
    for name in case().checkpoint:
        assert weights(name, FLOAT64) is weights(name, FLOAT64), name

    class Sizes:
        def __init__(self, config):
            self.shapes = expected_tensors(config, mtp=False)

        def shape(self, name):
            return self.shapes[name]

    for name in ("deepseek-v3", "deepseek-v2-lite"):
        config = PRESETS[name].replace(num_hidden_layers=4)
        streamed = StageWeights(Sizes(config), {})
        for end in ("3.mlp.experts.7.up_proj", "3.mlp.experts.63.down_proj", "0.mlp.gate_proj", "0.mlp.down_proj"):
            assert isinstance(streamed(f"model.layers.{end}.weight", FLOAT64), Streamed)
        assert isinstance(streamed("lm_head.weight", FLOAT64), Streamed)


def test_only_one_stage_is_held(monkeypatch):
    """Catches the weights of a whole layer held at once, which of the released model are 45 GB."""
    monkeypatch.setattr(module, "BUDGET", 0)
    weights = StageWeights(case().checkpoint, {})
    for end in ("self_attn.q_a_proj.weight", "self_attn.kv_b_proj.weight", "mlp.gate_proj.weight"):
        weights(f"model.layers.0.{end}", FLOAT32), weights(f"model.layers.0.{end}", FLOAT64)
        assert {name for name, _ in weights.held} == {f"model.layers.0.{end}"} and len(weights.held) == 2


def test_a_digest_does_not_depend_on_how_much_is_read_at_a_time():
    """Catches a digest of parts: traces made before hold the digest of the whole."""
    for a in (np.arange(12, dtype=np.float32).reshape(3, 4), np.float32(3), np.zeros((5, 0)), np.arange(5000001)):
        a = np.asarray(a, np.float32)
        assert digest(a) == "sha256:" + hashlib.sha256(str(a.shape).encode() + a.tobytes()).hexdigest()


def test_a_number_that_is_none_is_found_in_rows_read_later():
    """Catches a block that is not looked through since its first row, or another plan's, was."""
    held = np.ones((4, 8), np.float32)
    held[2, 3] = np.nan

    class Kept:
        def shape(self, name):
            return held.shape

        def rows(self, name, start, stop):
            return held[start:stop]

    weights = StageWeights(Kept(), {})
    for plan in (FLOAT32, FLOAT64):
        assert (weights.read("w", plan, 0, 1) == 1).all() and weights.read("w", plan, 0, 1).dtype == plan.dtype
        with pytest.raises(SpecError, match="NaN or infinite"):
            weights.read("w", plan, 0, 4)
