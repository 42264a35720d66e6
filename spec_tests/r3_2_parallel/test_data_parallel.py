"""R 3.2: data parallelism with gradient accumulation, and ZeRO-1 in two reduction groups. W ranks train as one does."""

import math
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import SpecError
from refimpl.parallel_emulation.axes import data as dp
from refimpl.parallel_emulation.axes import expert as ep
from refimpl.parallel_emulation.axes.expert_wire import ONE_RANK
from refimpl.parallel_emulation.axes.placed import Placed, placed
from refimpl.parallel_emulation.collectives import make_nodes
from refimpl.parallel_emulation.comm import Log, spmd
from refimpl.spec_tests.cases import layer_programs
from refimpl.spec_tests.cases.layer_programs import normal
from refimpl.spec_tests.cases.small_models import SMALL, small
from refimpl.train import AdamState, AdamW, adamw, clip

OPT = AdamW(lr=0.05, weight_decay=0.1)


def update(weights, grads, state):
    return adamw(weights, grads, state or AdamState(), OPT)


def same(got, want):
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


# ---- Gradients


def squares(w, batch):
    """mean over samples of (w x)^2."""
    y = (w["w"] * batch).sum(axis=-1)
    return (y * y).sum() * (1.0 / len(batch))


sizes = st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=8).filter(lambda s: any(s))


@given(sizes, st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_gradients_of_all_ranks_and_micro_batches_are_those_of_one_mean(sizes, seed):
    """Catches a mean of means, a micro-batch counted by its number instead of its tokens, a rank without data that holds up
    the others. Bitwise the sum of each rank's sum, in rank order; against the formula up to the order of sums."""
    n, w = len(sizes), {"w": normal(3, seed=seed), "unused": normal(2)}
    data = [[normal(size, 3, seed=[seed, r, i]) for i, size in enumerate(s)] for r, s in enumerate(sizes)]

    def program(comm):
        loss, grads = dp.gradients(comm, squares, w, data[comm.rank], len)
        return loss, dp.all_reduced(comm, grads)

    got = spmd(n, program, seed=seed)
    x = np.concatenate([b for batches in data for b in batches])
    y = x @ w["w"]
    np.testing.assert_allclose(sum(loss for loss, _ in got), (y * y).mean(), rtol=1e-12)
    np.testing.assert_allclose(got[0][1]["w"], 2 * y @ x / len(x), rtol=0, atol=1e-12 * np.abs(y).max() ** 2)
    np.testing.assert_array_equal(got[0][1]["unused"], np.zeros(2))
    by_rank = [dp.accumulate(squares, w, batches, len, len(x))[1]["w"] for batches in data]
    want = by_rank[0]
    for g in by_rank[1:]:
        want = want + g
    for _, grads in got:
        np.testing.assert_array_equal(grads["w"], want)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_one_micro_batch_a_rank_has_the_bits_of_accumulation_on_one_rank(n):
    """Catches a sum over ranks in another order than that of accumulation; a loss divided by ranks, not by tokens."""
    data, w = [normal(1 + r % 3, 3, seed=r) for r in range(n)], {"w": normal(3)}
    total = sum(len(b) for b in data)

    def program(comm):
        return dp.all_reduced(comm, dp.gradients(comm, squares, w, [data[comm.rank]], len)[1])["w"]

    want = dp.accumulate(squares, w, data, len, total)[1]["w"]
    for g in spmd(n, program):
        np.testing.assert_array_equal(g, want)


# ---- ZeRO-1


@st.composite
def weight_sets(draw):
    """Names with shapes, some of them empty of most axes; float32 numbers."""
    shapes = draw(st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=4))
    return {f"w{i}": normal(*shape, seed=i, dtype=np.float32) for i, shape in enumerate(shapes)}


