"""A run in FP16 under a dynamic loss scale, from its recipe (described in articles, not in V3)."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from refimpl import train
from refimpl.autograd import SpecError
from refimpl.layers.neighbours import LossScale
from refimpl.spec_tests.cases import runs
from refimpl.train import loss_scale
from refimpl.train.checkpoints import Keeper
from refimpl.train.data import Reader, Shards
from refimpl.train.guard import NotFinite
from refimpl.train.recipe import read
from refimpl.train.run import records, simulated
from refimpl.train.run import train as go

FIRST = 2.0**19
"""Overflows; a few halvings later it does not."""
HALF = read(runs.recipe("fp16", loss_scale=FIRST, moments="fp32"))


def newest(folder):
    return Keeper(folder / "checkpoints").newest().saved


@pytest.fixture(scope="module")
def folder(shards, tmp_path_factory):
    """The run in one go."""
    folder = tmp_path_factory.mktemp("half") / "run"
    assert go(runs.job(shards, run=HALF), folder).complete
    return folder


def test_a_run_in_half_precision_is_its_step_repeated(folder, shards):
    """Catches a batch that is left out or trained twice where it overflows, a schedule or a cursor that moves on without a step, a
    scale that begins anew every step. Oracle: `loss_scale.step` in a loop, each batch tried until it is taken.
    """
    reader, state, scale, seen = Reader(Shards(shards), 3, None), None, LossScale(FIRST), []
    state = train.State(train.init(runs.CONFIG, seed=3, std=0.1))
    cursor = reader.start()
    for t in range(runs.STEPS):
        batch, cursor = reader.take(cursor, runs.BATCH)
        while state.adam.t == t:
            tried = scale
            state, scale, report = loss_scale.step(runs.CONFIG, state, scale, recipe=HALF.recipe(t), **batch.inputs())
        seen.append((t + 1, report.loss, report.norm, tried.scale))
    assert [(r["step"], r["loss"], r["norm"], r["loss_scale"]) for r in records(folder)] == seen
    assert 1 < seen[0][3] < FIRST
    saved = newest(folder)
    assert saved.facts["counters"]["loss_scale"] == {"scale": scale.scale, "interval": 2000, "good": scale.good}
    for name, w in saved.tensors("master").items():
        np.testing.assert_array_equal(w, state.weights[name], err_msg=name)


def test_it_goes_on_with_its_scale(folder, shards, tmp_path):
    """Catches a scale, or its count of good steps, that a checkpoint does not hold."""
    asked = itertools.count(1)
    go(runs.job(shards, run=HALF), tmp_path, stop=lambda: next(asked) == 3)
    go(runs.job(shards, run=HALF), tmp_path, resume=True)
    ours, theirs = newest(tmp_path), newest(folder)
    assert ours.facts == theirs.facts and ours.kinds() == theirs.kinds()
    for kind in ours.kinds():
        for name, x in ours.tensors(kind).items():
            np.testing.assert_array_equal(x, theirs.tensors(kind)[name], err_msg=f"{kind}/{name}")
    assert [r["loss_scale"] for r in records(tmp_path)] == [r["loss_scale"] for r in records(folder)]


@pytest.mark.slow
def test_micro_batches_are_scaled_too(folder, shards, tmp_path):
    """Catches a scale that reaches one micro-batch only, or none: then the gradients, and their norm, are a fraction of what they
    were. FP16 rounds the gradients of each part, to 2^-11 of what it holds.
    """
    go(runs.job(shards, run=HALF, micro_batch=1, memory="report", steps=2), tmp_path)
    for ours, theirs in zip(records(tmp_path), records(folder), strict=False):
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=2e-2)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_what_no_scale_cures_ends_the_run(shards, monkeypatch):
    """Catches a run that halves its scale for ever where the loss is no number, or gradients overflow by themselves."""
    state, tokens = train.State(train.init(runs.CONFIG, std=0.1)), np.arange(12).reshape(1, 12)
    spoiled = train.State(dict(state.weights) | {"lm_head.weight": state.weights["lm_head.weight"] * np.float32("nan")})
    _, _, report = loss_scale.until_finite(runs.CONFIG, spoiled, LossScale(8.0), tokens, HALF.recipe(0))
    assert math.isnan(report.loss) and (report.step, report.loss_scale) == (1, 8.0)
    monkeypatch.setattr(LossScale, "unscale", lambda self, grads: None)
    after, _, report = loss_scale.until_finite(runs.CONFIG, state, LossScale(8.0), tokens, HALF.recipe(0))
    assert after is state and math.isinf(report.norm) and report.loss_scale == 1.0


def test_a_loss_that_is_no_number_ends_it(shards, tmp_path, monkeypatch):
    """Catches FP16's infinities taken for overflows of the scale where a stage gives NaN."""
    init = train.init

    def spoiled(*args, **how):
        return {n: w * np.float32("nan") if n == "lm_head.weight" else w for n, w in init(*args, **how).items()}

    monkeypatch.setattr("refimpl.train.run.beginning.init", spoiled)
    with pytest.raises(NotFinite, match=r"step 1: loss nan.*\n.*the weight lm_head.weight holds it already"):
        go(runs.job(shards, run=HALF), tmp_path)


def test_what_half_precision_cannot_do_is_refused(shards, tmp_path):
    """Catches a scale that is left out in silence, on ranks and for several tasks."""
    with pytest.raises(SpecError, match="FP16 under a loss scale is trained on one rank"):
        simulated(runs.job(shards, run=HALF), tmp_path / "ranks", 2)
    tasks = read(
        runs.recipe("fp16", loss_scale=8.0) | {"phase": [{**runs.recipe()["phase"][0], "task": [{"name": "sums"}]}]}
    )
    with pytest.raises(SpecError, match=r"tasks \['sums'\]: phases with tasks are trained without a loss scale"):
        replace(runs.job(shards, run=HALF), run=tasks, shards={}, tasks={"sums": tmp_path}).check()
