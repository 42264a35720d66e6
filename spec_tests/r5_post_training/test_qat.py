"""INT8 quantisation-aware training, described in articles, not in V3."""

from dataclasses import replace

import numpy as np
import pytest

from refimpl.autograd import Parameter, backward
from refimpl.layers.stage import observing
from refimpl.spec_tests.cases import toys
from refimpl.train import AdamW
from refimpl.train.post import qat


def integers(x, bits=8):
    """(integers, scale) of every row, one number at a time."""
    top, rows, scales = 2 ** (bits - 1) - 1, [], []
    for row in x:
        scale = max(abs(float(v)) for v in row) / top or 1.0
        rows.append([round(float(v) / scale) for v in row])  # Python rounds half to even, as rint does
        scales.append(scale)
    return rows, scales


@pytest.mark.parametrize("bits", [4, 8])
def test_forward_is_the_integer_product(bits):
    """Catches a scale along the wrong axis, a grid of 2^bits steps, a bias that is quantised. Sums of integers are
    exact; float64 rounds the rest.
    """
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(size=(4, 9)), rng.normal(size=(5, 9)), rng.normal(size=5)
    (qx, sx), (qw, sw) = integers(x, bits), integers(w, bits)
    expected = [
        [sum(a * c for a, c in zip(qx[i], qw[f], strict=True)) * sx[i] * sw[f] + b[f] for f in range(5)]
        for i in range(4)
    ]
    np.testing.assert_allclose(qat.FakeInt8(bits).linear(x, w, b), expected, rtol=1e-12, atol=1e-14)


def test_backward_goes_straight_through():
    """The gradients are those of the product at the rounded operands. Catches a gradient of the rounding, zero almost everywhere,
    and one at the operands before rounding.
    """
    rng = np.random.default_rng(1)
    x, w, dy = Parameter(rng.normal(size=(4, 9))), Parameter(rng.normal(size=(5, 9))), rng.normal(size=(4, 5))
    grads = backward(qat.FakeInt8(4).linear(x, w, None), dy)
    for leaf, other, g in ((x, w, dy), (w, x, dy.T)):
        q, s = integers(other.data, 4)
        np.testing.assert_allclose(grads[leaf], g @ (np.array(q) * np.array(s)[:, None]), rtol=1e-12)


def test_experts_are_quantised_one_by_one():
    """Catches one scale for all experts, rows that meet another expert's matrix."""
    rng = np.random.default_rng(2)
    ids = np.array([[[0, 2], [2, 0]]])  # (B, S, K): experts 0 0 2 2 once sorted
    rows, ws = rng.normal(size=(4, 6)), [rng.normal(size=(3, 6)) * 10**e for e in range(3)]
    found = qat.FakeInt8().grouped_linear(rows, ids, *ws)
    expected = [qat.FakeInt8().linear(rows[m : m + 1], ws[e], None)[0] for m, e in enumerate((0, 0, 2, 2))]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def quantised_accuracy(weights, bits, asked):
    with observing(qat.int_plan(bits)):
        return toys.accuracy(weights, asked)


@pytest.mark.slow
def test_training_with_the_grid_beats_rounding_afterwards():
    """A model rounded to 2 bits (-1, 0, 1) forgets; trained on under that plan it does not. Catches a plan that no stage
    uses, a master that is rounded: then small steps would be lost.
    """
    weights, rng = toys.both(), np.random.default_rng(0)
    asked = toys.every(toys.COPY) + toys.every(toys.REVERSE)
    assert quantised_accuracy(weights, 8, asked) > 0.9
    before = quantised_accuracy(weights, 2, asked)
    recipe = replace(toys.RECIPE, plan=qat.int_plan(2), opt=AdamW(lr=3e-3, weight_decay=0.0))
    batches = [toys.some(toys.COPY, 12, rng) + toys.some(toys.REVERSE, 12, rng) for _ in range(120)]
    trained = toys.fine_tune(weights, batches, recipe)
    after = quantised_accuracy(trained, 2, asked)
    assert before < 0.3 and after > 0.45
