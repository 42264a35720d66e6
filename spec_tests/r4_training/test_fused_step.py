"""A training step under a plan that rounds nothing in attention takes its fused form, and has the same gradients."""

from dataclasses import replace

import numpy as np
import pytest

from refimpl.layers import STAGES, observing
from refimpl.layers.precision import BF16, FLOAT32, FLOAT64, Plan
from refimpl.spec_tests.cases.small_models import SMALL, some_tokens
from refimpl.train import Recipe, State, init, memory
from refimpl.train.half import HALF
from refimpl.train.memory import Policy
from refimpl.train.training import gradients

STATE = State(init(SMALL, std=0.1))
TOKENS = some_tokens(2, 70)
ONE_ROUNDED = Plan("probs", np.float32, (("mla.probs", "bf16"),))


@pytest.mark.parametrize(
    ("plan", "fused"),
    [(FLOAT32, True), (FLOAT64, True), (BF16, False), (HALF, False), (ONE_ROUNDED, False)],
    ids=lambda p: getattr(p, "name", ""),
)
@pytest.mark.parametrize("mode", ["keep", "report", "again"])
def test_attention_is_fused_where_nothing_is_rounded_in_it(monkeypatch, plan, fused, mode):
    """Catches a step that is four times slower at length 2,048 because a plan that changes nothing looks on, and one that leaves a
    plan's rounding out. A memory policy changes nothing in that: its gradients are to have the same bits.
    """
    called, before = [], STAGES["mla.scores"].fn
    monkeypatch.setitem(STAGES["mla.scores"].__dict__, "fn", lambda *a, **k: called.append(1) or before(*a, **k))
    memory.gradients(SMALL, STATE, TOKENS[:1, :5], Recipe(plan), policy=Policy.uniform(SMALL, mode))
    assert bool(called) != fused


def test_whoever_looks_sees_every_stage(monkeypatch):
    """Catches a watch or a recorder beside such a plan that attention passes by."""
    seen = []
    with observing(lambda stage, run, /, *args, **static: seen.append(stage.name) or run(*args, **static)):
        gradients(SMALL, STATE, TOKENS[:1, :5], Recipe(FLOAT32))
    assert {"mla.scores", "mla.probs", "mla.ctx"} <= set(seen)


def test_the_gradients_are_those_of_the_stages():
    """Catches a fused form that is not the stages': all gradients, in float64, of packed documents with padding, over two blocks of
    queries. Only the order of sums differs, and gradients are handed over in float32.
    """
    documents = np.repeat([[0, 1, 2]], [30, 30, 10], axis=1).repeat(2, axis=0)
    rows = {"documents": documents, "valid": (np.arange(70) < [[70], [64]]).astype(int)}
    recipe = replace(Recipe(FLOAT64), mtp_weight=0.3, aux_weight=1e-2)
    loss, fused, *_ = gradients(SMALL, STATE, TOKENS, recipe, **rows)
    with observing(lambda stage, run, /, *args, **static: run(*args, **static)):
        expected, staged, *_ = gradients(SMALL, STATE, TOKENS, recipe, **rows)
    assert loss == pytest.approx(expected, rel=1e-13) and fused.keys() == staged.keys()
    for name, g in staged.items():
        np.testing.assert_allclose(fused[name], g, rtol=0, atol=2e-7 * np.abs(g).max(), err_msg=name)
