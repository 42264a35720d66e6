"""R 3.2: collectives in differentiable code. Each is a linear map over all ranks together; its vjp is the transpose."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import SpecError, Tensor, backward, directional, nn_ops, ops
from refimpl.parallel_emulation.collectives import duals, shares, slices
from refimpl.parallel_emulation.comm import Log, spmd

# name: (x is replicated, y is replicated); see the table in duals.py
PAIRS = {
    "copy_to": (True, False),
    "reduce_from": (False, True),
    "gather_from": (False, True),
    "scatter_to": (True, False),
    "all_gather": (False, False),
    "reduce_scatter": (False, False),
}
DUAL = {"copy_to": "reduce_from", "gather_from": "scatter_to", "all_gather": "reduce_scatter"}
SLICED = {"gather_from", "scatter_to", "all_gather", "reduce_scatter"}


def per_rank(rng, n, shapes, replicated):
    """One float64 array per rank, or the same one n times."""
    one = rng.standard_normal(shapes[0])
    return [one if replicated else rng.standard_normal(shape) for shape in shapes[:n]]


def inner(xs, ys, replicated):
    """<x, y> over all ranks; a replicated array counts once."""
    terms = [float((x * y).sum()) for x, y in zip(xs, ys, strict=True)]
    return terms[0] if replicated else sum(terms)


def apply(name, n, xs, dys=None, **static):
    """[y per rank], or with dys [dx per rank]."""

    def program(comm):
        leaf = Tensor(xs[comm.rank])
        y = getattr(duals, name)(leaf, comm=comm, **static)
        return y.data if dys is None else backward(y, dys[comm.rank])[leaf]

    return spmd(n, program, seed=n)


def shapes_of(name, n, axis, sizes):
    whole, parts = [2, 3], [[2, 3] for _ in range(n)]
    whole[axis] = sum(sizes)
    for part, size in zip(parts, sizes, strict=True):
        part[axis] = size
    return parts if name in ("gather_from", "all_gather") else [whole] * n


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_the_vjp_is_the_transpose_in_a_random_direction(name, uneven, n):
    """Catches a vjp without its all-reduce, or one too many: <dy, (f(x+hd) - f(x-hd)) / 2h> = <vjp(dy), d>.

    The maps are linear and everything is float64, so h = 1 is exact up to rounding: 1e-12 of sums of about 50 terms.
    """
    rng = np.random.default_rng(n)
    axis, sizes = 1, [r + 1 for r in range(n)] if uneven else [2] * n
    static = {"axis": axis, "sizes": sizes if uneven else None} if name in SLICED else {}
    shapes = shapes_of(name, n, axis, sizes)
    x_whole, y_whole = PAIRS[name]
    x, d = (per_rank(rng, n, shapes, x_whole) for _ in range(2))
    up, down = (apply(name, n, [a + s * b for a, b in zip(x, d, strict=True)], **static) for s in (1, -1))
    dy = per_rank(rng, n, [y.shape for y in up], y_whole)
    slope = inner(dy, [(a - b) / 2 for a, b in zip(up, down, strict=True)], y_whole)
    dx = apply(name, n, x, dy, **static)
    assert abs(slope - inner(dx, d, x_whole)) < 1e-12 * max(1, abs(slope)) * 50
    if x_whole:
        assert all(np.array_equal(g, dx[0]) for g in dx), "the gradient of a replicated array is the same on every rank"
    if y_whole:
        assert all(np.array_equal(y, up[0]) for y in up), "replicated means the same bits"


@pytest.mark.parametrize(("name", "dual"), [*DUAL.items(), *[(b, a) for a, b in DUAL.items()]])
def test_a_vjp_is_the_dual_of_the_pair(name, dual):
    """Catches pairs that are not each other's duals: backward of one gives the bits of forward of the other."""
    rng, n = np.random.default_rng(3), 3
    axis, sizes = 0, [2, 2, 2]
    x = per_rank(rng, n, shapes_of(name, n, axis, sizes), PAIRS[name][0])
    y = apply(name, n, x)
    dy = per_rank(rng, n, [a.shape for a in y], PAIRS[name][1])
    for got, want in zip(apply(name, n, x, dy), apply(dual, n, dy), strict=True):
        np.testing.assert_array_equal(got, want)


