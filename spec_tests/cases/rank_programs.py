"""Rank programs that run unchanged on the simulator and under mpiexec; test_mpi.py compares the two bit for bit.

Each takes the communicator and returns everything it computed. They use all dtypes, uneven and empty pieces, groups in
odd orders, and arithmetic whose result depends on the order of summation.
"""

import ml_dtypes
import numpy as np

from refimpl.autograd import Parameter, Tensor, backward, nn_ops, ops
from refimpl.parallel_emulation import older
from refimpl.parallel_emulation.collectives import collectives as c
from refimpl.parallel_emulation.collectives import duals, two_hop
from refimpl.parallel_emulation.comm import Recv, Send, split_into

ROW = np.dtype([("x", ml_dtypes.float8_e4m3fn, (4,)), ("scale", "<f4"), ("expert", "<i4", (2,))])
PADDED = np.dtype([("flag", "u1"), ("value", "<f8")], align=True)
NAMES = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn", "int4"]
PLAIN = ["bool", "uint8", "int64", "float16", "float32", ">f8", "complex64", "S3", "datetime64[s]"]
DTYPES = [np.dtype(getattr(ml_dtypes, name)) for name in NAMES] + [np.dtype(d) for d in PLAIN] + [ROW, PADDED]


def sample(dtype, shape, seed):
    """Any bit pattern of a dtype that has no forbidden ones (NaN payloads and all); text and booleans as they may be."""
    rng = np.random.default_rng(seed)
    if dtype.names:
        x = np.zeros(shape, dtype)
        for name in dtype.names:
            x[name] = sample(dtype[name].base, x[name].shape, seed + 1)
        return x
    if dtype.kind in "bS" or dtype.name == "int4":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8).view(dtype).reshape(shape)


def rough(comm, shape, dtype=np.float32, seed=0):
    """Numbers of very different size, so that another order of summation gives other bits."""
    rng = np.random.default_rng([seed, comm.rank])
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, shape)).astype(dtype)


