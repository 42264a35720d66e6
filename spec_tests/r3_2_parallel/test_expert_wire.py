"""R 3.2.2, 3.3.3: what dispatch and combine put on the wires, in which format, and where combine rounds."""

from functools import partial

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import Tensor, backward, ops, primitive
from refimpl.parallel_emulation.axes import expert as ep
from refimpl.parallel_emulation.axes.expert_layout import plan
from refimpl.parallel_emulation.axes.expert_wire import ONE_RANK, OWN, V1, V2_SINGLE, Wire, pack, unpack
from refimpl.parallel_emulation.collectives import make_nodes, two_hop
from refimpl.parallel_emulation.comm import Log, spmd
from refimpl.parallel_emulation.cost.traffic import fp8_row, uniform_choices
from refimpl.spec_tests.cases import layer_programs
from refimpl.spec_tests.cases.experts import RECIPES, Case, D, bf16, cases, experts_of, parallel, rough, serial, wild

# ---- Rounding points


def one_by_one(terms, start=None):
    """A float32 sum from the left."""
    total = np.zeros(D, np.float32) if start is None else start
    for term in terms:
        total = (total + term).astype(np.float32)
    return total


def v1(rows, ids, bias, each, gpus):
    """DeepEP V1: a rank's experts to BF16, a node's ranks ascending to BF16, the nodes ascending onto the bias."""
    ranks = {r: bf16(one_by_one(rows[ids // each == r])) for r in sorted(set(ids[ids >= 0] // each))}
    nodes = {}
    for r, value in ranks.items():
        nodes.setdefault(r // gpus, []).append(value)
    return bf16(one_by_one([bf16(one_by_one(nodes[n])) for n in sorted(nodes)], bias))


def v2(rows, ids, bias, each, gpus):
    """DeepEP V2's reference: a group's sum goes to its last slot and the others become nothing; then the next level."""
    rows, there = list(rows), ids >= 0
    for size in (each, each * gpus):
        for group in set(ids[ids >= 0] // size):
            slots = np.flatnonzero(there & (ids // size == group))
            rows[slots[-1]] = bf16(one_by_one([rows[s] for s in slots]))
            there[slots[:-1]] = False
    return bf16(one_by_one([rows[s] for s in np.flatnonzero(there)], bias))


def v2_single(rows, ids, bias, each, gpus):
    """DeepEP V2 without multiple reductions: all choices in slot order, one rounding."""
    return bf16(one_by_one(rows[ids >= 0], bias))


ORACLES = {"V1": v1, "V2": v2, "V2_SINGLE": v2_single}


def combined(case, name, n_biases):
    """[combine of each rank], of BF16 rows made from (source, token, slot), and what those rows were."""
    rng = np.random.default_rng(1)
    rows = [wild(rng, *i.shape, D) for i in case.ids]
    biases = [[wild(rng, len(i), D) for _ in range(n_biases)] for i in case.ids]

    def program(nodes, rank):
        h = plan(nodes, case.ids[rank], n_experts=case.experts, recipe=RECIPES[name], wire=Wire("bf16", "bf16"))
        source, token = h.source[h.row_of], h.token[h.row_of]
        y = [rows[s][t, k] for s, t, k in zip(source, token, h.slot_of, strict=True)]
        y = np.array(y, np.float32).reshape(-1, D)
        return ep.combine(y, *biases[rank], handle=h)

    return case.run(program), rows, biases


@given(cases(), st.sampled_from(sorted(ORACLES)), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_combine_rounds_where_and_in_which_order_deepep_does(case, name, n_biases):
    """Catches a sum that is not rounded at the relay, nodes or slots in another order, a bias added behind the rounding.
    Bit for bit, against loops over single tokens."""
    case.gpus = case.gpus if RECIPES[name].local else 1
    got, rows, biases = combined(case, name, n_biases)
    for rank, z in enumerate(got):
        for t, ids in enumerate(case.ids[rank]):
            bias = one_by_one([b[t] for b in biases[rank]]) if n_biases else None
            want = ORACLES[name](rows[rank][t], ids, bias, case.each, case.gpus)
            np.testing.assert_array_equal(z[t], want)


def test_the_recipes_give_different_bits():
    """Catches options that change nothing: on 9 ranks in 3 nodes they all differ, and over one hop and two as well."""
    two, one = (Case(9, gpus, 2, 8, [20] * 9, 0) for gpus in (3, 1))
    runs = [(two, "V1"), (two, "V2"), (one, "V1"), (one, "V2"), (one, "V2_SINGLE")]
    found = [np.concatenate(combined(case, name, 0)[0]) for case, name in runs]
    for i, a in enumerate(found):
        for b in found[:i]:
            assert 0.02 < (a != b).mean() < 0.98


@given(cases())
@settings(max_examples=20, deadline=None)
def test_v1_over_two_hops_is_the_transport_of_two_hop(case):
    """Catches two implementations of one definition that drift apart: `two_hop.combine` adds up the same way."""

    def program(nodes, rank):
        h = plan(nodes, case.ids[rank], n_experts=case.experts, wire=Wire("bf16", "bf16"))
        y = wild(np.random.default_rng(rank), len(h.row_of), D)
        mine = ep.combine(y, handle=h)
        sums = np.zeros((len(h.token), D), np.float32)
        np.add.at(sums, h.row_of, y)  # in slot order
        return mine, two_hop.combine(h.route, sums.astype(ml_dtypes.bfloat16))

    for mine, theirs in case.run(program):
        np.testing.assert_array_equal(mine, theirs.astype(np.float32))


# ---- FP8


@primitive
def quantised_backward(y):
    """y; its gradient goes through FP8."""
    return y, (lambda dy: unpack(pack(dy[0], D, "fp8"), dy.dtype)[None],)


def through_fp8(x):
    return unpack(pack(x, x.shape[1], "fp8"), x.dtype)


@given(cases(missing=False))
@settings(max_examples=25, deadline=None)
def test_fp8_dispatch_is_one_rank_whose_experts_see_quantised_rows(case):
    """Catches rows quantised on the way back too, gradients not quantised on the way there, scales mixed up between rows.
    Bitwise: R 3.3.3 quantises the experts' input and the gradient of their output, and nothing else."""
    case.gpus = 1
    m, dys = experts_of(case, np.float32, False)
    tokens = [np.concatenate(part) for part in (case.x, case.ids, case.w)]
    to_fp8 = partial(ops.round_through, to=through_fp8)
    want = serial(m, *tokens, np.concatenate(dys), to_fp8, quantised_backward)
    got = parallel(m, case, dys, ONE_RANK, Wire("fp8", "own"))
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_fp8_rows_are_codes_and_power_of_two_scales_per_128():
    """Catches one scale per row, scales that are no powers of two (R 3.3.3), an error beyond half a unit of three bits:
    2^-4 relative, or of the scale's smallest step."""
    x = rough(np.random.default_rng(0), 6, 300)
    weights = np.random.default_rng(1).random((6, 8)).astype(np.float32)
    sent = pack(np.concatenate([x, weights], axis=1), 300, "fp8")
    assert sent.dtype.itemsize == 300 + 3 * 4 + 8 * 4 == fp8_row(300) + 32
    assert sent["x"].dtype == ml_dtypes.float8_e4m3fn and sent["scales"].shape == (6, 3)
    mantissa, _ = np.frexp(sent["scales"])
    assert (mantissa == 0.5).all()
    got = unpack(sent, np.float32)
    np.testing.assert_array_equal(got[:, 300:], weights)
    scale = np.repeat(sent["scales"], 128, axis=1)[:, :300]
    assert (np.abs(got[:, :300] - x) <= np.maximum(np.abs(x) * 2**-4, scale * 2**-10)).all()
    values = np.concatenate([sent["x"][:, a : a + 128].astype(np.float32).ravel() for a in (0, 128)])
    assert np.abs(values).max() > 224  # the scale is the smallest power of two that fits
    np.testing.assert_array_equal(through_fp8(got[:, :300]), got[:, :300])  # an FP8 GEMM quantises again: nothing more


# ---- Bytes


def test_bytes_of_a_row_are_those_of_the_published_kernels():
    """Catches a scale or a weight that does not travel, or travels wider: 7168 FP8 + 56 scales + 8 weights a token."""
    both = np.zeros((1, 7168 + 8), np.float32)
    assert [pack(both, 7168, f).dtype.itemsize for f in ("fp8", "bf16")] == [7168 + 224 + 32, 14336 + 32]
    assert pack(both, 7168, "own").nbytes == 4 * 7176
    assert pack(both[:, :7168], 7168, "bf16").nbytes == 14336
    assert fp8_row(7168) == 7392


@given(cases(), st.sampled_from(["V1", "V2"]), st.sampled_from(["own", "bf16", "fp8"]))
@settings(max_examples=30, deadline=None)
def test_bytes_on_the_log_are_copies_times_row_bytes_both_ways(case, name, fmt):
    """Catches a token sent once per expert instead of once per rank or node, numbers of experts sent again in backward (the
    handle is cached), a combine that returns more than one row per copy."""
    rail, node = case.copies
    log, wire = Log(), Wire(fmt, "own" if fmt == "own" else "bf16")

    def program(nodes, rank):
        h = plan(nodes, case.ids[rank], n_experts=case.experts, recipe=RECIPES[name], wire=wire)
        x, w = Tensor(case.x[rank]), Tensor(case.w[rank])
        sent = ep.dispatch(x, w, handle=h)
        z = ep.combine(sent[:, :D], handle=h)
        backward(z, case.x[rank])

    case.run(program, log=log)
    there = {"own": 4, "bf16": 2, "fp8": 1}[fmt] * D + (4 if fmt == "fp8" else 0)
    back = D * (4 if fmt == "own" else 2)
    sizes = {
        "dispatch": there + 4 * case.k,  # rows and their weights
        "dispatch.bwd": back + 4 * case.k,  # dx and the weights' gradients
        "combine": back,
        "combine.bwd": there,  # gradients alone: no numbers, no weights
    }
    for label, size in sizes.items():
        assert log.bytes(label=f"{label}.rail") == rail * size, label
        assert log.bytes(label=f"{label}.node") == node * size, label
    assert log.bytes(label="plan.rail") == rail * (4 * case.k + 8 + case.gpus)
    assert log.bytes(label="plan.node") == node * (4 * case.k + 8)
    assert log.bytes(label="plan.slots") == (2 * node if name == "V2" else 0)


def test_a_recipe_without_local_sums_returns_one_row_per_choice():
    """Catches a saving that is not there: K rows a token come back instead of one per rank."""
    case, log = Case(4, 1, 3, 5, [6, 2, 0, 4], 0), Log()

    def program(nodes, rank):
        h = plan(nodes, case.ids[rank], n_experts=case.experts, recipe=V2_SINGLE)
        ep.combine(np.zeros((len(h.row_of), D)), handle=h)

    case.run(program, log=log)
    away = sum(int((ids // 3 != rank).sum()) for rank, ids in enumerate(case.ids))
    assert log.bytes(label="combine.rail") == away * D * 8


def test_two_hops_send_each_token_at_most_four_times_over_the_rails():
    """Catches deduplication that is none: with V3's gate (8 groups = 8 nodes, 4 of them) at most 4 copies leave a rank,
    of which with uniform scores 3.5 leave the node, where direct sending has about 6.6 (R 3.2.2)."""
    n, gpus, tokens = 16, 2, 24
    rng = np.random.default_rng(0)
    ids = [uniform_choices(rng, tokens, 64, 8, 8, 4) for _ in range(n)]
    logs = Log(), Log()
    for g, log in zip((gpus, 1), logs, strict=True):

        def program(comm, g=g):
            h = plan(make_nodes(comm, g), ids[comm.rank], n_experts=64)
            ep.deliver(h, np.zeros((tokens, D), np.float32), np.zeros((tokens, 8), np.float32))

        spmd(n, program, log=log)
    row = 4 * (D + 8)
    crossing = logs[1].matrix(n, label="dispatch.rail").reshape(8, gpus, 8, gpus).sum(axis=(1, 3))
    direct = (crossing.sum() - np.trace(crossing)) / row / (n * tokens)
    two = logs[0].bytes(label="dispatch.rail") / row / (n * tokens)
    assert two <= 4 and max(logs[0].bytes(rank=r, label="dispatch.rail") for r in range(n)) <= 4 * tokens * row
    assert 3.3 < two < 3.7 and direct > 1.3 * two


def test_training_precision_gives_deterministic_results_close_to_those_without():
    """Catches a seed of the simulator, an order of ranks or a transport that shows in the bits; FP8 rows carry a relative
    error of 2^-4 at most in each value, so that outputs of random experts move by some percent."""
    exact = spmd(4, layer_programs.moe, V1, OWN, 2, np.float32)
    runs = [spmd(4, layer_programs.moe_v3_training, seed=seed) for seed in (None, 1, 2)]
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert all(np.array_equal(a[name], b[name]) for name in b)
    for rough_, want in zip(runs[0], exact, strict=True):
        for name in ("y", "dx"):
            error = np.linalg.norm(rough_[name] - want[name]) / np.linalg.norm(want[name])
            assert 1e-4 < error < 0.06
