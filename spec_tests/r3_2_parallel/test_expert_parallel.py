"""R 3.2.2: expert parallelism as DeepEP documents it: layout, order, and the results of one rank."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import SpecError, Tensor, backward
from refimpl.layers.block import DecoderLayer
from refimpl.parallel_emulation.axes import expert as ep
from refimpl.parallel_emulation.axes.expert_layout import layout, plan
from refimpl.parallel_emulation.axes.expert_wire import ONE_RANK, OWN, Recipe, Wire, pack
from refimpl.parallel_emulation.collectives import make_nodes
from refimpl.parallel_emulation.comm import Log, spmd
from refimpl.parallel_emulation.cost.traffic import count_copies
from refimpl.spec_tests.cases import layer_programs
from refimpl.spec_tests.cases.experts import RECIPES, Case, D, cases, experts_of, parallel, serial
from refimpl.spec_tests.cases.layer_programs import CONFIG, drawn, normal, pull, surroundings

CLOSE = {"rtol": 0, "atol": 1e-10}  # sums of float64 in another order, of a few hundred terms of order 1 to 100


# ---- Layout and dispatch


@given(cases())
@settings(max_examples=40, deadline=None)
def test_the_layout_counts_a_token_once_per_rank_and_node_and_once_per_choice(case):
    """Catches tokens counted per choice where they travel once, and -1 counted as an expert."""
    for ids in case.ids:
        got = layout(ids, n_experts=case.experts, ranks=case.n, gpus=case.gpus)
        ranks = [{e // case.each for e in row if e >= 0} for row in ids.tolist()]
        nodes = [{r // case.gpus for r in row} for row in ranks]
        np.testing.assert_array_equal(got.per_rank, [sum(r in s for s in ranks) for r in range(case.n)])
        np.testing.assert_array_equal(got.per_node, [sum(r in s for s in nodes) for r in range(case.n // case.gpus)])
        np.testing.assert_array_equal(got.per_expert, [(ids == e).sum() for e in range(case.experts)])
        assert got.to_rank.tolist() == [[r in s for r in range(case.n)] for s in ranks]


@given(cases(), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_a_rank_receives_each_token_once_in_order_with_its_own_expert_numbers(case, seed):
    """Catches rows in order of arrival, rows sent once per expert, global numbers or weights of other ranks' experts."""

    def program(nodes, rank):
        h = plan(nodes, case.ids[rank], n_experts=case.experts)
        x, w = ep.deliver(h, case.x[rank], case.w[rank])
        return [h.source, h.token, h.local_ids, x, w, h.tokens_per_expert(), h.tokens_per_expert(128)]

    for rank, (source, token, local, x, w, counts, aligned) in enumerate(case.run(program, seed=seed)):
        want = case.received(rank)
        assert list(zip(source.tolist(), token.tolist(), strict=True)) == want
        for row, (s, t) in enumerate(want):
            here = [e // case.each == rank for e in case.ids[s][t]]
            np.testing.assert_array_equal(x[row], case.x[s][t])
            np.testing.assert_array_equal(w[row], np.where(here, case.w[s][t], 0))
            np.testing.assert_array_equal(local[row], np.where(here, case.ids[s][t] - rank * case.each, -1))
        everyone = np.concatenate([i.ravel() for i in case.ids])
        np.testing.assert_array_equal(counts, [(everyone == rank * case.each + e).sum() for e in range(case.each)])
        np.testing.assert_array_equal(aligned, [128 * -(-c // 128) for c in counts])


@given(cases(missing=False), st.sampled_from(sorted(RECIPES)))
@settings(max_examples=40, deadline=None)
def test_dispatch_and_combine_are_transposes(case, name):
    """Catches a backward that goes another way than its forward: <J a, b> = <a, J' b> over all ranks together."""
    recipe = RECIPES[name]
    case.gpus = case.gpus if recipe.local else 1

    def program(nodes, rank):
        r = np.random.default_rng(rank)
        h = plan(nodes, case.ids[rank], n_experts=case.experts, recipe=recipe)
        x, w = Tensor(r.standard_normal(case.x[rank].shape)), Tensor(r.standard_normal(case.w[rank].shape))
        y = ep.dispatch(x, w, handle=h)
        dy = r.standard_normal(y.shape)
        g = backward(y, dy)
        first = (y.data * dy).sum() - (x.data * g[x]).sum() - (w.data * g[w]).sum()
        y, bias = Tensor(r.standard_normal((len(h.row_of), D))), Tensor(r.standard_normal(x.shape))
        z = ep.combine(y, bias, handle=h)
        dz = r.standard_normal(z.shape)
        g = backward(z, dz)
        return first, (z.data * dz).sum() - (y.data * g[y]).sum() - (bias.data * g[bias]).sum()

    np.testing.assert_allclose(np.sum(case.run(program), axis=0), 0, atol=1e-11)


# ---- Equal to one rank


@given(cases(missing=False), st.sampled_from([np.float32, np.float64]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_experts_spread_out_have_the_bits_of_one_rank_forward_and_backward(case, dtype, early):
    """Catches rows that reach an expert in another order, weights or gradients that meet another choice, a sum in another
    order. Bitwise: an expert's matrix of tokens is the very same, and ONE_RANK adds up in the serial order."""
    case.gpus = 1
    m, dys = experts_of(case, dtype, early)
    tokens = [np.concatenate(part) for part in (case.x, case.ids, case.w)]
    want, got = serial(m, *tokens, np.concatenate(dys)), parallel(m, case, dys, ONE_RANK)
    assert set(want) == set(got)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@given(cases(missing=False), st.sampled_from(["V1", "V2"]))
@settings(max_examples=30, deadline=None)
def test_partial_sums_per_rank_and_node_change_the_last_bits_only(case, name):
    """Catches a partial sum lost or counted twice. K terms are added in another order: relative to the sum of their
    magnitudes K eps; the experts themselves, and their gradients, keep their bits."""
    m, dys = experts_of(case, np.float64, False)
    tokens = [np.concatenate(part) for part in (case.x, case.ids, case.w)]
    want, got = serial(m, *tokens, np.concatenate(dys)), parallel(m, case, dys, RECIPES[name])
    for key in want:
        if key in ("y", "dx"):
            np.testing.assert_allclose(got[key], want[key], rtol=0, atol=1e-11 * np.abs(want[key]).max())
        else:
            np.testing.assert_array_equal(got[key], want[key], err_msg=key)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("n", "gpus"), [(1, 1), (2, 1), (3, 1), (4, 2), (6, 3)])
def test_the_layer_is_the_serial_layer(name, n, gpus):
    """Catches a shared expert added on every rank of a token, a router that sees other tokens, gradients of the router
    that miss the experts of other ranks."""
    recipe = RECIPES[name]
    got = spmd(n, layer_programs.moe, recipe, OWN, gpus if recipe.local else 1)
    x = np.concatenate([normal(1, 3 + r, 24, seed=10 + r) for r in range(n)], axis=1)
    dy = np.concatenate([normal(1, 3 + r, 24, seed=20 + r) for r in range(n)], axis=1)
    want = pull(lambda m, x: m(x)[0], drawn(DecoderLayer(CONFIG, 1)).mlp, x, dy)
    for key in ("y", "dx"):
        np.testing.assert_allclose(np.concatenate([g[key] for g in got], axis=1), want[key], **CLOSE)
    for key in want:
        if key.startswith("experts."):
            _, e, rest = key.split(".", 2)
            owner, local = divmod(int(e), 12 // n)
            np.testing.assert_allclose(got[owner][f"experts.{local}.{rest}"], want[key], err_msg=key, **CLOSE)
        elif key not in ("y", "dx"):  # router and shared expert: each rank has its own tokens' part
            np.testing.assert_allclose(sum(g[key] for g in got), want[key], err_msg=key, **CLOSE)


@given(st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_with_every_token_on_every_rank_no_token_travels(n, seed):
    """Catches experts that answer for others' choices, a shared expert that is added n times (DeepSeek's inference code
    computes it whole on each rank), replicated gradients that are one rank's part."""
    layer, x, dy = drawn(DecoderLayer(CONFIG, 1)).mlp, normal(2, 5, 24, seed=1), normal(2, 5, 24, seed=2)
    log = Log()
    got = spmd(
        n,
        lambda c: pull(lambda m, x: ep.moe_replicated(c, m, x)[0], ep.shard_moe(c, layer), x, dy),
        log=log,
        seed=seed,
    )
    want = pull(lambda m, x: m(x)[0], layer, x, dy)
    for key in want:
        for rank, g in enumerate(got):
            if not key.startswith("experts."):
                np.testing.assert_allclose(g[key], want[key], err_msg=key, **CLOSE)
                np.testing.assert_array_equal(g[key], got[0][key])
            elif int(key.split(".")[1]) // (12 // n) == rank:
                local = f"experts.{int(key.split('.')[1]) % (12 // n)}.{key.split('.', 2)[2]}"
                np.testing.assert_allclose(g[local], want[key], err_msg=key, **CLOSE)
    assert log.bytes() == 2 * (n - 1) * 8 * 10 * (24 + 24 + 4)  # all-reduces: y, dx, and dweights of 4 choices


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_sequence_parallel_attention_and_expert_parallel_ffn_make_the_serial_layer(n):
    """Catches tokens dispatched by every tensor-parallel rank, and router gradients of my tokens only. Nothing is sent
    twice: the rows on the wires are those of the split tokens."""
    table, mask = surroundings(CONFIG)
    x, dy = normal(2, 7, 24, seed=1), normal(2, 7, 24, seed=2)
    layer = drawn(DecoderLayer(CONFIG, 1))
    want = pull(lambda m, x: m(x, table, mask)[0], layer, x, dy)
    log = Log()
    got = spmd(n, layer_programs.sp_moe_block, log=log)
    for key in ("y", "dx"):
        np.testing.assert_allclose(np.concatenate([g[key] for g in got], axis=1), want[key], **CLOSE)
    for key in ("mlp.gate.weight", "mlp.shared_experts.up_proj.weight", "input_layernorm.weight"):
        for g in got:
            np.testing.assert_allclose(g[key], want[key], err_msg=key, **CLOSE)
    for e in range(12):
        mine = got[e // (12 // n)][f"mlp.experts.{e % (12 // n)}.down_proj.weight"]
        np.testing.assert_allclose(mine, want[f"mlp.experts.{e}.down_proj.weight"], **CLOSE)
    a = layer.self_attn(_norm(x, layer.input_layernorm), table, mask)[0] + x
    _, routing = layer.mlp(_norm(a, layer.post_attention_layernorm))
    owner = np.concatenate([np.full(7 // n + (r < 7 % n), r) for r in range(n)])
    copies = count_copies(routing.ids.reshape(-1, 4), np.tile(owner, 2), 12, n, 1)
    assert log.bytes(label="dispatch.rail") == round(copies.remote_nodes * 14) * (24 + 4) * 8


def _norm(x, norm):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + CONFIG.rms_norm_eps) * norm.weight


def test_the_load_of_an_expert_is_counted_over_all_ranks():
    """Catches a balancing bias that follows one rank's tokens."""
    case = Case(4, 1, 2, 3, [2, 0, 3, 1], 0)
    got = case.run(lambda nodes, rank: ep.expert_load(nodes.world, case.ids[rank][None], n_experts=8))
    for counts in got:
        np.testing.assert_array_equal(counts, np.bincount(np.concatenate(case.ids).ravel(), minlength=8))


# ---- Bad input


def planned(comm, ids=((0, 1),), n_experts=4, gpus=1, **how):
    return plan(make_nodes(comm, gpus), np.array(ids), n_experts=n_experts, **how)


ONE = np.zeros((1, D))
BAD = {
    "5 experts on 2 ranks": lambda c: planned(c, n_experts=5),
    "expert ids from 0 to 4; expected -1 to 3": lambda c: planned(c, [[0, 4]]),
    "expert ids from -2 to 1": lambda c: planned(c, [[-2, 1]]),
    r"expert ids are float64\[1, 2\]": lambda c: planned(c, [[0.0, 1.0]]),
    r"expert ids are int64\[2\]": lambda c: planned(c, [0, 1]),
    "2 ranks are not whole nodes of 3": lambda c: planned(c, gpus=3),
    "5 experts do not divide among 2": lambda c: ep.my_experts(c, 5),
    r"weights has shape \(1, 3\), the plan was for \(1, 2\)": lambda c: ep.deliver(planned(c), ONE, np.zeros((1, 3))),
    r"x has shape \(2, 5\), the plan was for \(1, 5\)": lambda c: ep.deliver(
        planned(c), np.zeros((2, D)), np.zeros((1, 2))
    ),
    "3 rows to combine, there are": lambda c: ep.combine(np.zeros((3, D)), handle=planned(c)),
    r"bias of shape \(1, 2\), rows are 5 wide": lambda c: ep.combine(
        np.zeros((4 - 4 * c.rank, D)), np.zeros((1, 2)), handle=planned(c)
    ),
    "rows of bfloat16 to combine": lambda c: ep.combine(
        np.zeros((4 - 4 * c.rank, D), ml_dtypes.bfloat16), handle=planned(c)
    ),
    "it needs nodes of one GPU": lambda c: planned(c, gpus=2, recipe=ONE_RANK),
    "dispatch in 'own', 'bf16' or 'fp8', not 'fp4'": lambda c: Wire("fp4"),
    "partial sums are in the order of ranks or slots": lambda c: Recipe("expert", "slot", local=True),
    "single choices are in the order of experts or slots": lambda c: Recipe("expert", "rank", local=False),
    "combine in 'own' or 'bf16', not 'fp8'": lambda c: Wire("own", "fp8"),
    "holds NaN or Inf": lambda c: pack(np.full((1, D), np.nan), D, "fp8"),
}


@pytest.mark.parametrize("message", BAD)
def test_sizes_and_choices_that_do_not_fit_are_refused(message):
    """Catches tokens that would silently go to the wrong expert, or a sum in an order that nobody planned."""
    with pytest.raises(SpecError, match=message):
        spmd(2, BAD[message])
