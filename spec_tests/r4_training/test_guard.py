"""A step without a finite loss is refused, says which stage first showed it, and leaves the good state alone."""

from dataclasses import replace

import numpy as np
import pytest

from refimpl.autograd import SpecError, ops, primitive
from refimpl.layers.precision import plan
from refimpl.layers.presets import TINY
from refimpl.layers.stage import STAGES
from refimpl.train import Recipe, State, init, step
from refimpl.train.guard import NotFinite, check, guarded_step
from refimpl.train.training import Report

CONFIG = TINY.replace(num_nextn_predict_layers=1)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9))
RECIPE = Recipe(plan("bf16"), mtp_weight=0.3, aux_weight=1e-2)


@primitive
def poison_backward(x):
    """Itself, with a gradient that overflows."""
    return x, (lambda dy: dy * np.inf,)


def spoil(monkeypatch, name, at, change):
    """Change the output of one call of a stage: call number `at`, from 0."""
    calls, before = [], STAGES[name].fn

    def fn(*args, **static):
        y = before(*args, **static)
        calls.append(1)
        return change(y) if (len(calls) - 1) % spoil.period == at else y

    monkeypatch.setitem(STAGES[name].__dict__, "fn", fn)


spoil.period = CONFIG.num_hidden_layers + 1  # calls of a layer's stage in one forward, MTP's layer among them


@pytest.fixture
def good():
    """A state after one good step, and copies of its arrays."""
    state, _ = guarded_step(CONFIG, State(init(CONFIG, std=0.1)), TOKENS, RECIPE)
    return state, {n: w.copy() for n, w in state.weights.items()}


@pytest.mark.parametrize(
    ("stage", "at", "says"),
    [("mla.q_a", 1, "fwd/L1/mla.q_a"), ("attn_out", 0, "fwd/L0/attn_out"), ("mla.kv_b", 3, "fwd/mtp1/mla.kv_b")],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_first_stage_forward_is_named(monkeypatch, good, stage, at, says, value):
    """Catches the last stage named instead of the first, a NaN seen and an infinity not, a state that has been changed."""
    state, before = good
    at = min(at, spoil.period - 1)
    spoil(
        monkeypatch,
        stage,
        at,
        lambda y: ops.add(y, np.where(np.arange(y.size) == 7, value, 0).reshape(y.shape).astype("f4")),
    )
    with pytest.raises(NotFinite, match=rf"step 2: .*\n  first seen in forward: {says}: 1 of \d+ numbers") as caught:
        guarded_step(CONFIG, state, TOKENS, RECIPE)
    assert f"({value})" in str(caught.value)
    for n, w in before.items():
        np.testing.assert_array_equal(state.weights[n], w)


@pytest.mark.parametrize("aux", [0.0, 1e-2])
def test_the_first_stage_backward_is_named(monkeypatch, good, aux):
    """Catches a finite loss with gradients that are not, which the loss alone would let pass: the gradient handed to the
    stage below the spoiled one is the first bad one.
    """
    spoil(monkeypatch, "attn_norm", 1, poison_backward)
    says = r"loss \d.*gradient norm (nan|inf).*\n  first seen in backward: the gradient of fwd/L0/resid"
    with pytest.raises(NotFinite, match=says):
        guarded_step(CONFIG, good[0], TOKENS, replace(RECIPE, aux_weight=aux))


def test_a_bad_weight_is_named(good):
    """Catches a stage blamed for a weight that was bad when the step began."""
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    weights = dict(good[0].weights)
    weights[name] = weights[name].copy()
    weights[name][2, 1] = np.nan
    with pytest.raises(
        NotFinite, match=rf"the weight {name} holds it already: 1 of \d+ numbers, the first at \[2, 1\]"
    ):
        guarded_step(CONFIG, replace(good[0], weights=weights), TOKENS, RECIPE)


def test_a_good_step_is_the_plain_step(good):
    """Catches a guard that changes what it watches, and -inf of the mask taken for an overflow."""
    (a, _), (b, _) = step(CONFIG, good[0], TOKENS, RECIPE), guarded_step(CONFIG, good[0], TOKENS, RECIPE)
    for n, w in a.weights.items():
        np.testing.assert_array_equal(b.weights[n], w)


@pytest.mark.parametrize(("loss", "norm"), [(np.nan, 1.0), (np.inf, 1.0), (2.0, np.nan), (2.0, np.inf)])
def test_a_report_is_checked(loss, norm):
    """Catches a check of the loss alone."""
    with pytest.raises(NotFinite, match="step 7"):
        check(Report(7, loss, norm, {}))
    check(Report(7, 2.0, 1.0, {}))


@pytest.mark.parametrize(("stage", "says"), [("attn_out", "fwd/L0/attn_out"), ("mla.q_a", "fwd/L0/mla.q_a")])
def test_what_an_fp8_quantiser_refuses_is_named_too(monkeypatch, good, stage, says):
    """Catches a NaN under V3's own plan told as bad input of a product: no stage, and a run that does not keep the state before."""
    monkeypatch.setattr(spoil, "period", 1)  # every call: the first try ends in the midst of a pass
    spoil(monkeypatch, stage, 0, lambda y: ops.mul(y, np.float32(np.nan)))
    with pytest.raises(NotFinite, match=rf"step 2: no loss, for .*holds NaN or Inf.*\n  first seen in forward: {says}"):
        guarded_step(CONFIG, good[0], TOKENS, replace(RECIPE, plan=plan("fp8")))
    assert good[0].adam.t == 1


def test_bad_input_is_no_nan(good):
    """Catches every refusal told as a loss that is no number, after which a run would save and look for a stage."""

    def refuses(*args, **rows):
        raise SpecError("a budget of 3 bytes")

    with pytest.raises(SpecError, match="a budget of 3 bytes") as caught:
        guarded_step(CONFIG, good[0], TOKENS, RECIPE, refuses)
    assert not isinstance(caught.value, NotFinite)