@given(st.integers(1, 4), st.data(), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_all_to_all_is_its_own_dual(n, data, seed):
    """Catches gradients sent back by the counts of forward instead of those received."""
    counts = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=n, max_size=n))
    rng = np.random.default_rng(seed)
    x, d = ([rng.standard_normal((sum(row), 2)) for row in counts] for _ in range(2))

    def program(comm, xs, dys):
        leaf = Tensor(xs[comm.rank])
        received = duals.exchange_counts(counts[comm.rank], comm=comm)
        y = duals.all_to_all(leaf, comm=comm, counts=counts[comm.rank])
        assert received.tolist() == [row[comm.rank] for row in counts]
        return y.data if dys is None else backward(y, dys[comm.rank])[leaf]

    y = spmd(n, program, d, None)
    dy = [rng.standard_normal(a.shape) for a in y]
    dx = spmd(n, program, x, dy)
    assert abs(inner(dy, y, False) - inner(dx, d, False)) < 1e-12 * 100


def serial_mlp(x, gate, up, down):
    """y = down(silu(x gate) * (x up)).  x (T, D), gate, up (D, F), down (F, D) -> y (T, D)."""
    return nn_ops.swiglu(x @ gate, x @ up) @ down


def mlp_rank(tp, x, gate, up, down):
    """The same with F split over the ranks: two more lines."""
    mine = slices(shares(gate.shape[1], tp.size))[tp.rank]
    gate, up, down = gate[:, mine], up[:, mine], down[mine]  # (D, F_tp), (D, F_tp), (F_tp, D)
    x = duals.copy_to(x, comm=tp, label="f")
    y = serial_mlp(x, gate, up, down)  # (T, D), partial over tp
    return duals.reduce_from(y, comm=tp, label="g")


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_w_ranks_give_what_one_rank_gives(n):
    """Catches a forgotten copy_to: forward would be right and the gradient of x one rank's share.

    float64 with sums of 7 terms in another order: 1e-13.  The serial gradients are checked by a central difference.
    """
    rng = np.random.default_rng(0)
    args = [rng.standard_normal(s) for s in ((5, 4), (4, 7), (4, 7), (7, 4))]
    dy = rng.standard_normal((5, 4))

    def run(function, *comm):
        leaves = [Tensor(a) for a in args]
        y = function(*comm, *leaves)
        grads = backward(y, dy)
        return y.data, [grads[leaf] for leaf in leaves]

    assert directional(serial_mlp, *args) < 1e-7
    want_y, want = run(serial_mlp)
    log, results = Log(), []
    results = spmd(n, lambda tp: run(mlp_rank, tp), log=log)
    for y, grads in results:
        np.testing.assert_allclose(y, want_y, rtol=0, atol=1e-13 * 50)
        np.testing.assert_allclose(grads[0], want[0], rtol=0, atol=1e-13 * 50)
    for i in (1, 2, 3):  # each rank has the gradient of its own slice, and zeros elsewhere
        np.testing.assert_allclose(sum(grads[i] for _, grads in results), want[i], rtol=0, atol=1e-13 * 50)
    ring = 2 * (n - 1) * dy.nbytes  # over all ranks: one all-reduce forward, one backward
    assert log.bytes(label="g.*") == log.bytes(label="f.bwd.*") == ring and log.bytes() == 2 * ring


def test_a_rank_without_a_backward_is_reported():
    """Catches a silent wrong gradient where one rank's input is a constant: the others wait for its all-reduce."""

    def program(comm):
        x = np.ones(3)
        leaf = x if comm.rank == 1 else Tensor(x)
        y = duals.copy_to(leaf, comm=comm, label="f")
        return backward(ops.sum(y)) if comm.rank != 1 else None

    with pytest.raises(SpecError, match=r"ranks 0, 2: alltoallv 'f.bwd.scatter' .* waits for rank 1, at collectives"):
        spmd(3, program)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda comm: duals.scatter_to(np.ones(4), comm=comm), "4 along axis 0 do not divide among 3 ranks"),
        (lambda comm: duals.scatter_to(np.ones(4), comm=comm, sizes=[1, 1, 1]), "for 3 ranks and 4 along axis 0"),
        (lambda comm: duals.exchange_counts([1, 2], comm=comm), r"counts have shape \(2,\), expected \(3,\)"),
    ],
)
def test_bad_input_is_refused(call, complaint):
    """Catches a world size that does not divide."""
    with pytest.raises(SpecError, match=complaint):
        spmd(3, call)
