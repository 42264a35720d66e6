"""The tape: what backward must do whatever the primitives are."""

import gc
import threading
import tracemalloc
import weakref

import numpy as np
import pytest

from refimpl.autograd import Gradients, Parameter, SpecError, Tensor, backward, directional, nn_ops, ops, primitive


def leaf(*values):
    return Tensor(np.array(values, np.float64))


def random(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# ---- Fan-out and order


def test_a_value_used_twice_gets_both_gradients():
    """Catches an engine that overwrites: d(x x)/dx at 3 would be 3 (early tinygrad)."""
    x = leaf(3.0)
    assert backward(x * x)[x] == 6.0


def test_a_leaf_used_three_times_gets_all_three():
    """Catches accumulation that stops at two: x x x at 2 has slope 12."""
    x = leaf(2.0)
    assert backward(x * x * x)[x] == 12.0
    x = leaf(5.0)
    assert backward(x + x + x)[x] == 3.0


def test_a_shared_interior_node_is_walked_once():
    """Catches a diamond counted twice: d(x^2 + x^2)/dx at 3 would be 24 (tinygrad's first fix)."""
    x = leaf(3.0)
    square = x * x
    assert backward(square + square)[x] == 12.0


def test_a_residual_stream_of_diamonds_doubles_each_time():
    """Catches exponential walks: 60 diamonds have 2^60 paths and one walk, slope 2^60."""
    x = leaf(1.0)
    y = x
    for _ in range(60):
        y = y + y
    assert backward(y)[x] == 2.0**60


def test_branches_of_unequal_length_meet_after_both_are_done():
    """Catches a walk in order of distance: y = x^2 + exp(exp(x^2)) needs x^2's gradient complete."""

    def f(x):
        s = x * x
        return s + ops.exp(ops.exp(s))

    assert directional(f, np.array([0.3, -0.7])) < 1e-6


def test_backward_visits_in_the_same_order_every_time():
    """Catches sets of nodes: in rank programs, two orders of collectives are a deadlock."""

    def order():
        seen = []

        @primitive
        def probe(x, *, name):
            def vjp_x(dy):
                seen.append(name)
                return dy

            return x * 1, (vjp_x,)

        xs = [Tensor(np.ones(1)) for _ in range(20)]
        parts = [probe(x, name=i) for i, x in enumerate(xs)]
        y = parts[0]
        for p in parts[1:]:
            y = y + p * parts[0]
        backward(y)
        return seen

    assert order() == order()


# ---- Depth and memory


@pytest.mark.parametrize("run_backward", [True, False])
def test_a_chain_of_20000_needs_no_recursion(run_backward):
    """Catches recursive walks, and recursive deallocation when the graph is dropped unused."""
    x = leaf(1.0)
    y = x
    for _ in range(20_000):
        y = y + 1.0
    if run_backward:
        assert backward(y)[x] == 1.0
    del y
    gc.collect()


def test_the_graph_is_freed_as_it_is_walked():
    """Catches a tape kept to the end: when the first op's vjp runs, the later ops' arrays are gone."""
    alive = []

    @primitive
    def watch(x):
        def vjp_x(dy):
            alive.append([r() is not None for r in refs])
            return dy

        return x * 1, (vjp_x,)

    x, refs = leaf(1.0), []
    y = watch(x)
    for _ in range(5):
        y = ops.exp(y * 0.1)
        refs.append(weakref.ref(y))
    backward(y)
    assert alive == [[False] * 4 + [True]]  # the caller holds the last one himself


def test_an_unused_graph_leaves_nothing_behind():
    """Catches a global tape: without a reference to y, its nodes die at once, no collector needed."""
    gc.disable()
    try:
        x = leaf(1.0)
        inner = x * 2.0
        ref = weakref.ref(inner)
        y = ops.exp(inner)
        del inner, y
        assert ref() is None
    finally:
        gc.enable()


def peak_of(run):
    """Peak bytes allocated while run() runs, above what was there."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    run()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return peak


def test_backward_of_a_long_chain_adds_a_few_arrays_only():
    """Catches a gradient kept for every node: 200 of 80 kB would be 16 MB, 4 suffice."""
    size = 10_000
    x = Tensor(random(size))
    y = x
    for _ in range(200):
        y = ops.exp(y * 1e-3)
    dy = np.ones(size)
    assert peak_of(lambda: backward(y, dy)) < 6 * 8 * size


# ---- Arguments of backward


def test_a_second_backward_through_a_used_graph_is_refused():
    """Catches silent zeros, or gradients counted twice."""
    x = leaf(2.0)
    y = x * x
    backward(y)
    with pytest.raises(SpecError, match="already used by an earlier backward"):
        backward(y)
    with pytest.raises(SpecError, match="already used"):
        backward(y + x)


def test_only_a_scalar_has_a_default_cotangent():
    """Catches an implicit sum over outputs."""
    y = leaf(1.0, 2.0) * 2.0
    with pytest.raises(SpecError, match=r"shape \(2,\) needs dy"):
        backward(y)


def test_a_cotangent_of_another_shape_is_refused():
    """Catches broadcasting of dy: (3,) against (3, 1) would pass silently."""
    y = Tensor(random(3, 1)) * 2.0
    with pytest.raises(SpecError, match=r"dy has shape \(3,\), y has \(3, 1\)"):
        backward(y, np.ones(3))


def test_a_plain_array_has_no_backward():
    """Catches an AttributeError where a sentence belongs."""
    with pytest.raises(SpecError, match="depends on no leaf"):
        backward(np.ones(()))


def test_a_vjp_of_the_wrong_shape_is_named():
    """Catches a shape bug that broadcasting would carry to a far place."""

    @primitive
    def careless(x):
        return x * 2, (lambda dy: dy.sum(axis=0),)

    with pytest.raises(SpecError, match=r"the vjp of careless returned \(2,\) .* shape \(3, 2\)"):
        backward(careless(Tensor(random(3, 2))), np.ones((3, 2)))


def test_a_tensor_has_no_truth_value():
    """Catches `if loss:` branches that are always taken."""
    with pytest.raises(SpecError, match="no truth value"):
        bool(leaf(0.0))


def test_into_accumulates_micro_batches():
    """Catches `into` that overwrites: two backwards into one result are the sum of two results."""
    w, batches = Parameter(random(3, 4)), [random(5, 4, seed=s) for s in (1, 2)]

    def run(x, into=None):
        y = nn_ops.linear(x, w)
        return backward(ops.sum(y * y), into=into)

    both = Gradients()
    for x in batches:
        assert run(x, both) is both
    np.testing.assert_array_equal(both[w], run(batches[0])[w] + run(batches[1])[w])


def test_keep_gives_inner_gradients_and_changes_no_other():
    """Catches an inner gradient read before all its parts arrived: h feeds two ops."""
    x = leaf(0.5, -1.0)
    h = x * 3.0
    y = ops.sum(h * h + ops.exp(h))
    grads = backward(y, keep=[h])
    np.testing.assert_allclose(grads[h], 2 * h.data + np.exp(h.data), rtol=1e-15)
    np.testing.assert_allclose(grads[x], 3 * grads[h], rtol=1e-15)
    assert set(backward(ops.sum(x * 3.0))) == {x}


# ---- Operators, threads


OPERATORS = {
    "+": lambda p, q: p + q,
    "-": lambda p, q: p - q,
    "*": lambda p, q: p * q,
    "/": lambda p, q: p / q,
    "@": lambda p, q: p @ q,
    "-, **": lambda p, q: -(p**2) + q,
    "sum, mean": lambda p, q: p.sum(axis=0) + q.mean() + p.mean(axis=1, keepdims=True),
    "shapes": lambda p, q: p.T[::-1].reshape(4) + q.transpose(1, 0).swapaxes(0, 1).reshape((4,)),
    "astype": lambda p, q: p.astype(np.float64) + q.astype(np.float64),
}


@pytest.mark.parametrize("which", OPERATORS)
def test_operators_are_the_ops_with_an_array_on_either_side(which):
    """Catches NumPy looping over a Tensor (array - Tensor as an object array) and swapped operands."""
    f, a, b = OPERATORS[which], random(2, 2), random(2, 2, seed=1)
    for p, q in ((a, Tensor(b)), (Tensor(a), b), (Tensor(a), Tensor(b))):
        y = f(p, q)
        assert isinstance(y, Tensor)
        np.testing.assert_allclose(y.data, f(a, b), rtol=1e-15)
    assert directional(f, a, b) < 1e-6


def test_threads_have_their_own_tapes():
    """Catches shared state: two threads at once get what each gets alone."""

    def gradient(seed):
        x = Tensor(random(4, 4, seed=seed))
        y = x
        for _ in range(300):
            y = ops.exp(y * 0.01) + x
        return backward(ops.sum(y))[x]

    results = {}
    threads = [threading.Thread(target=lambda s=s: results.__setitem__(s, gradient(s))) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for seed, g in results.items():
        np.testing.assert_array_equal(g, gradient(seed))
    assert len(results) == 4
