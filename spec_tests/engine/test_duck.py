"""The engine on arrays that are not NumPy's: the same code runs on CuPy. See cases/duck.py.

Catches `np.asarray` and its kin, index arrays made on the wrong side, and scalars where CuPy has
0-d arrays. What it cannot show is a NumPy function that CuPy lacks.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import Parameter, Tensor, backward, expert_ops, nn_ops, ops, recompute
from refimpl.spec_tests.cases.duck import Duck, wrapped
from refimpl.spec_tests.strategies.primitives import CASES, primitives

from .test_passes import two_layers

OPS = primitives()


@pytest.fixture(scope="module", autouse=True)
def plain_products():
    """A device's BLAS is its own; what is compared here is all else, so few rows are multiplied as many are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn_ops, "SOME", -1)
        yield


def same(duck, array):
    """A Duck with these bits, shape and dtype."""
    assert isinstance(duck, Duck)
    assert duck.dtype == array.dtype
    np.testing.assert_array_equal(duck.get(), array)
    assert duck.shape == np.shape(array)


def test_a_duck_refuses_to_be_a_numpy_array():
    """Catches a duck too tame to prove anything."""
    duck = Duck(np.arange(3.0))
    for misuse in (
        lambda: np.asarray(duck),
        lambda: np.ones(3) + duck,
        lambda: duck * np.ones(3),
        lambda: duck[np.array([0, 0])],
        lambda: np.concatenate([duck, np.ones(1)]),
        lambda: np.ones(3)[duck],
        lambda: list(np.ones((3, 3)) @ duck),
        lambda: duck.__setitem__(slice(None), np.ones(3)),
    ):
        with pytest.raises((TypeError, IndexError)):
            misuse()
    same(np.exp(duck[1:]) + 1, np.exp(np.arange(3.0)[1:]) + 1)


@pytest.mark.parametrize("name", sorted(OPS))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_primitive_gives_the_same_bits_on_a_device_array(name, data):
    """Catches any silent way to NumPy, forward or backward."""
    case = data.draw(CASES[name])
    y, vjps = OPS[name].raw(*case.args, **case.static)
    duck_y, duck_vjps = OPS[name].raw(*wrapped(case.args), **wrapped(case.static))
    same(duck_y, y)
    dy = np.random.default_rng(0).standard_normal(np.shape(y))
    for a, vjp, duck_vjp in zip(case.args, vjps, duck_vjps, strict=False):
        if vjp is not None and a is not None:
            same(duck_vjp(Duck(dy)), vjp(dy))


@pytest.mark.parametrize("wrap", [lambda f: f, recompute], ids=["direct", "recomputed"])
def test_backward_runs_on_a_device_array(wrap):
    """Catches a seed, an accumulation, or a recomputation that makes NumPy arrays."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in ((6, 4), (4, 4), (4,))]

    def gradients(values):
        leaves = [Tensor(values[0]), *map(Parameter, values[1:])]
        grads = backward(wrap(two_layers)(*leaves))
        return [grads[t] for t in leaves]

    for duck, array in zip(gradients([Duck(a) for a in arrays]), gradients(arrays), strict=True):
        same(duck, array)


def test_helpers_run_on_a_device_array():
    """Catches compositions outside the table: mean, concat, swapaxes, by_expert."""
    x, ids = np.arange(6.0).reshape(2, 3), np.array([[2, 0], [1, 2]])
    same(ops.mean(Duck(x), axis=1), ops.mean(x, axis=1))
    same(ops.concat([Duck(x), Duck(x)]), ops.concat([x, x]))
    same(ops.swapaxes(Duck(x), 0, 1), x.T)
    for duck, array in zip(expert_ops.by_expert(Duck(ids), 3), expert_ops.by_expert(ids, 3), strict=True):
        same(duck, array)
