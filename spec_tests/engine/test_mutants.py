"""The checker of test_ops.py is checked: a wrong vjp must not pass."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.autograd import SpecError, nn_ops, primitive
from refimpl.spec_tests.strategies.primitives import CASES

from .test_ops import DIFFERENTIABLE, OPS, SLOPE, cotangent, differentiable, examples, slope_error, vjps_of


def with_vjp(op, position, change):
    """The op with one vjp changed: change(true dx, dy, *args)."""

    @primitive
    def mutant(*args, **static):
        y, vjps = op.raw(*args, **static)
        vjps, true = list(vjps), vjps[position]
        vjps[position] = lambda dy: change(true(dy), dy, *args)
        return y, tuple(vjps)

    return mutant


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@examples(10)
@given(data=st.data())
def test_a_vjp_off_by_one_in_a_thousand_is_caught(name, data):
    """Catches a checker that compares nothing, with too wide a limit, or not every argument."""
    case = data.draw(CASES[name].filter(lambda c: all(a is None or a.size for a in c.args)))
    for i in differentiable(name, case):
        wrong = with_vjp(OPS[name], i, lambda dx, dy, *args: 1.001 * dx)
        y, vjps = vjps_of(name, case)
        size = np.abs(vjps[i](cotangent(y))).max(initial=0)
        if y.size and size > 0.1:  # else 1.001 times nothing is nothing
            assert slope_error(wrong, case, [i]) > SLOPE


def last_wins(dx, dy, w, ids):
    dw = np.zeros_like(w)
    dw[ids] += dy
    return dw


MUTANTS = {
    "repeated ids dropped": ("take_rows", 0, last_wins),
    "broadcast not summed": ("add", 1, lambda dx, dy, a, b: dy),
    "fan-out forgotten": ("mul", 0, lambda dx, dy, a, b: dx * 0),
    "quotient sign": ("div", 1, lambda dx, dy, a, b: -dx),
    "norm without its mean term": (
        "rms_norm",
        0,
        lambda dx, dy, x, w: dy * w / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6),
    ),
    "sigmoid without 1 - y": ("sigmoid", 0, lambda dx, dy, x: dy * nn_ops.sigmoid(x)),
    "softmax without its sum": ("softmax", 0, lambda dx, dy, x: dy * nn_ops.softmax(x)),
    "silu without its second term": (
        "swiglu",
        0,
        lambda dx, dy, g, u: dy * u * nn_ops.sigmoid(g),
    ),
    "rotation not turned back": ("rotate", 0, lambda dx, dy, x, table: dy),
    "one row of softmax - onehot lost": ("nll", 0, lambda dx, dy, x, labels: dx[::-1]),
    "routing weight left out": (
        "combine",
        0,
        lambda dx, dy, rows, ids, w: dx / np.where(dx == 0, 1, np.abs(dx)),
    ),
    "slots swapped": ("combine", 2, lambda dx, dy, rows, ids, w: dx[..., ::-1]),
    "every token of an expert alike": (
        "dispatch",
        0,
        lambda dx, dy, x, ids: np.broadcast_to(dx.mean(-1, keepdims=True), dx.shape),
    ),
    "gradient of k without the scale": ("attention", 1, lambda dx, dy, *args: dx / 0.37),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_plausible_wrong_vjp_is_caught(mistake):
    """Catches a checker, or a table of cases, too weak for mistakes that people make."""
    name, position, change = MUTANTS[mistake]
    wrong, caught = with_vjp(OPS[name], position, change), []

    @examples(40)
    @given(case=CASES[name])
    def search(case):
        try:
            caught.append(slope_error(wrong, case, [position]) > SLOPE)
        except SpecError:  # the engine's own shape check
            caught.append(True)

    search()
    assert any(caught)
