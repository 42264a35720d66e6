"""Chapter 1's exercises, held against the specification's ops and tape."""

import numpy as np

from refimpl import Tensor, backward
from refimpl.autograd import nn_ops, ops


class Node:
    def __init__(self, value, edges=()):
        self.value, self.edges = value, list(edges)


def test_softmax_vjp(mine):
    """Catches the diagonal alone, and a sum over the wrong axis."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 5))
    leaf = Tensor(x)
    y = nn_ops.softmax(leaf)
    np.testing.assert_allclose(mine.softmax_vjp(y.data, dy), backward(y, dy)[leaf], rtol=1e-12, atol=1e-15)


def test_rms_norm(mine):
    """Catches the root treated as a constant, a gain's gradient for each row, eps outside of the root."""
    rng = np.random.default_rng(1)
    x, w, dy, eps = rng.normal(size=(4, 6)), rng.normal(size=6), rng.normal(size=(4, 6)), 0.1
    y, (vjp_x, vjp_w) = mine.rms_norm(x, w, eps)
    a, b = Tensor(x), Tensor(w)
    z = nn_ops.rms_norm(a, b, eps=eps)
    grads = backward(z, dy)
    for found, wanted in ((y, z.data), (vjp_x(dy), grads[a]), (vjp_w(dy), grads[b])):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)  # sums of six terms in another order


def test_gradients_of_values_used_twice(mine):
    """Catches assignment instead of addition, and a shared node handed on once for each path: d(x x + x x)/dx at 3 is 12."""
    x = Node(np.array(3.0))
    s = Node(x.value**2, [(x, lambda d: d * x.value), (x, lambda d: d * x.value)])
    y = Node(2 * s.value, [(s, lambda d: d), (s, lambda d: d)])
    grads = mine.gradients(y)
    assert grads[x] == 12 and grads[s] == 2 and grads[y] == 1
    leaf = Tensor(np.array(3.0))
    assert backward(ops.add(leaf * leaf, leaf * leaf))[leaf] == grads[x]


def test_gradients_of_a_deep_graph(mine):
    """Catches recursion, and work that doubles with every layer: both paths of 5,000 layers."""
    x = node = Node(np.array(1.0))
    for _ in range(5000):
        node = Node(node.value, [(node, lambda d: d / 2), (node, lambda d: d / 2)])
    assert mine.gradients(node)[x] == 1