@given(weight_sets(), st.integers(1, 8), st.sampled_from([None, ml_dtypes.bfloat16]), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_zero1_has_the_bits_of_adamw_on_one_rank(weights, n, wire, seed):
    """Catches a shard cut elsewhere than its gradients, moments of another element, masters replaced by what was rounded
    for the wire, padding that leaks. Bitwise, since AdamW acts on each element by itself and sums are in rank order."""

    def gradient(rank, t):
        return {name: normal(*w.shape, seed=[seed, rank, t], dtype=np.float32) for name, w in weights.items()}

    def program(comm):
        shards, current = [dp.start(comm, weights, wire=wire)], [weights]
        for t in range(3):
            current, shards, _ = dp.step(shards, [gradient(comm.rank, t)], update)
        held = sum(m.size for m in shards[0].state.m.values())
        return current[0], held, len(shards[0].master)

    masters, state = {name: w.copy() for name, w in weights.items()}, AdamState()
    for t in range(3):
        grads = gradient(0, t)
        for rank in range(1, n):
            grads = {name: g + gradient(rank, t)[name] for name, g in grads.items()}
        masters, state = adamw(masters, grads, state, OPT)
    want = masters if wire is None else {k: w.astype(wire).astype(np.float32) for k, w in masters.items()}
    got, total = spmd(n, program, seed=seed), sum(w.size for w in weights.values())
    for current, _, shard in got:
        same(current, want)
        assert shard == -(-total // n)
    assert sum(held for _, held, _ in got) == total  # every moment is on one rank and on no other


def two_groups(comm, ep_size, steps, max_norm, wire=None):
    """Dense weights on all ranks; expert weights that ep_size ranks hold different ones of; ordinary AdamW."""
    which = comm.rank % ep_size
    same_experts = comm.split(which, comm.rank)
    dense, experts = _dense(), _experts(which)
    shards = [dp.start(comm, dense, wire=wire), dp.start(same_experts, experts, distinct=comm, wire=wire)]
    current, norms = [dense, experts], []
    for t in range(steps):
        grads = [_gradient(dense, comm.rank, t), _gradient(experts, comm.rank, t)]
        current, shards, norm = dp.step(shards, grads, update, max_norm=max_norm)
        norms.append(norm)
    return current, norms


def _dense():
    return {"a": normal(5, 3, seed=1, dtype=np.float32), "b": normal(4, seed=2, dtype=np.float32)}


def _experts(which):
    return {f"e{i}": normal(3, 2, seed=[9, which, i], dtype=np.float32) for i in range(2)}


def _gradient(weights, rank, t):
    return {n: normal(*w.shape, seed=[rank, t, w.size], dtype=np.float32) for n, w in weights.items()}


@pytest.mark.parametrize(("n", "ep_size"), [(1, 1), (2, 1), (2, 2), (4, 2), (6, 2), (6, 3), (8, 4)])
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_experts_are_reduced_among_the_ranks_that_hold_them_and_clipped_with_all_others(n, ep_size, max_norm):
    """Catches experts added up over all ranks, a norm of one group or one that counts dense weights once per expert group.

    The norm is a float64 sum of squares in another order (relative 1e-15); rounded to float32 the factor differs by one
    unit at most, 2^-24 relative, in which three steps of AdamW (lr 0.05) are insensitive: 1e-6."""
    got = spmd(n, two_groups, ep_size, 3, max_norm)
    whole = _dense() | {f"{which}.{name}": w for which in range(ep_size) for name, w in _experts(which).items()}
    state, norms = AdamState(), []
    for t in range(3):
        grads = {name: np.zeros_like(w) for name, w in whole.items()}
        for rank in range(n):
            part = _gradient(_dense(), rank, t)
            part |= {f"{rank % ep_size}.{k}": g for k, g in _gradient(_experts(0), rank, t).items()}
            grads |= {name: grads[name] + g for name, g in part.items()}
        norms.append(math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values())))
        if max_norm is not None:
            grads, _ = clip(grads, max_norm=max_norm)
        whole, state = adamw(whole, grads, state, OPT)
    for rank, ((dense, experts), found) in enumerate(got):
        mine = dense | {f"{rank % ep_size}.{name}": w for name, w in experts.items()}
        for name, w in mine.items():
            if max_norm == 0.5:
                np.testing.assert_allclose(w, whole[name], rtol=0, atol=1e-6)
            else:
                np.testing.assert_array_equal(w, whole[name])
        if max_norm is not None:
            np.testing.assert_allclose(found, norms, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("wire", [None, ml_dtypes.bfloat16])
def test_a_step_of_zero1_sends_what_an_all_reduce_sends(n, wire):
    """Catches gradients all-reduced whole, or working weights gathered in fp32: a rank sends (n-1)/n of 4 P bytes of gradients
    and (n-1)/n of s P bytes of weights, P padded to a multiple of n; with s = 4 those of one ring all-reduce."""
    log = Log()
    spmd(n, two_groups, 1, 1, None, wire, log=log)
    for rank in range(n):
        padded = [n * -(-19 // n), n * -(-12 // n)]
        sent = sum((n - 1) * p // n for p in padded)
        assert log.bytes(rank=rank, label="zero1.scatter") == 4 * sent
        assert log.bytes(rank=rank, label="zero1.gather") == (2 if wire else 4) * sent


@pytest.mark.parametrize("n", [1, 2, 3])
def test_clipping_is_that_of_torch(n):
    """Catches max_norm / norm, and a norm of my shard: gradients of norm 5e-6 are clipped to 1e-6 / (5e-6 + 1e-6)."""
    w, g = {"w": np.ones(4)}, {"w": np.array([3e-6, 0, 0, 4e-6]) / n}

    def program(comm):
        shard = dp.start(comm, w, master=np.float64)
        return dp.step([shard], [g], lambda w, g, state: ({k: w[k] - g[k] for k in w}, state), max_norm=1e-6)

    for (new,), _, norm in spmd(n, program):
        np.testing.assert_allclose(norm, 5e-6, rtol=1e-12)
        np.testing.assert_allclose(1 - new["w"], np.array([3e-6, 0, 0, 4e-6]) / 6, rtol=0, atol=1e-15)


# ---- Training


def model_of(c, world):
    """The model on one rank (no world), or with the experts of two expert-parallel ranks in their place."""
    model = small(seed=3, **c)
    if world is not None:
        nodes = make_nodes(world.split(world.rank // 2, world.rank), 1)
        experts = [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")]
        for layer in experts:
            mine = Placed(ep.shard_moe(nodes.world, layer.mlp), partial(ep.moe, nodes, recipe=ONE_RANK))
            at = model.model.layers.index(layer)
            model.model.layers[at] = placed(layer, mlp=mine)
    return model


def data_of(rank, step):
    """Two micro-batches of a rank, of different sizes."""
    rng = np.random.default_rng([rank, step])
    return [rng.integers(0, SMALL.vocab_size, (1 + (rank + i) % 2, 5 + i)) for i in range(2)]


def counted(tokens):
    """Labels that count."""
    return tokens.shape[0] * (tokens.shape[1] - 1)


def train(model, weights, step):
    """`step(loss of a model with these leaves, t)` three times."""

    def loss(leaves, tokens):
        m = model.map(lambda name, w: leaves.get(name, w))
        return m.loss(m.inputs(tokens, labels=tokens), mtp_weight=0.3)[0]

    for t in range(3):
        weights = step(loss, weights, t)
    return weights


def trainable(model):
    return {n: w for n, w in model.named_weights() if hasattr(w, "dtype") and not n.endswith("_bias")}


def test_a_small_v3_with_mtp_trains_on_four_ranks_as_on_one():
    """Catches gradients of experts scaled by another number of tokens than dense ones, of MTP or router in the wrong
    group, a shared embedding reduced twice. DP 4 for dense weights, EP 2 x DP 2 for experts, two micro-batches of
    different sizes a rank, AdamW with clipping. float64: three steps of sums in another order, far below 1e-9."""
    c = {"num_nextn_predict_layers": 1}

    def program(world):
        model = model_of(c, world)
        split = world.split(world.rank % 2, world.rank)  # the ranks with the same experts
        everything = trainable(model)
        parts = [{n: w for n, w in everything.items() if (".experts." in n) == e} for e in (False, True)]
        state = {"shards": [dp.start(world, parts[0], master=np.float64)]}
        state["shards"] += [dp.start(split, parts[1], distinct=world, master=np.float64)]

        def step(loss, weights, t):
            _, grads = dp.gradients(world, loss, weights, data_of(world.rank, t), counted)
            grads = [{n: grads[n] for n in part} for part in parts]
            new, state["shards"], _ = dp.step(state["shards"], grads, update, max_norm=1.0)
            return new[0] | new[1]

        return train(model, everything, step)

    def alone():
        model, state = model_of(c, None), {"adam": AdamState()}

        def step(loss, weights, t):
            batches = [b for rank in range(4) for b in data_of(rank, t)]
            _, grads = dp.accumulate(loss, weights, batches, counted, sum(map(counted, batches)))
            grads, _ = clip(grads, max_norm=1.0)
            new, state["adam"] = adamw(weights, grads, state["adam"], OPT)
            return new

        return train(model, trainable(model), step)

    want, start = alone(), trainable(model_of(c, None))
    assert min(np.abs(want[n] - start[n]).max() for n in want if ".experts." not in n) > 0.01  # everything has moved
    for rank, got in enumerate(spmd(4, program)):
        for name, w in got.items():
            head, dot, tail = name.partition(".experts.")
            number, _, rest = tail.partition(".")
            there = f"{head}{dot}{int(number) + rank % 2 * 6}.{rest}" if dot else name
            np.testing.assert_allclose(w, want[there], rtol=0, atol=1e-9, err_msg=f"rank {rank}: {name}")


# ---- Bad input


def one_shard(comm, weights=None):
    return dp.start(comm, weights or {"w": np.zeros(3)})


def forgets(weights, grads, state):
    return {}, state


BAD = {
    "no token of any rank counts": lambda c: dp.gradients(c, squares, {"w": np.zeros(3)}, [], len),
    "a reduction group without weights": lambda c: dp.start(c, {}),
    r"have one dtype, not \['float32', 'float64'\]": lambda c: one_shard(
        c, {"a": np.zeros(1), "b": np.zeros(1, np.float32)}
    ),
    r"names differ: \['v', 'w'\]": lambda c: dp.step([one_shard(c)], [{"v": np.zeros(3)}], update),
    r"w has shape \(4,\), expected \(3,\)": lambda c: dp.step([one_shard(c)], [{"w": np.zeros(4)}], update),
    "2 sets of gradients for 1 shards": lambda c: dp.step([one_shard(c)], [{}, {}], update),
    "the update returned other weights": lambda c: dp.step([one_shard(c)], [{"w": np.zeros(3)}], forgets),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused(message):
    """Catches weights and gradients matched by position instead of name, and a loss divided by nothing."""
    with pytest.raises(SpecError, match=message):
        spmd(2, BAD[message])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_programs_for_mpi_are_independent_of_the_order_in_which_ranks_run(n):
    """Catches a rank program that works thanks to the simulator's order or its buffered sends."""
    for program in layer_programs.PROGRAMS:
        first = spmd(n, program)
        for options in ({"seed": 1}, {"seed": 2, "send_mode": "synchronous"}):
            for got, want in zip(spmd(n, program, **options), first, strict=True):
                same(got, want)