def every_dtype(comm):
    """All calls with all dtypes."""
    n, found = comm.size, {}
    right, left = (comm.rank + 1) % n, (comm.rank - 1) % n
    for dtype in DTYPES:
        x = sample(dtype, (n * (n + 1) // 2, 3), 10 * comm.rank)
        rows, counts = comm.alltoallv(x, np.arange(1, n + 1), "rows")
        (ring,) = comm.exchange([(right, x[::2, 1:])], [Recv(left, like=x[::2, 1:])], "ring")
        everyone = comm.allgather(x[0], "rows of all")
        one = comm.broadcast(x if comm.rank == n - 1 else None, n - 1, "root")
        found[str(dtype)] = [rows, counts, ring, everyone, one]
    return found


def nothing_to_send(comm):
    """Empty arrays, empty rows, counts of zero, scalars, a message to oneself."""
    n, r = comm.size, comm.rank
    everything_to_last = [0] * (n - 1) + [3]
    return [
        comm.alltoallv(np.arange(3.0)[:, None] + r, everything_to_last, "to the last"),
        comm.alltoallv(np.zeros((0, 2), np.float32), [0] * n, "no rows"),
        comm.alltoallv(np.zeros((n, 0), np.int32), [1] * n, "rows of nothing"),
        comm.allgather(np.zeros((0, 3)), "empty"),
        comm.allgather(7 * r, "scalar"),
        comm.exchange([Send(r, np.float64(r))], [r], "myself"),
        comm.exchange(),
    ]


def groups(comm):
    """Splits by parity, reversed, of splits, and a list of groups; messages of two groups side by side."""
    n, r = comm.size, comm.rank
    back = comm.split(0, -r, "reversed")
    parity = comm.split(r % 2 - 7, r, "parity")
    again = parity.split(0, -parity.rank, "again")
    listed = split_into(comm, [list(range(1, n)), [0]], "listed")
    got = [[*g.ranks, g.rank, g.world_rank] for g in (comm, back, parity, again, listed)]
    got += [g.allgather(np.array([r, 10 * r]), "who") for g in (comm, back, parity, again, listed)]
    to, source = (r + 1) % n, (r - 1) % n
    comm.send(np.array([r]), to, "in comm")
    back.send(np.array([-r]), n - 1 - to, "in back")
    return [got, back.recv(n - 1 - source, "in back"), comm.recv(source, "in comm")]


def sums(comm):
    """Every reduction: rank order, rings, recursive doubling; even, uneven and fewer elements than ranks; bf16."""
    found = []
    for shape in ((comm.size, 5), (7, 3), (1,), ()):
        for dtype in (np.float32, ml_dtypes.bfloat16, np.float64):
            x = rough(comm, shape, dtype)
            kinds = (c.all_reduce, c.ring_all_reduce, c.recursive_doubling_all_reduce)
            found.append([reduce(comm, x) for reduce in kinds])
        found.append(c.all_reduce(comm, rough(comm, shape), "max", op=np.maximum))
    x = rough(comm, (2, 7, 3))
    sizes = c.shares(7, comm.size)
    mine = c.reduce_scatter(comm, x, "uneven", axis=1, sizes=sizes)
    ring = c.ring_reduce_scatter(comm, x[0], "ring uneven")
    return [found, mine, c.all_gather(comm, mine, "back", axis=1, sizes=sizes), ring, c.ring_all_gather(comm, ring)]


def all_to_alls(comm):
    """All-to-all in four ways."""
    n = comm.size
    x = rough(comm, (n, 2, 3), ml_dtypes.bfloat16)
    uneven = [rough(comm, (comm.rank + 2 * to, 2), seed=1) for to in range(n)]
    equal = [f(comm, x) for f in (c.all_to_all, c.pairwise_all_to_all, c.ring_all_to_all, c.bruck_all_to_all)]
    return [equal, c.pairwise_all_to_all(comm, uneven), c.ring_all_to_all(comm, uneven)]


def hops(comm):
    """Two-hop dispatch and combine, with all node sizes that divide the ranks."""
    found = []
    for gpus in [g for g in (1, 2, 3, 4) if comm.size % g == 0]:
        nodes = two_hop.make_nodes(comm, gpus)
        x = rough(comm, (6, 4), ml_dtypes.bfloat16)
        needed = np.random.default_rng([5, comm.rank]).random((6, comm.size)) < 0.5
        rows, source, row, route = two_hop.dispatch(nodes, x, needed)
        y = (rows.astype(np.float32) * (1 + comm.rank)).astype(x.dtype)
        found.append([rows, source, row, two_hop.combine(route, y, start=x)])
    return found


def tensor_parallel_mlp(comm):
    """A SwiGLU split over the ranks, column then row, and a sequence-parallel norm around it; forward and backward."""
    rng = np.random.default_rng(3)
    width, tokens, inner = 6, 4 * comm.size, 2 * comm.size + 1
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    gate, up, down = (
        rng.standard_normal(s).astype(np.float32) for s in [(inner, width), (inner, width), (width, inner)]
    )
    own = c.slices(c.shares(inner, comm.size))[comm.rank]
    leaf, gate, up, down = Tensor(x), Parameter(gate[own]), Parameter(up[own]), Parameter(down[:, own])
    mine = duals.scatter_to(leaf, comm=comm, label="sp.in")  # (T_tp, D)
    whole = duals.all_gather(mine, comm=comm, label="sp.gather")  # (T, D)
    hidden = nn_ops.swiglu(whole @ gate.T, whole @ up.T)  # (T, F_tp)
    y = duals.reduce_scatter(hidden @ down.T, comm=comm, label="sp.reduce")  # (T_tp, D)
    out = duals.gather_from(y, comm=comm, label="sp.out")
    loss = ops.sum(out * out)
    grads = backward(loss)
    return [loss.data, [grads[leaf] for leaf in (leaf, gate, up, down)]]


def expert_rows(comm):
    """Rows sent by counts and back, differentiably, with copy_to and reduce_from around them."""
    counts = (np.arange(comm.size) + comm.rank) % 3
    x = Tensor(rough(comm, (int(counts.sum()), 3), np.float64))
    weight = Parameter(rough(comm, (3,), np.float64, seed=9))
    received = duals.exchange_counts(counts, comm=comm)
    there = duals.all_to_all(x, comm=comm, counts=counts, label="dispatch")
    y = duals.all_to_all(there * weight, comm=comm, counts=received, label="combine")
    scale = Tensor(np.full(3, 2.0))
    loss = duals.reduce_from(ops.sum(y * y * duals.copy_to(scale, comm=comm)), comm=comm)
    grads = backward(loss)
    return [received, y.data, loss.data, grads[x], grads[weight], grads[scale]]


def toy_gradient(rank, step, w):
    """The gradient of a quadratic whose minimum differs between ranks."""
    return {name: x - np.sin(rank + 0.1 * step + np.arange(x.size)).astype(x.dtype) for name, x in w.items()}


TOY = {
    "model.embed_tokens.weight": np.linspace(-1, 1, 5).astype(np.float32),
    "model.layers.3.mlp.gate.weight": np.linspace(0, 1, 3).astype(np.float32),
    "lm_head.weight": np.linspace(2, 1, 4).astype(np.float32),
}


def parameter_server(comm):
    """An asynchronous parameter server whose workers arrive in bursts."""
    intervals = (("model.embed_tokens.*", 4), ("*.mlp.gate.*", 6))
    arrivals = [w for w in range(comm.size - 1, 0, -1) for _ in range(7)]
    return older.parameter_server(comm, TOY, toy_gradient, steps=7, lr=0.25, intervals=intervals, arrivals=arrivals)


def local_sgd(rank, rounds, w):
    """Three local steps."""
    for step in range(3):
        w = {name: w[name] - np.float32(0.2) * g for name, g in toy_gradient(rank, step + 3 * rounds, w).items()}
    return w


def federated(comm):
    """Federated averaging with uneven data."""
    return older.federated_averaging(comm, TOY, local_sgd, samples=comm.rank + 1, rounds=3)


PROGRAMS = [
    every_dtype,
    nothing_to_send,
    groups,
    sums,
    all_to_alls,
    hops,
    tensor_parallel_mlp,
    expert_rows,
    parameter_server,
    federated,
]


def echo(comm, *args):
    """What was given on the command line."""
    return list(args)


# ---- Programs that go wrong


def hangs(comm):
    """Rank 0 waits for a message that nobody sends."""
    if comm.rank == 0:
        comm.recv(1, "never sent")
    comm.barrier("after")


def returns_early(comm):
    """Rank 1 leaves while the others wait for it."""
    return None if comm.rank == 1 else comm.barrier("without 1")


def raises(comm):
    """Rank 1 fails while the others wait for it."""
    if comm.rank == 1:
        raise RuntimeError("expert 7 is on fire")
    comm.barrier("waiting")


def disagrees(comm):
    """Rank 1 is in another collective."""
    return comm.allgather(np.ones(3), "one") if comm.rank == 1 else comm.barrier("other")


def wrong_like(comm):
    """Rank 0 expects another shape than rank 1 sends."""
    if comm.rank == 1:
        comm.send(np.ones(3), 0, "row")
    if comm.rank == 0:
        comm.recv(1, "row", like=np.ones(4))
