"""R 3.2: collectives written from point-to-point. Sums have a stated order, so the oracle gives the same bits; steps and
bytes are those of the textbook formulas (n ranks, S bytes per rank), read from the log.
"""

import functools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import SpecError
from refimpl.parallel_emulation.collectives import collectives as c
from refimpl.parallel_emulation.collectives import two_hop
from refimpl.parallel_emulation.comm import Log, spmd

BF16 = np.dtype(ml_dtypes.bfloat16)
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)
shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)


def inputs(n, shape, dtype=np.float32, seed=0):
    """One array per rank, of very different sizes, so that another order of summation gives other bits."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, shape)).astype(dtype) for _ in range(n)]


def run(n, function, xs, **options):
    """([result per rank], log) of function(comm, xs[rank])."""
    log = Log()
    return spmd(n, lambda comm: function(comm, xs[comm.rank]), log=log, **options), log


def add(a, b):
    """One addition of the spec: wide, then rounded."""
    wide = np.float32 if a.dtype in (BF16, np.float16) else a.dtype
    return (a.astype(wide) + b.astype(wide)).astype(a.dtype)


def in_rank_order(xs):
    """x0 + x1 + ..., accumulated wide and rounded once."""
    wide = np.float32 if xs[0].dtype in (BF16, np.float16) else xs[0].dtype
    return functools.reduce(np.add, [x.astype(wide) for x in xs]).astype(xs[0].dtype)


def cut(flat, n):
    """np.array_split: the first pieces are one longer."""
    return np.array_split(flat, n)


# ---- Reductions


@given(st.integers(1, 7), shapes, st.sampled_from([np.float32, np.float64, BF16, np.int64]), seeds)
@few
def test_all_reduce_adds_in_rank_order(n, shape, dtype, seed):
    """Catches any other order: at 4 ranks a tree differs in a third of the elements."""
    xs = inputs(n, shape, dtype, seed)
    want = in_rank_order(xs)
    for got in run(n, c.all_reduce, xs)[0]:
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_array_equal(got, want)


def test_the_order_is_visible():
    """Catches inputs so tame that every order gives the same bits, which would make the tests of order empty."""
    xs = inputs(6, (500,))
    results = [run(6, f, xs)[0][0] for f in (c.all_reduce, c.ring_all_reduce, c.recursive_doubling_all_reduce)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 0.1 < (results[a] != results[b]).mean() < 0.9
        # Six additions err by 6 x 2^-24 of the sum of magnitudes at most, whatever the order.
        bound = 12 * 2.0**-24 * np.sum(np.abs(xs), axis=0)
        assert (np.abs(results[a] - results[b]) <= bound).all()


@given(st.integers(1, 7), shapes, st.sampled_from([np.float32, BF16]), seeds)
@few
def test_ring_all_reduce_adds_block_b_from_rank_b_plus_1_on(n, shape, dtype, seed):
    """Catches a ring claimed to be rank-ordered, and one that does not round the travelling bf16 sum at every hop."""
    xs = inputs(n, shape, dtype, seed)
    blocks = [cut(x.reshape(-1), n) for x in xs]
    want = [functools.reduce(add, [blocks[(b + 1 + i) % n][b] for i in range(n)]) for b in range(n)]
    for got in run(n, c.ring_all_reduce, xs)[0]:
        np.testing.assert_array_equal(got, np.concatenate(want).reshape(shape))
    if shape and n <= 7:
        rows = [x.reshape(-1) for x in xs]
        for rank, got in enumerate(run(n, c.ring_reduce_scatter, rows)[0]):
            np.testing.assert_array_equal(got, want[rank])


def tree(xs):
    """The sum as recursive doubling forms it: neighbours first."""
    return xs[0] if len(xs) == 1 else tree([add(xs[i], xs[i + 1]) for i in range(0, len(xs), 2)])


@given(st.integers(1, 9), shapes, st.sampled_from([np.float32, BF16]), seeds)
@few
def test_recursive_doubling_adds_in_tree_order(n, shape, dtype, seed):
    """Catches ranks that end with different bits, and rank numbers that are no power of two."""
    xs = inputs(n, shape, dtype, seed)
    whole = 2 ** int(math.log2(n))
    folded = [add(xs[r], xs[r + whole]) if r + whole < n else xs[r] for r in range(whole)]
    for got in run(n, c.recursive_doubling_all_reduce, xs)[0]:
        np.testing.assert_array_equal(got, tree(folded))


def test_bf16_is_added_in_float32_and_rounded_once():
    """Catches sums in bf16: 256 ones and more ones stay 256 there, since 257 is no bf16 number."""
    xs = [np.full(5, 256, BF16)] + [np.full(5, 1, BF16)] * 4
    assert run(5, c.all_reduce, xs)[0][2].astype(float).tolist() == [260.0] * 5
    ring = run(5, c.ring_all_reduce, xs)[0][0].astype(float)
    assert ring[0] == 260 and ring[4] == 256  # block 0 adds 1+1+1+1+256, block 4 adds 256+1+1+1+1, rounded at each hop


def test_a_maximum_is_a_reduction_too():
    """Catches a sum hidden in an algorithm that takes another operation (the loss over a split vocabulary needs max)."""
    xs = inputs(5, (4, 3))
    for f in (c.all_reduce, c.ring_all_reduce, c.recursive_doubling_all_reduce):
        got, _ = run(5, functools.partial(f, op=np.maximum), xs)
        np.testing.assert_array_equal(got[3], np.max(xs, axis=0))


@given(st.integers(1, 5), st.integers(0, 2), st.data(), seeds)
@few
def test_reduce_scatter_and_all_gather_along_any_axis_with_any_sizes(n, axis, data, seed):
    """Catches slices of the wrong axis or a wrong offset where shares are uneven or empty."""
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    shape = [2, 3, 2]
    shape[axis] = sum(sizes)
    xs = inputs(n, tuple(shape), seed=seed)
    want = np.split(in_rank_order(xs), np.cumsum(sizes)[:-1], axis=axis)
    mine, _ = run(n, functools.partial(c.reduce_scatter, axis=axis, sizes=sizes), xs)
    for got, w in zip(mine, want, strict=True):
        np.testing.assert_array_equal(got, w)
    for got in run(n, functools.partial(c.all_gather, axis=axis, sizes=sizes), mine)[0]:
        np.testing.assert_array_equal(got, np.concatenate(want, axis=axis))


def test_even_shares_need_no_sizes():
    """Catches the two all-gathers (one engine call, or by counts) disagreeing."""
    xs = inputs(3, (2, 6))
    scattered, _ = run(3, functools.partial(c.reduce_scatter, axis=1), xs)
    np.testing.assert_array_equal(np.concatenate(scattered, axis=1), in_rank_order(xs))
    plain, with_sizes = (
        run(3, functools.partial(c.all_gather, axis=1, sizes=s), scattered)[0] for s in (None, [2] * 3)
    )
    np.testing.assert_array_equal(plain[1], with_sizes[1])
    np.testing.assert_array_equal(run(3, c.ring_all_gather, xs)[0][2], np.concatenate(xs))


def test_shares_are_those_of_array_split():
    """Catches shards and collectives that cut differently."""
    for total in range(12):
        for n in range(1, 6):
            assert c.shares(total, n) == [len(p) for p in np.array_split(np.arange(total), n)]


# ---- Steps and bytes, with S and n from the formulas of the textbooks


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_all_reduce_costs(n):
    """Catches an algorithm that is right and sends too much: (n-1)/n S twice for the ring, S log2 n for doubling."""
    xs = inputs(n, (8 * 3 * 5,))  # divides among all n here
    size = xs[0].nbytes
    _, ring = run(n, c.ring_all_reduce, xs)
    _, direct = run(n, c.all_reduce, xs)
    _, double = run(n, c.recursive_doubling_all_reduce, xs)
    whole = 2 ** int(math.log2(n))
    for rank in range(n):
        assert ring.calls(rank=rank) == 2 * (n - 1)
        assert ring.bytes(rank=rank) == direct.bytes(rank=rank) == 2 * (n - 1) * size // n
        assert ring.bytes(rank=rank, label="*.scatter") == (n - 1) * size // n
        assert direct.calls(rank=rank) == 2
        assert {peer for r in ring.select(rank=rank) for peer, _ in r.sent} <= {(rank + 1) % n}
        if n == whole:
            assert double.calls(rank=rank) == math.log2(n)
            assert double.bytes(rank=rank) == math.log2(n) * size
    assert double.bytes() == (whole * math.log2(whole) + 2 * (n - whole)) * size


@given(st.integers(1, 9), st.integers(0, 40))
@few
def test_uneven_all_reduce_sends_only_what_is_needed(n, elements):
    """Catches padding: over all ranks the ring moves exactly 2(n-1) S bytes, however S divides."""
    xs = inputs(n, (elements,))
    for f in (c.ring_all_reduce, c.all_reduce):
        assert run(n, f, xs)[1].bytes() == 2 * (n - 1) * 4 * elements


ALL_TO_ALLS = [c.all_to_all, c.pairwise_all_to_all, c.ring_all_to_all, c.bruck_all_to_all]


@given(st.integers(1, 9), shapes, seeds)
@few
def test_every_all_to_all_is_a_transposition(n, shape, seed):
    """Catches a block that ends one rank too far, in particular where n is no power of two."""
    xs = inputs(n, (n, *shape), seed=seed)
    for f in ALL_TO_ALLS:
        for rank, got in enumerate(run(n, f, xs)[0]):
            np.testing.assert_array_equal(np.stack(got), np.stack([x[rank] for x in xs]))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8, 16])
def test_all_to_all_costs(n):
    """Catches extra steps and bytes: pairwise (n-1)/n S, neighbours only n/2 times that, Bruck S/2 in log2 n steps."""
    xs = inputs(n, (n, 5))
    size, block = xs[0].nbytes, 5 * 4
    one, pairwise, ring, bruck = (run(n, f, xs)[1] for f in ALL_TO_ALLS)
    for rank in range(n):
        assert one.calls(rank=rank) == 1 and pairwise.calls(rank=rank) == ring.calls(rank=rank) == n - 1
        assert one.bytes(rank=rank) == pairwise.bytes(rank=rank) == (n - 1) * size // n
        assert ring.bytes(rank=rank) * 2 == (n - 1) * size == n * pairwise.bytes(rank=rank)
        assert bruck.calls(rank=rank) == math.ceil(math.log2(n))
        assert bruck.bytes(rank=rank) == block * sum(bin(d).count("1") for d in range(n))
        if n & (n - 1) == 0:
            assert bruck.bytes(rank=rank) * 2 == math.log2(n) * size
        assert [r.sent for r in pairwise.select(rank=rank)] == [(((rank + s) % n, block),) for s in range(1, n)]
        assert {peer for r in ring.select(rank=rank) for peer, _ in r.sent} <= {(rank + 1) % n}


@given(st.integers(1, 6), st.data(), seeds)
@few
def test_all_to_alls_with_uneven_blocks(n, data, seed):
    """Catches blocks of different size mixed up on the way round the ring."""
    sizes = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=n, max_size=n))
    xs = [[x[0] for x in (inputs(1, (k, 2), seed=[seed, r, k]) for k in sizes[r])] for r in range(n)]
    for f in (c.pairwise_all_to_all, c.ring_all_to_all):
        for rank, got in enumerate(run(n, f, xs)[0]):
            for source, block in enumerate(got):
                np.testing.assert_array_equal(block, xs[source][rank])


# ---- Two hops: one copy per node over the rail, then inside the node


def direct(xs, needed, rank):
    """What rank `rank` receives, in the order (source rank, source row)."""
    found = [(x[t], s, t) for s, x in enumerate(xs) for t in range(len(x)) if needed[s][t, rank]]
    rows = np.array([f[0] for f in found], xs[0].dtype).reshape(-1, *xs[0].shape[1:])
    return rows, [f[1] for f in found], [f[2] for f in found]


layouts = st.tuples(st.integers(1, 4), st.integers(1, 3))  # nodes, GPUs in each


def masks(n, tokens, seed, density=0.4):
    rng = np.random.default_rng(seed)
    return [rng.random((t, n)) < density for t in tokens]


@given(layouts, st.data(), seeds)
@few
def test_two_hop_dispatch_delivers_what_a_direct_one_does(layout, data, seed):
    """Catches a row lost, doubled, or out of order at the relay; ranks with no rows, rows that nobody needs."""
    n = layout[0] * layout[1]
    tokens = data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    needed = masks(n, tokens, seed)
    xs = [inputs(1, (t, 3), BF16, [seed, i])[0] for i, t in enumerate(tokens)]

    def program(comm):
        return two_hop.dispatch(two_hop.make_nodes(comm, layout[1]), xs[comm.rank], needed[comm.rank])[:3]

    for rank, (rows, source, row) in enumerate(spmd(n, program, seed=1)):
        want = direct(xs, needed, rank)
        np.testing.assert_array_equal(rows, want[0])
        assert (source.tolist(), row.tolist()) == want[1:]


@given(layouts, st.booleans(), seeds)
@few
def test_two_hop_combine_rounds_where_deepep_does(layout, with_start, seed):
    """Catches a sum in another order, or without the rounding at the relay.  Oracle: loops over nodes and GPUs."""
    (nodes, gpus), n = layout, layout[0] * layout[1]
    needed = masks(n, [4] * n, seed)
    xs = inputs(n, (4, 3), BF16, seed)
    starts = inputs(n, (4, 3), np.float32, seed + 1)
    scale = np.random.default_rng(seed).uniform(0.5, 2, n).astype(np.float32)

    def program(comm):
        rows, _, _, route = two_hop.dispatch(two_hop.make_nodes(comm, gpus), xs[comm.rank], needed[comm.rank])
        y = (rows.astype(np.float32) * scale[comm.rank]).astype(BF16)
        return two_hop.combine(route, y, start=starts[comm.rank] if with_start else None)

    for rank, got in enumerate(spmd(n, program)):
        for t in range(4):
            total = starts[rank][t] if with_start else np.zeros(3, np.float32)
            for node in range(nodes):
                partial, used = np.zeros(3, np.float32), False
                for gpu in range(node * gpus, (node + 1) * gpus):
                    if needed[rank][t, gpu]:
                        row = (xs[rank][t].astype(np.float32) * scale[gpu]).astype(BF16)
                        partial, used = partial + row.astype(np.float32), True
                if used:
                    total = total + partial.astype(BF16).astype(np.float32)
            np.testing.assert_array_equal(got[t], total.astype(BF16))


@given(layouts, st.integers(0, 6), seeds)
@few
def test_two_hops_send_one_copy_per_node_then_one_per_gpu(layout, tokens, seed):
    """Catches a token sent twice to a node over IB, which is what the two hops are for."""
    (nodes, gpus), n = layout, layout[0] * layout[1]
    needed = masks(n, [tokens] * n, seed)
    xs, log = inputs(n, (tokens, 3), BF16, seed), Log()

    def program(comm):
        rows, _, _, route = two_hop.dispatch(two_hop.make_nodes(comm, gpus), xs[comm.rank], needed[comm.rank])
        return two_hop.combine(route, rows)

    spmd(n, program, log=log)
    address, row = 4 + 4, 3 * 2  # source rank and row; bf16 values
    per_node = [m.reshape(tokens, nodes, gpus).any(axis=2) for m in needed]
    ib = sum(int(m.sum() - m[:, r // gpus].sum()) for r, m in enumerate(per_node))
    relays = {(r, node): node * gpus + r % gpus for r in range(n) for node in range(nodes)}
    nvlink = sum(int(needed[r][:, g].sum()) for r in range(n) for g in range(n) if g != relays[r, g // gpus])
    assert log.bytes(label="dispatch.rail") == ib * (row + address + gpus)
    assert log.bytes(label="dispatch.node") == nvlink * (row + address)
    assert log.bytes(label="combine.rail") == ib * row and log.bytes(label="combine.node") == nvlink * row
    for record in log.select(label="*.rail"):
        assert all(peer % gpus == record.rank % gpus for peer, _ in record.sent), "a rail joins equal numbers"
    for record in log.select(label="*.node"):
        assert all(peer // gpus == record.rank // gpus for peer, _ in record.sent), "NVLink stays in the node"


def v3_gate(rng, tokens):
    """(T, 8) experts: 8 groups of 32, the 4 groups with the best two-score sums, the 8 best experts in them."""
    scores = rng.random((tokens, 8, 32))
    groups = np.argsort(-np.sort(scores, axis=2)[:, :, -2:].sum(axis=2), axis=1)[:, :4]
    kept = np.zeros((tokens, 8, 1), bool)
    np.put_along_axis(kept[:, :, 0], groups, True, axis=1)
    return np.argsort(-np.where(kept, scores, -1).reshape(tokens, 256), axis=1)[:, :8]


def test_v3_gating_at_64_ranks_saves_half_of_the_ib_copies():
    """Catches dedup that does not: 3.48 IB copies a token against 6.59 sent directly (x 1.9), 6.57 inside nodes.

    4096 tokens: a standard error of 0.01 copies.
    """
    n, gpus, tokens = 64, 8, 64
    experts = [v3_gate(np.random.default_rng(r), tokens) for r in range(n)]
    needed = [np.zeros((tokens, n), bool) for _ in range(n)]
    for mask, chosen in zip(needed, experts, strict=True):
        np.put_along_axis(mask, chosen // 4, True, axis=1)
    log = Log()
    xs = [np.zeros((tokens, 1), np.uint8)] * n
    spmd(n, lambda comm: two_hop.dispatch(two_hop.make_nodes(comm, gpus), xs[comm.rank], needed[comm.rank]), log=log)
    ib = log.bytes(label="dispatch.rail") / (1 + 8 + gpus) / (n * tokens)
    nvlink = log.bytes(label="dispatch.node") / (1 + 8) / (n * tokens)
    without = sum(int(m.sum() - m[:, r // gpus * gpus : (r // gpus + 1) * gpus].sum()) for r, m in enumerate(needed))
    assert abs(ib - 3.48) < 0.04 and abs(without / (n * tokens) - 6.59) < 0.06 and abs(nvlink - 6.57) < 0.06


# ---- Bad input


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda comm: c.reduce_scatter(comm, np.ones(4)), "4 along axis 0 do not divide among 3 ranks"),
        (lambda comm: c.reduce_scatter(comm, np.ones(4), sizes=[2, 1]), r"sizes \[2, 1\] for 3 ranks and 4 in all"),
        (lambda comm: c.reduce_scatter(comm, np.ones(4), sizes=[2, 3, -1]), "sizes"),
        (lambda comm: c.all_gather(comm, np.ones(2), sizes=[2, 2, 1]), r"rank 2 gives 2, sizes says \[2, 2, 1\]"),
        (lambda comm: c.all_to_all(comm, np.ones((2, 3))), "2 blocks for 3 ranks"),
        (lambda comm: c.bruck_all_to_all(comm, np.ones((4, 3))), "4 blocks for 3 ranks"),
        (lambda comm: two_hop.make_nodes(comm, 2), "3 ranks are not whole nodes of 2 GPUs"),
        (
            lambda comm: two_hop.dispatch(two_hop.make_nodes(comm, 3), np.ones((2, 4)), np.ones((2, 2), bool)),
            r"needed is bool\[2, 2\], expected bool\[2, 3\]",
        ),
    ],
)
def test_bad_input_is_refused(call, complaint):
    """Catches shapes that would be cut silently."""
    with pytest.raises(SpecError, match=complaint):
        spmd(3, call)


def test_sizes_that_differ_between_ranks_are_refused():
    """Catches a shard read with another rank's offsets."""
    with pytest.raises(SpecError, match="sizes says"):
        spmd(2, lambda comm: c.reduce_scatter(comm, np.ones(4), sizes=[[1, 3], [2, 2]][comm.rank]))
