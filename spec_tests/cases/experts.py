"""Cases of expert parallelism for the tests: tokens and choices of some ranks, and one rank's and many ranks' answer."""

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from refimpl.autograd import Parameter, Tensor, backward
from refimpl.layers import Dialect
from refimpl.layers.moe import MoE
from refimpl.layers.router import Routing
from refimpl.parallel_emulation.axes import expert as ep
from refimpl.parallel_emulation.axes.expert_layout import plan
from refimpl.parallel_emulation.axes.expert_wire import ONE_RANK, OWN, V1, V2, V2_SINGLE
from refimpl.parallel_emulation.collectives import make_nodes
from refimpl.parallel_emulation.comm import spmd
from refimpl.parallel_emulation.cost.traffic import count_copies

from .layer_programs import CONFIG, drawn, normal

RECIPES = {"V1": V1, "V2": V2, "V2_SINGLE": V2_SINGLE, "ONE_RANK": ONE_RANK}
D = 5


def rough(rng, *shape):
    """float32 numbers of very different size, so that another order of summation gives other bits."""
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, shape)).astype(np.float32)


def bf16(x):
    """float32 numbers rounded to bfloat16."""
    return np.float32(x).astype(ml_dtypes.bfloat16).astype(np.float32)


def wild(rng, *shape):
    """bfloat16 numbers, half of them +-2^30, which cancel: then a float32 sum of eight shows the order it was taken in."""
    return bf16(np.where(rng.random(shape) < 0.5, 2.0**30 * rng.choice([-1, 1], shape), rng.standard_normal(shape)))


class Case:
    """Tokens and choices of n ranks in nodes of `gpus`, `each` experts on a rank."""

    def __init__(self, n, gpus, each, k, tokens, seed, missing=0.0):
        rng = np.random.default_rng(seed)
        self.n, self.gpus, self.each, self.experts, self.k = n, gpus, each, n * each, k
        self.ids = [np.argsort(rng.random((t, n * each)), axis=1)[:, :k] for t in tokens]
        self.ids = [np.where(rng.random(i.shape) < missing, -1, i) for i in self.ids]
        self.x = [rough(rng, t, D) for t in tokens]
        self.w = [rng.random((t, k)).astype(np.float32) for t in tokens]

    def run(self, program, **options):
        """[program(nodes, rank) of each rank]."""
        return spmd(self.n, lambda comm: program(make_nodes(comm, self.gpus), comm.rank), **options)

    def received(self, rank):
        """(source, token) of every row that `rank` must get, in order."""
        mine = range(self.each * rank, self.each * (rank + 1))
        return [
            (s, t) for s in range(self.n) for t in range(len(self.ids[s])) if any(e in mine for e in self.ids[s][t])
        ]

    @property
    def copies(self):
        """Copies on the rails and inside the nodes, counted by the traffic model."""
        ids, source = np.concatenate(self.ids), np.repeat(np.arange(self.n), [len(i) for i in self.ids])
        c = count_copies(ids, source, self.experts, self.n, self.gpus)
        return round(c.remote_nodes * len(ids)), round(c.nvlink * len(ids))


@st.composite
def cases(draw, max_nodes=4, missing=True, least=0):
    """Up to 8 ranks, whole nodes, different numbers of tokens on each, some of them none."""
    gpus = draw(st.integers(1, 3))
    nodes = draw(st.integers(1, min(max_nodes, 8 // gpus)))
    each = draw(st.integers(1, 3))
    k = draw(st.integers(1, min(6, gpus * nodes * each)))
    tokens = draw(st.lists(st.integers(least, 4), min_size=gpus * nodes, max_size=gpus * nodes).filter(sum))
    gaps = draw(st.sampled_from([0.0, 0.3])) if missing else 0.0
    return Case(gpus * nodes, gpus, each, k, tokens, draw(st.integers(0, 10**6)), gaps)


def serial(m, x, ids, w, dy, through=lambda x: x, back=lambda y: y):
    """The routed experts of one rank with all tokens, given the routing: y, dx, dw and the experts' gradients."""
    m = m.map(lambda name, v: Parameter(v))
    leaves = Tensor(x), Tensor(w)
    y = back(m._routed(through(leaves[0])[None], Routing(None, ids[None], leaves[1][None])))[0]
    g = backward(y, dy)
    return {"y": y.data, "dx": g[leaves[0]], "dw": g[leaves[1]]} | {n: g[v] for n, v in m.named_weights() if v in g}


def parallel(m, case, dys, recipe, wire=OWN):
    """The same, every rank with its own tokens and experts, put together."""

    def program(nodes, rank):
        mine = ep.shard_moe(nodes.world, m).map(lambda name, v: Parameter(v))
        x, w = Tensor(case.x[rank]), Tensor(case.w[rank])
        h = plan(nodes, case.ids[rank], n_experts=case.experts, recipe=recipe, wire=wire)
        sent = ep.dispatch(x, w, handle=h)
        y = ep.routed_experts(mine, sent[:, :D], sent[:, D:], h.expert_of)
        z = ep.combine(y, handle=h)
        g = backward(z, dys[rank])
        return {"y": z.data, "dx": g[x], "dw": g[w]}, {n: g[v] for n, v in mine.named_weights() if v in g}

    got = case.run(program)
    whole = {name: np.concatenate([tokens[name] for tokens, _ in got]) for name in ("y", "dx", "dw")}
    for rank, (_, grads) in enumerate(got):
        for name, g in grads.items():
            _, e, rest = name.split(".", 2)
            whole[f"experts.{int(e) + rank * case.each}.{rest}"] = g
    return whole


def experts_of(case, dtype, early):
    """A layer of experts for the case, whose numbers are then of that dtype."""
    c = CONFIG.replace(
        hidden_size=D,
        n_routed_experts=case.experts,
        num_experts_per_tok=case.k,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        n_shared_experts=0,
        dialect=Dialect(routing_weight_on="activation" if early else "output"),
    )
    case.x, case.w = [x.astype(dtype) for x in case.x], [w.astype(dtype) for w in case.w]
    dys = [normal(*x.shape, seed=i, dtype=dtype) for i, x in enumerate(case.x)]
    m = drawn(MoE(c), dtype=dtype)
    del m.gate
    return m, dys
