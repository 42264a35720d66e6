"""Every primitive: its value against loops, its gradients against slopes, and its manners.

Cases come from autograd_cases.py, values from naive_ops.py. Blocks of queries in `attention` are
shrunk to three, so that small cases cross them.
"""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import SpecError, Tensor, attention_op, backward, directional, nn_ops, ops
from refimpl.spec_tests.oracles.ops import NAIVE
from refimpl.spec_tests.strategies.primitives import CASES, LAYOUTS, primitives

OPS = primitives()
CONSTANT = {
    "attention": {3},
    "rotate": {1},
    "stop": {0},
}  # float arguments without gradient, by intent
DIFFERENTIABLE = sorted(set(OPS) - {"stop"})
# float64 sums of at most a few hundred terms, in another order: 1e-13; what is left is headroom.
ROUNDING = 1e-11
# central differences with h = 1e-6 err by h^2 |f'''| and 1e-16 |f| / h, both under 1e-8 for these sizes
SLOPE = 1e-6


def examples(n):
    """Hypothesis, reproducible; `-m slow` draws afresh and more."""
    return settings(max_examples=n, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def small_query_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_op, "QUERY_BLOCK", 3)
        yield


def differentiable(name, case):
    """Positions of the arguments that must get a gradient."""
    floats = [i for i, a in enumerate(case.args) if a is not None and a.dtype.kind == "f"]
    return [i for i in floats if i not in CONSTANT.get(name, ())]


def vjps_of(name, case):
    """(value, {position: vjp}) of the raw op."""
    y, vjps = OPS[name].raw(*case.args, **case.static)
    return y, {i: vjps[i] for i in differentiable(name, case)}


def slope_error(op, case, positions):
    """gradcheck.directional with the other arguments held."""

    def f(*moving):
        args = list(case.args)
        for i, a in zip(positions, moving, strict=True):
            args[i] = a
        return op(*args, **case.static)

    return directional(f, *[case.args[i] for i in positions])


def as_float32(case):
    args = [a.astype(np.float32) if a is not None and a.dtype.kind == "f" else a for a in case.args]
    static = {k: np.float32 if k == "dtype" else v for k, v in case.static.items()}
    return type(case)(tuple(args), static)


def cotangent(y, seed=1):
    return np.asarray(np.random.default_rng(seed).standard_normal(np.shape(y)), y.dtype)


def test_every_primitive_is_in_the_tables():
    """Catches a primitive that was added without a case, and so without any test below."""
    assert set(OPS) == set(CASES) == set(NAIVE)


@pytest.mark.parametrize("name", sorted(OPS))
def test_arrays_come_by_place_and_settings_by_name(name):
    """Catches `sum(x, 0)` let through: the tape takes whatever comes by place for an input."""
    for p in inspect.signature(OPS[name].raw).parameters.values():
        assert (p.kind is p.KEYWORD_ONLY) != p.annotation.startswith("Array")


