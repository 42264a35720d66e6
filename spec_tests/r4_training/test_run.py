"""A training run: the loop is the step repeated, a resumed run is one that never stopped, metrics say what the step saw."""

import itertools
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refimpl import train
from refimpl.autograd import SpecError
from refimpl.spec_tests.cases import runs
from refimpl.train.checkpoints import Keeper
from refimpl.train.data import Reader, Shards
from refimpl.train.memory import Frugal
from refimpl.train.run import records
from refimpl.train.run import train as go
from refimpl.train.run.monitor import VARIES


def same(records):
    """What must not depend on when and where a step was taken."""
    return [{name: x for name, x in r.items() if name not in VARIES} for r in records]


def saved(folder):
    """Every tensor of the newest checkpoint by kind and name, and its cursor."""
    found = Keeper(folder / "checkpoints").newest().saved
    kinds = ("master", "adam.m", "adam.v", "ema")
    tensors = {f"{kind}/{n}": np.array(x) for kind in kinds for n, x in found.tensors(kind).items()}
    return tensors, found.facts["cursor"]


def test_the_loop_is_the_step_repeated(whole, shards):
    """Catches a schedule read a step early, batches in another order, an average of other weights. Oracle: `train.step` in a plain
    loop, each step's recipe written out from the report's formulas.
    """
    job, state = runs.job(shards), None
    reader = Reader(Shards(shards), 3, None)
    cursor, losses = reader.start(), []
    state = train.State(train.init(runs.CONFIG, seed=3, std=0.1))
    average = dict(state.weights)
    for t in range(runs.STEPS):
        batch, cursor = reader.take(cursor, runs.BATCH)
        lr = [1e-3, 2e-3][t] if t < 2 else 3e-3 + (1e-3 - 3e-3) * ((1 - math.cos(math.pi * ((t - 2) / 4))) / 2)
        how = train.Recipe(job.run.recipe(0).plan, train.AdamW(lr, moments="bf16"), gamma=0.01 if t < 3 else 0.0)
        how = replace(how, mtp_weight=0.3 if t < 3 else 0.1, aux_weight=1e-2)
        state, report = train.step(runs.CONFIG, state, recipe=how, **batch.inputs())
        losses.append(report.loss)
        average = {n: np.float32(0.9) * a + np.float32(0.1) * state.weights[n] for n, a in average.items()}
    end, folder = whole
    found, _ = saved(folder)
    assert end.complete and end.step == runs.STEPS
    assert [r["loss"] for r in records(folder)] == losses
    for name, w in state.weights.items():
        np.testing.assert_array_equal(end.weights[name], w, err_msg=name)
        kept = average[name] if "bias" not in name else w  # the balancing bias is no parameter
        np.testing.assert_array_equal(found[f"ema/{name}"], kept, err_msg=name)


@pytest.mark.parametrize("stops", [(1, 4), pytest.param((2, 5), marks=pytest.mark.slow)])
def test_a_resumed_run_never_stopped(whole, shards, tmp_path, stops):
    """Catches moments, cursor, average or step number lost or counted twice over a stop, and metrics with gaps or doubles."""
    job, folder, done = runs.job(shards), tmp_path / "run", 0
    for i, stop in enumerate((*stops, None)):
        end = go(job, folder, resume=i > 0, stop=after(stop, done))
        assert end.complete == (stop is None) and end.step == (stop or runs.STEPS)
        done = end.step
    (tensors, cursor), (want, where) = saved(folder), saved(whole[1])
    assert tensors.keys() == want.keys() and cursor == where
    for name, x in want.items():
        np.testing.assert_array_equal(tensors[name], x, err_msg=name)
    assert same(records(folder)) == same(records(whole[1]))


def after(stop, done):
    """Whether to stop, asked once a step by a run that has taken `done` of them."""
    asked = itertools.count(done + 1)
    return lambda: next(asked) == stop


def test_a_folder_with_a_run_is_not_begun_again(whole, shards):
    """Catches a run written over another."""
    with pytest.raises(SpecError, match=r"holds a run of 6 steps; --resume"):
        go(runs.job(shards), whole[1])
    again = go(runs.job(shards, steps=4), shutil.copytree(whole[1], whole[1].with_name("again")), resume=True)
    assert again.complete and again.step == 6
    with pytest.raises(SpecError, match="no run to resume"):
        go(runs.job(shards), whole[1] / "nowhere", resume=True)


@pytest.mark.parametrize(
    ("memory", "micro_batch"),
    [
        ("report", None),
        *[pytest.param(*p, marks=pytest.mark.slow) for p in [("roots", None), ("again", 4), (500_000, None)]],
    ],
)
def test_memory_policies_change_no_bit(whole, shards, tmp_path, memory, micro_batch):
    """Catches a policy that is not followed (it would measure as `keep` does), or that follows it to other gradients."""
    followed = []
    job = runs.job(shards, memory=memory, micro_batch=micro_batch, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        before = Frugal.following
        patch.setattr(Frugal, "following", lambda self, p, plan: followed.append(p) or before(self, p, plan))
        go(job, tmp_path / "run")
    assert followed and not all(s.mode == "keep" for p in followed for s in p.segments)
    for mine, theirs in zip(same(records(tmp_path / "run")), same(records(whole[1])), strict=False):
        assert mine == theirs


def test_micro_batches_are_the_batch(whole, shards, tmp_path):
    """Catches micro-batches that each take a step. The first loss is the sum of theirs, in float32; then bfloat16 drifts."""
    go(runs.job(shards, micro_batch=1, steps=2), tmp_path / "run")
    mine, theirs = (list(records(folder)) for folder in (tmp_path / "run", whole[1]))
    assert [r["tokens"] for r in mine] == [r["tokens"] for r in theirs[:2]]
    assert mine[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-3) and mine[0]["loss"] != theirs[0]["loss"]


@pytest.mark.slow
def test_a_killed_run_goes_on(whole, shards, tmp_path):
    """Catches a run that a SIGKILL leaves in a state from which it ends elsewhere, whenever it comes."""
    code = (
        "import sys, pathlib; sys.path.insert(0, {root!r}); import conftest\n"
        "from refimpl.spec_tests.cases import runs; from refimpl.train.run import train\n"
        "train(runs.job(pathlib.Path({shards!r})), {folder!r}, resume={resume}, tell=lambda r: print(r['step'], flush=True))"
    )
    folder, root = tmp_path / "run", str(Path(__file__).parents[2])
    (tmp_path / "run").mkdir()
    for at in (1, 3, 5, None):
        text = code.format(
            root=root, shards=str(shards), folder=str(folder), resume=folder.joinpath("checkpoints").exists()
        )
        with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if at is not None and int(line) >= at:
                    process.kill()
    (tensors, cursor), (want, where) = saved(folder), saved(whole[1])
    assert cursor == where and tensors.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(tensors[name], x, err_msg=name)
    assert same(records(folder)) == same(records(whole[1]))
