"""A confidence threshold with hand-off to a second model, and whether the confidence means what it says."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.autograd import SpecError, Tensor, backward
from refimpl.layers import STAGES
from refimpl.layers.variants.calibration import curve


def stage(name):
    return STAGES[f"variant.{name}"]


@pytest.fixture
def rng():
    return np.random.default_rng(29)


def test_the_confidence_is_the_largest_probability(rng):
    """Catches the largest logit, an entropy, a margin."""
    z = rng.normal(size=(2, 3, 5)) * 3
    found = stage("confidence")(z)
    for b, s in np.ndindex(2, 3):
        row = z[b, s].tolist()
        assert found[b, s] == pytest.approx(1 / sum(math.exp(v - max(row)) for v in row), rel=1e-12)


def test_who_answers(rng):
    """Catches the models exchanged, and > for >= at the threshold itself."""
    first, second = rng.normal(size=(2, 2, 3, 5))
    c = np.array([[0.2, 0.5, 0.9], [0.5000001, 0.4999999, 1.0]])
    y = stage("handoff")(first, second, c, threshold=0.5)
    for b, s in np.ndindex(2, 3):
        np.testing.assert_array_equal(y[b, s], (first if c[b, s] >= 0.5 else second)[b, s])
    np.testing.assert_array_equal(stage("handoff")(first, second, c, threshold=0.0), first)


def test_only_the_model_that_answers_learns(rng):
    """Catches a mixture of both where a choice is meant: 0 times an infinite logit is NaN, and a gradient goes to both."""
    a, b = Tensor(rng.normal(size=(1, 4, 5))), Tensor(np.full((1, 4, 5), np.inf))
    c = np.array([[0.9, 0.9, 0.1, 0.9]])
    y = stage("handoff")(a, b, c, threshold=0.5)
    assert np.isfinite(y.data[0, [0, 1, 3]]).all()
    grads = backward(y, np.ones_like(y.data))
    np.testing.assert_array_equal(grads[a][0, :, 0], [1, 1, 0, 1])
    np.testing.assert_array_equal(grads[b][0, :, 0], [0, 0, 1, 0])


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_is_a_probability(threshold):
    """Catches a threshold on logits, under which the second model would always or never be asked."""
    z = np.zeros((1, 1, 2))
    with pytest.raises(SpecError, match="the threshold is a probability"):
        stage("handoff")(z, z, np.ones((1, 1)), threshold=threshold)


# ---- Calibration

ANSWERS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 1.0]) | st.floats(0, 1), st.booleans()), min_size=1
)


@given(ANSWERS, st.integers(1, 12))
def test_the_error_by_loops(answers, bins):
    """Catches bins closed on the other side, empty bins that count, a mean over bins instead of answers."""
    c, right = np.array([a for a, _ in answers]), np.array([r for _, r in answers])
    error = 0.0
    for i in range(1, bins + 1):
        inside = [(a, r) for a, r in answers if i - 1 < a * bins <= i or (i == 1 and a == 0)]
        if inside:
            gap = sum(r for _, r in inside) - sum(a for a, _ in inside)
            error += abs(gap) / len(answers)
    assert stage("ece")(c[None], right[None], bins=bins) == pytest.approx(error, rel=1e-9, abs=1e-12)
    assert curve(c, right, bins=bins).count.sum() == len(answers)


def test_bins_unless_said_otherwise_are_those_of_the_source(rng):
    """Guo et al., table 1: "M = 15 bins". Catches errors that cannot be held against published ones."""
    c = rng.uniform(0, 1, (1, 400))
    right = rng.uniform(size=c.shape) < c
    assert stage("ece")(c, right) == stage("ece")(c, right, bins=15)
    assert len(curve(c, right).count) == 15


def test_a_calibrated_model_and_one_that_is_too_sure(rng):
    """Catches an error that does not tell them apart. 40,000 answers in 10 bins: each bin's mean is within 0.008 (one standard
    deviation), so five of them allow 0.04; the model that says 0.95 and is right in 7 of 10 is off by 0.25.
    """
    c = rng.uniform(0, 1, (1, 40_000))
    assert stage("ece")(c, rng.uniform(size=c.shape) < c, bins=10) < 0.04
    sure = np.full((1, 10), 0.95)
    assert stage("ece")(sure, np.arange(10)[None] < 7) == pytest.approx(0.25, rel=1e-12)


def test_a_sharper_softmax_is_less_calibrated(rng):
    """Catches a confidence that the threshold cannot trust: logits tripled after the fact answer the same, and are surer of it."""
    z = rng.normal(size=(1, 5000, 4)) * 2
    p = STAGES["mla.probs"](z)
    said = (rng.uniform(size=(1, 5000, 1)) < p.cumsum(-1)).argmax(
        -1
    )  # the truth is drawn from the model's own distribution
    right = z.argmax(-1) == said
    honest, sharp = (stage("ece")(stage("confidence")(z * k), right) for k in (1, 3))
    assert honest < 0.03 < 0.1 < sharp


@pytest.mark.parametrize("bins", [1, 4, 7])
def test_a_confidence_of_one_and_its_rounding_are_in_the_last_bin(bins):
    """A float32 softmax sums to 1 within rounding. Catches an answer that falls out of all bins."""
    assert curve(np.array([1.0, 1 + 2.0**-23, 1 + 2.0**-20]), np.ones(3), bins=bins).count.tolist() == [0] * (
        bins - 1
    ) + [3]


def test_what_is_no_probability():
    """Catches percentages, and answers without a verdict."""
    with pytest.raises(SpecError, match="between 0 and 1"):
        curve(np.array([95.0]), np.array([1]))
    with pytest.raises(SpecError, match=r"shape \(2,\), right has \(1,\)"):
        curve(np.array([0.5, 0.6]), np.array([1]))
    with pytest.raises(SpecError, match="over 0 answers"):
        curve(np.array([]), np.array([]))


def test_the_diagram_says_the_error_and_is_the_same_every_time(rng):
    """Catches a figure of another error than the stage's, and ids or dates that change."""
    pytest.importorskip("matplotlib", reason="comes with the extra 'plot'")
    from refimpl.infer.reliability import svg

    c = rng.uniform(0, 1, (1, 500))
    right = rng.uniform(size=c.shape) < c**2
    found = curve(c, right, bins=10)
    picture = svg(found)
    assert f"expected calibration error {float(stage('ece')(c, right, bins=10)):.3f}".encode() in picture
    assert picture == svg(found)
