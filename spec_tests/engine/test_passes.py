"""Backward in parts: weight gradients on demand (R 3.2.1) and recomputation (R 3.2.3)."""

import gc
import tracemalloc

import numpy as np
import pytest

from refimpl.autograd import Parameter, Tensor, backward, nn_ops, ops, primitive, recompute

from .test_tape import leaf, random

# ---- Weight gradients on demand


def two_layers(x, w1, w2):
    """A loss in which w1 is used twice."""
    h = nn_ops.linear(x, w1)
    h = nn_ops.rms_norm(nn_ops.linear(h, w1) + h, w2, eps=1e-6)
    return ops.sum(ops.exp(h * 0.1))


def test_deferred_weight_gradients_are_the_same_bits_later():
    """Catches a W pass that changes the input gradients, the sum, or its order (R 3.2.1)."""
    x, w1, w2 = random(6, 4), random(4, 4, seed=1), random(4, seed=2)
    once = [Tensor(x), Parameter(w1), Parameter(w2)]
    at_once = backward(two_layers(*once))
    split, later = [Tensor(x), Parameter(w1), Parameter(w2)], []
    grads = backward(two_layers(*split), later=later)
    assert set(grads) == {split[0]} and len(later) == 3
    np.testing.assert_array_equal(grads[split[0]], at_once[once[0]])
    for run in later:
        run()
    for a, b in zip(split, once, strict=True):
        np.testing.assert_array_equal(grads[a], at_once[b])


def test_deferred_work_is_the_weights_own():
    """Catches a split in name only: no weight vjp may run before its thunk does."""
    ran = []

    @primitive
    def product(x, w):
        def vjp_w(dy):
            ran.append("W")
            return dy * x

        return x * w, (lambda dy: dy * w, vjp_w)

    later = []
    x, w = leaf(2.0), Parameter(np.array([3.0]))
    grads = backward(product(x, w), later=later)
    assert grads[x] == 3.0 and not ran and w not in grads
    later[0]()
    assert ran == ["W"] and grads[w] == 2.0


# ---- Recomputation


def segment(x, w):
    """A segment with large insides: eight times its input."""
    h = nn_ops.linear(x, w)
    return ops.sum(nn_ops.swiglu(h, ops.exp(h * 0.1)), axis=-1, keepdims=True)


@pytest.mark.parametrize("deferred", [False, True])
def test_recomputed_gradients_are_the_same_bits(deferred):
    """Catches a replay on other inputs, and weights that a wrapped segment forgets."""
    x, w = random(5, 3), random(8, 3, seed=1)
    results = []
    for f in (segment, recompute(segment)):
        leaves, later = (Tensor(x), Parameter(w)), []
        y = f(*leaves)
        grads = backward(y, random(5, 1, seed=2), later=later if deferred else None)
        for run in later:
            run()
        results.append((y.data, *(grads[t] for t in leaves)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_recomputation_holds_inputs_only():
    """Catches a tape kept inside the wrapper: eight segments hold one tenth of what they hold bare."""
    x, w = random(200, 4), random(64, 4, seed=1)

    def held(f):
        outputs = []

        def run():
            outputs.extend(f(Tensor(x), w) for _ in range(8))

        gc.collect()
        tracemalloc.start()
        run()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size

    assert held(recompute(segment)) < held(segment) / 10


def test_recompute_of_plain_arrays_is_the_function_itself():
    """Catches a wrapper that records, or needs Tensors."""
    x, w = random(5, 3), random(8, 3, seed=1)
    np.testing.assert_array_equal(recompute(segment)(x, w), segment(x, w))


def test_recompute_leaves_integers_and_unused_inputs_alone():
    """Catches a gradient for ids, and a missing (instead of zero) gradient for an unused array."""
    f = recompute(lambda w, ids, unused: ops.take_rows(w, ids))
    w, unused = leaf(1.0, 2.0, 3.0).reshape(3, 1), leaf(np.inf)
    grads = backward(f(w, np.array([2, 2]), unused), np.ones((2, 1)), keep=[w])
    np.testing.assert_array_equal(grads[w], [[0], [0], [2]])
    np.testing.assert_array_equal(grads[unused], [0])


def test_a_segment_runs_once_forward_and_once_again():
    """Catches a recomputation per argument: three inputs would cost three more forwards."""
    runs = []

    def counted(x, y, z):
        runs.append(1)
        return x * y + z

    leaves = [leaf(1.0), leaf(2.0), leaf(3.0)]
    backward(recompute(counted)(*leaves))
    assert len(runs) == 2
