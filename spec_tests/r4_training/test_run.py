"""A training run: the loop is the step repeated, a resumed run is one that never stopped, metrics say what the step saw."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from refimpl import train
from refimpl.autograd import SpecError
from refimpl.spec_tests.cases import runs
from refimpl.train.checkpoints import Keeper
from refimpl.train.data import Reader, Shards
from refimpl.train.run import records
from refimpl.train.run import train as go
from refimpl.train.run.monitor import VARIES


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return runs.shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The job in one go -> its end, its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return go(runs.job(shards), folder), folder


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
    """Catches a schedule read a step early, batches in another order, a step on stale weights. Oracle: `train.step` in a plain
    loop, each step's recipe written out from the report's formulas.
    """
    job, state = runs.job(shards), None
    reader = Reader(Shards(shards), 3, None)
    cursor, losses = reader.start(), []
    state = train.State(train.init(runs.CONFIG, seed=3, std=0.1))
    for t in range(runs.STEPS):
        batch, cursor = reader.take(cursor, runs.BATCH)
        lr = [1e-3, 2e-3][t] if t < 2 else 3e-3 + (1e-3 - 3e-3) * ((1 - math.cos(math.pi * ((t - 2) / 4))) / 2)
        how = train.Recipe(job.run.recipe(0).plan, train.AdamW(lr, moments="bf16"), gamma=0.01 if t < 3 else 0.0)
        how = replace(how, mtp_weight=0.3 if t < 3 else 0.1, aux_weight=1e-2)
        state, report = train.step(runs.CONFIG, state, recipe=how, **batch.inputs())
        losses.append(report.loss)
    end, folder = whole
    assert end.complete and end.step == runs.STEPS
    assert [r["loss"] for r in records(folder)] == losses
    for name, w in state.weights.items():
        np.testing.assert_array_equal(end.weights[name], w, err_msg=name)


@pytest.mark.parametrize("stops", [(1,), (2, 5)])
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
    with pytest.raises(SpecError, match="no run to resume"):
        go(runs.job(shards), whole[1] / "nowhere", resume=True)