@pytest.mark.parametrize("name", sorted(OPS))
@examples(25)
@given(data=st.data())
def test_value_is_that_of_the_loops(name, data):
    """Catches a wrong axis, order, broadcast, sign or index in any forward."""
    case = data.draw(CASES[name])
    y, expected = OPS[name](*case.args, **case.static), NAIVE[name](*case.args, **case.static)
    assert np.shape(y) == np.shape(expected)
    np.testing.assert_allclose(y, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@examples(30)
@given(data=st.data())
def test_gradient_is_the_slope(name, data):
    """Catches a wrong vjp, a dropped repeated index, and a broadcast that is not summed back."""
    case = data.draw(CASES[name])
    assert slope_error(OPS[name], case, differentiable(name, case)) < SLOPE


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_gradient_is_the_slope_at_length(name, data):
    """The same, at random and for long."""
    case = data.draw(CASES[name])
    assert slope_error(OPS[name], case, differentiable(name, case)) < SLOPE


@pytest.mark.parametrize("name", sorted(OPS))
@examples(10)
@given(data=st.data())
def test_only_integers_and_declared_constants_lack_a_gradient(name, data):
    """Catches `None` returned where a gradient is due: that argument would silently not train."""
    case = data.draw(CASES[name])
    _, vjps = OPS[name].raw(*case.args, **case.static)
    given_args = [i for i, a in enumerate(case.args) if a is not None]
    assert [i for i in given_args if vjps[i] is not None] == differentiable(name, case)


@pytest.mark.parametrize("name", sorted(OPS))
@examples(10)
@given(data=st.data())
def test_float32_stays_float32(name, data):
    """Catches dtype drift: a float64 scale, mean or index weight that doubles memory and time."""
    case = as_float32(data.draw(CASES[name]))
    y, vjps = vjps_of(name, case)
    assert y.dtype == np.float32
    assert {v(cotangent(y)).dtype for v in vjps.values()} <= {np.dtype(np.float32)}


@pytest.mark.parametrize("name", sorted(OPS))
@examples(15)
@given(data=st.data())
def test_inputs_and_cotangents_are_only_read(name, data):
    """Catches in-place work on an argument or on dy, which other ops also hold."""
    case = data.draw(CASES[name])
    before = [None if a is None else a.copy() for a in case.args]
    for a in case.args:
        if a is not None:
            a.flags.writeable = False
    y, vjps = vjps_of(name, case)
    kept, dy = np.copy(y), cotangent(y)
    dy.flags.writeable = False
    for vjp in vjps.values():
        vjp(dy)
    np.testing.assert_array_equal(y, kept)
    for a, b in zip(case.args, before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", sorted(OPS))
@examples(10)
@given(data=st.data())
def test_same_bits_every_time(name, data):
    """Catches a vjp that spends its saved values, and any order that varies between calls."""
    case = data.draw(CASES[name])
    y, vjps = vjps_of(name, case)
    again, fresh = vjps_of(name, case)
    dy = cotangent(y)
    np.testing.assert_array_equal(y, again)
    for i in reversed(vjps):
        first = np.copy(vjps[i](dy))
        np.testing.assert_array_equal(first, vjps[i](dy.copy()))
        np.testing.assert_array_equal(first, fresh[i](dy))


@pytest.mark.parametrize("name", sorted(OPS))
@examples(5)
@given(data=st.data())
def test_plain_arrays_in_plain_array_out(name, data):
    """Catches an op that records when nothing asked for it."""
    case = data.draw(CASES[name])
    assert isinstance(OPS[name](*case.args, **case.static), np.ndarray | np.generic)
    tracked = differentiable(name, case)
    args = [Tensor(a) if i in tracked else a for i, a in enumerate(case.args)]
    assert isinstance(OPS[name](*args, **case.static), Tensor) == bool(tracked)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", sorted(OPS))
@examples(10)
@given(data=st.data())
def test_memory_layout_changes_nothing(name, layout, data):
    """Catches a `reshape` taken for a view: it copies a strided array, and what is written is lost."""
    case = data.draw(CASES[name])
    y, vjps = vjps_of(name, case)
    args = tuple(a if a is None else LAYOUTS[layout](a) for a in case.args)
    other, other_vjps = vjps_of(name, type(case)(args, case.static))
    np.testing.assert_allclose(other, y, rtol=ROUNDING, atol=ROUNDING)
    dy = cotangent(y)
    for i, vjp in vjps.items():
        dx = other_vjps[i](LAYOUTS[layout](dy))
        np.testing.assert_allclose(dx, vjp(dy), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", sorted(OPS))
@examples(10)
@given(data=st.data())
def test_a_broadcast_cotangent_is_as_good_as_a_full_one(name, data):
    """Catches work in place on dy: `sum` hands a read-only view of one number to what lies below."""
    y, vjps = vjps_of(name, data.draw(CASES[name]))
    dy = np.broadcast_to(np.asarray(0.7, y.dtype), y.shape)
    for vjp in vjps.values():
        np.testing.assert_allclose(vjp(dy), vjp(dy.copy()), rtol=ROUNDING, atol=ROUNDING)


# ---- Choices that no slope can show


def test_stop_lets_nothing_back():
    """Catches a detach that leaks: y = x stop(x) has slope stop(x), not 2x."""
    x = Tensor(np.array([3.0, -2.0]))
    grads = backward(x * ops.stop(x), np.ones(2))
    np.testing.assert_array_equal(grads[x], [3.0, -2.0])
    assert not isinstance(ops.stop(x), Tensor)


def test_rounding_passes_the_gradient_straight_through():
    """Catches a zero gradient, the true derivative of a staircase."""
    x = Tensor(np.array([0.2, 1.7]))
    y = ops.round_through(x, to=np.round)
    np.testing.assert_array_equal(y.data, [0.0, 2.0])
    np.testing.assert_array_equal(backward(y, np.array([5.0, 7.0]))[x], [5.0, 7.0])


def test_cast_gives_the_gradient_back_in_the_input_dtype():
    """Catches a float64 gradient for a float32 weight."""
    x = Tensor(np.ones(3, np.float32))
    y = ops.cast(x, dtype=np.float64)
    assert y.dtype == np.float64
    assert backward(y, np.ones(3))[x].dtype == np.float32


def test_maximum_gives_a_tie_to_its_first_argument():
    """Catches a tie counted for both (gradient 2) or for neither."""
    a, b = Tensor(np.zeros(2)), Tensor(np.zeros(2))
    grads = backward(ops.maximum(a, b), np.ones(2))
    np.testing.assert_array_equal(grads[a], [1, 1])
    np.testing.assert_array_equal(grads[b], [0, 0])


def test_repeated_rows_of_an_embedding_add_up():
    """Catches `dw[ids] += dy`, which gives row 0 the gradient 1."""
    w = Tensor(np.zeros((4, 1)))
    g = backward(ops.take_rows(w, np.array([0, 0, 2])), np.ones((3, 1)))[w]
    np.testing.assert_array_equal(g, [[2], [0], [1], [0]])


@pytest.mark.parametrize("gate", [-800.0, -90.0, 0.0, 90.0, 800.0])
def test_gates_do_not_overflow(gate):
    """Catches e^800: swiglu and sigmoid reach their limits without a warning or NaN."""
    x, one = np.array([gate]), np.ones(1)
    s = 1.0 if gate > 40 else 0.5 if gate == 0 else np.exp(max(gate, -745.0)) if gate > -700 else 0.0
    np.testing.assert_allclose(nn_ops.sigmoid(x), [s], rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(nn_ops.swiglu(x, one), [gate * s], rtol=1e-12, atol=1e-300)


def test_matmul_refuses_vectors_and_linear_refuses_widths():
    """Catches NumPy's 1-D rules leaking in, and a message without the shapes."""
    with pytest.raises(SpecError, match=r"matrices, not shapes \(3,\) and \(3, 2\)"):
        ops.matmul(np.ones(3), np.ones((3, 2)))
    with pytest.raises(SpecError, match=r"x \(2, 3\) does not fit w \(5, 4\)"):
        nn_ops.linear(np.ones((2, 3)), np.ones((5, 4)))


@pytest.mark.parametrize("n", [0, 1, nn_ops.FEW, nn_ops.FEW + 1, nn_ops.SOME, nn_ops.SOME + 1])
@pytest.mark.parametrize("layout", ["rows", "columns", "every second"])
def test_few_rows_are_multiplied_as_many_are(n, layout):
    """Catches a transpose forgotten where few rows go another way, a result that is no row-major array, a stride taken for another.
    Oracle: float64 sums over products by loops of NumPy; float32 sums of 33 terms of order 1 err by less than 1e-5.
    """
    rng = np.random.default_rng(n)
    x, w = rng.standard_normal((2 * n, 33), dtype=np.float32), rng.standard_normal((5, 33), dtype=np.float32)
    rows = {"rows": x[:n], "columns": np.asfortranarray(x[:n]), "every second": x[::2]}[layout]
    expected = (rows[:, None].astype(np.float64) * w).sum(axis=-1)
    for found in (nn_ops.product(rows, w), nn_ops.product(rows, np.asfortranarray(w))):
        assert found.dtype == np.float32 and found.shape == (n, 5) and found.flags.c_contiguous
        np.testing.assert_allclose(found, expected, atol=1e-5)
