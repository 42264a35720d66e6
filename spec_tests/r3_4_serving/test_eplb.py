"""R 3.4: redundant experts and their placement, against DeepSeek's own load balancer and a slow restatement of it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.parallel_emulation.eplb import balanced_packing, gpu_loads, imbalance, rebalance_experts, replicate
from refimpl.parallel_emulation.serving import choose_replicas, slot_ranks
from refimpl.spec_tests.golden import arrays

GOLDEN = arrays("eplb")
CASES = json.loads(bytes(GOLDEN["index_json"]).decode())["cases"]
SIZES = ("num_replicas", "num_groups", "num_nodes", "num_gpus")


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['case']}-{c['name']}")
def test_recorded_placements(case):
    """Bit for bit. Catches unstable ties, float64 loads, a sort where one item per pack needs none."""
    number = f"{case['case']:03d}"
    stable = "_stable" if case["tie_dependent"] else ""
    placement = rebalance_experts(GOLDEN[f"{number}_weight"], *(case[size] for size in SIZES))
    np.testing.assert_array_equal(placement.phy2log, GOLDEN[f"{number}_phy2log{stable}"])
    np.testing.assert_array_equal(placement.log2phy, GOLDEN[f"{number}_log2phy{stable}"])
    np.testing.assert_array_equal(placement.logcnt, GOLDEN[f"{number}_logcnt"])


# ---- The same in slow words: one layer, one item at a time, float32 scalars


def pack(weights, packs):
    """[position of each item]: heaviest first into the lightest pack with room; ties by index."""
    room = len(weights) // packs
    if room == 1:
        return list(range(len(weights)))
    held, total, place = [[] for _ in range(packs)], [np.float32(0)] * packs, [0] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        free = [p for p in range(packs) if len(held[p]) < room]
        best = min(free, key=lambda p: (total[p], p))
        place[item] = best * room + len(held[best])
        held[best].append(item)
        total[best] = np.float32(total[best] + weights[item])
    return place


def slow_layer(w, replicas, groups, nodes, gpus):
    """Expert of each slot."""
    if groups % nodes:
        groups = nodes = 1
    size = len(w) // groups
    sums = []
    for g in range(groups):
        total = np.float32(0)
        for e in range(g * size, (g + 1) * size):
            total = np.float32(total + w[e])
        sums.append(total)
    order = sorted(range(groups), key=dict(enumerate(pack(sums, nodes))).get)
    experts = [g * size + i for g in order for i in range(size)]
    per_node, slots_per_node = len(w) // nodes, replicas // nodes
    slots = []
    for node in range(nodes):
        mine = experts[node * per_node : (node + 1) * per_node]
        copies, held = dict.fromkeys(mine, 1), list(mine)
        while len(held) < slots_per_node:
            most = max(mine, key=lambda e: (np.float32(w[e] / np.float32(copies[e])), -mine.index(e)))
            copies[most] += 1
            held.append(most)
        shares = [np.float32(w[e] / np.float32(copies[e])) for e in held]
        place = pack(shares, gpus // nodes)
        slots += [held[place.index(s)] for s in range(slots_per_node)]
    return slots


@st.composite
def problems(draw):
    nodes, gpus_per_node, per_gpu = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    groups = draw(st.integers(1, 4)) * draw(st.sampled_from([1, nodes]))
    gpus = nodes * gpus_per_node
    replicas = gpus * per_gpu
    experts = [e for e in range(groups, replicas + 1, groups) if groups % nodes or e % nodes == 0]
    if not experts:
        groups = nodes = 1
        experts = range(1, replicas + 1)
    e = draw(st.sampled_from(experts))
    top = draw(st.sampled_from([0, 1, 3, 50, 10_000]))
    seed = draw(st.integers(0, 2**31))
    w = np.random.default_rng(seed).integers(0, top, (draw(st.integers(1, 3)), e), endpoint=True)
    return w, replicas, groups, nodes, gpus


@given(problems())
@settings(deadline=None, max_examples=150)
def test_any_placement_is_the_slow_one(problem):
    """Catches a vectorised step that mixes rows: nodes of one layer, or layers of one step."""
    w, *sizes = problem
    placement = rebalance_experts(w, *sizes)
    assert placement.phy2log.tolist() == [slow_layer(row.astype(np.float32), *sizes) for row in w]


@given(problems())
@settings(deadline=None, max_examples=150)
def test_every_slot_is_filled_and_the_three_maps_agree(problem):
    """Catches a replica without a slot, a slot without an expert, counts that do not add up."""
    w, replicas, groups, nodes, gpus = problem
    phy2log, log2phy, logcnt = rebalance_experts(w, replicas, groups, nodes, gpus)
    assert phy2log.shape == (len(w), replicas) and logcnt.shape == w.shape
    assert phy2log.dtype == log2phy.dtype == logcnt.dtype == np.int64
    assert log2phy.shape == (*w.shape, logcnt.max())
    for layer in range(len(w)):
        for e in range(w.shape[1]):
            slots = [s for s in log2phy[layer, e].tolist() if s != -1]
            assert log2phy[layer, e, : len(slots)].tolist() == slots, "-1 only at the end"
            assert sorted(slots) == [s for s in range(replicas) if phy2log[layer, s] == e]
            assert len(slots) == logcnt[layer, e] >= 1


@given(problems())
@settings(deadline=None)
def test_a_group_stays_on_one_node_when_groups_divide(problem):
    """What the hierarchical policy is for: a token's groups are few nodes. Catches the global policy everywhere."""
    w, replicas, groups, nodes, gpus = problem
    if groups % nodes == 0:
        phy2log = rebalance_experts(w, replicas, groups, nodes, gpus).phy2log
        node = np.arange(replicas) // (replicas // nodes)
        group = phy2log // (w.shape[1] // groups)
        for row in group:
            assert all(len(set(node[row == g])) == 1 for g in range(groups))


@given(problems())
@settings(deadline=None)
def test_loads_are_shared_by_replicas_and_none_is_lost(problem):
    """Each GPU's load added up expert by expert. Catches a share divided twice."""
    w, replicas, groups, nodes, gpus = problem
    placement = rebalance_experts(w, replicas, groups, nodes, gpus)
    loads = gpu_loads(w, placement, gpus)
    np.testing.assert_allclose(loads.sum(axis=1), w.sum(axis=1), rtol=1e-12)  # float64 sums in another order
    slot = replicas // gpus
    experts = placement.phy2log[0, :slot]
    assert loads[0, 0] == pytest.approx(sum(w[0, e] / placement.logcnt[0, e] for e in experts), rel=1e-12)


PREFILL, DECODE = (288, 8, 4, 32), (288, 8, 18, 144)


@pytest.mark.parametrize(("sizes", "bound"), [(PREFILL, 1.07), (DECODE, 1.6)], ids=["EP32", "EP144"])
def test_redundant_experts_balance_v3s_deployments(sizes, bound):
    """max / mean over GPUs for loads between 500 and 1500 a expert: what DeepSeek's own placements of such loads reach,
    and at most half the excess of experts in their own order. Catches a balancer that balances nothing.
    """
    w = np.random.default_rng(1).integers(500, 1500, (20, 256))
    ratio = imbalance(w, rebalance_experts(w, *sizes), sizes[3])
    in_order = w.reshape(20, 32, 8).sum(axis=2) if sizes is PREFILL else w.reshape(20, 128, 2).sum(axis=2)
    naive = in_order.max(axis=1) / in_order.mean(axis=1)
    assert (ratio >= 1).all() and (ratio <= bound).all()
    assert (ratio - 1 <= (naive - 1) / 2).all()


def test_ties_take_the_lower_index():
    """All loads equal: experts stay in order, the first ones are replicated. Catches an unstable sort."""
    phy2log, log2phy, logcnt = rebalance_experts(np.ones((1, 20), int), 24, 1, 1, 4)
    assert logcnt.tolist() == [[2] * 4 + [1] * 16]
    assert log2phy[0, 0].tolist()[0] < log2phy[0, 0].tolist()[1]
    assert phy2log[0, ::6].tolist() == [4, 5, 6, 7], "unreplicated experts are the heaviest items, in index order"


def test_one_item_per_pack_is_not_sorted():
    """One expert a GPU keeps slot order (visible in the EP320 deployment). Catches a sort where the source has none."""
    w = np.array([[1.0, 5.0, 3.0, 2.0]])
    assert rebalance_experts(w, 4, 1, 1, 4).phy2log.tolist() == [[0, 1, 2, 3]]
    assert balanced_packing(w.astype(np.float32), 4).tolist() == [[0, 1, 2, 3]]


def test_replication_follows_the_largest_share():
    """10, 6, 3 on 6 slots: 10; 6; then 10/2 = 5. Catches load / count with the old count."""
    slot2log, rank, count = replicate(np.array([[10, 6, 3]], np.float32), 6)
    assert slot2log.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert rank.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert count.tolist() == [[3, 2, 1]]


def test_the_loads_are_left_alone():
    """Catches a balancer that sorts or divides its caller's statistics in place."""
    w = np.arange(12, dtype=np.float32).reshape(1, 12)
    before = w.copy()
    rebalance_experts(w, 16, 4, 2, 8)
    np.testing.assert_array_equal(w, before)


@pytest.mark.parametrize(
    ("shape", "sizes", "complaint"),
    [
        ((1, 12), (16, 5, 1, 8), "num_groups=5 does not divide the 12 experts"),
        ((1, 12), (16, 4, 2, 5), "num_nodes=2 does not divide num_gpus=5"),
        ((1, 12), (18, 4, 2, 8), "num_gpus=8 does not divide num_replicas=18"),
        ((1, 12), (8, 4, 2, 8), "8 slots are too few for 12 experts"),
        ((1, 12), (16, 0, 1, 8), "num_groups is 0"),
        ((1, 12), (16, 4, 2, -8), "num_gpus is -8"),
        ((1, 12), (16.0, 4, 2, 8), "num_replicas is 16.0"),
        ((12,), (16, 4, 2, 8), r"shape \(12,\); expected \(layers, experts\)"),
        ((0, 12), (16, 4, 2, 8), r"shape \(0, 12\)"),
    ],
)
def test_shapes_that_cannot_work_are_refused(shape, sizes, complaint):
    """Catches a placement with holes, or an IndexError from deep inside."""
    with pytest.raises(SpecError, match=complaint):
        rebalance_experts(np.ones(shape), *sizes)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (-1.0, "negative"),
        (np.nan, "finite"),
        (np.inf, "finite"),
        (3e38, "finite in float32"),
        ("x", "expected numbers"),
    ],
)
def test_loads_that_mean_nothing_are_refused(bad, complaint):
    """Catches NaN, which any comparison places somewhere, and sums beyond float32, which look like full packs."""
    w = np.full((1, 12), bad)
    with pytest.raises(SpecError, match=complaint):
        rebalance_experts(w, 16, 4, 2, 8)


def test_a_placement_for_another_model_is_refused():
    """Catches loads of the wrong layer count shared silently by broadcasting."""
    placement = rebalance_experts(np.ones((2, 12)), 16, 4, 2, 8)
    with pytest.raises(SpecError, match="weight has shape"):
        gpu_loads(np.ones((1, 12)), placement, 8)
    with pytest.raises(SpecError, match="num_gpus=5"):
        gpu_loads(np.ones((2, 12)), placement, 5)


def test_a_layer_without_load_counts_as_balanced():
    """Catches 0 / 0."""
    assert imbalance(np.zeros((1, 4)), rebalance_experts(np.zeros((1, 4)), 4, 1, 1, 2), 2).tolist() == [1.0]


# ---- Which replica takes a token


def test_replicas_take_tokens_in_turn():
    """slot = log2phy[e, token mod count], by hand and -1 kept. Catches all tokens on the first replica."""
    placement = rebalance_experts(np.array([[9, 1, 1]]), 6, 1, 1, 2)
    ids = np.array([[0, 1], [0, -1], [0, 2], [0, 1]])
    slots = choose_replicas(ids, placement, 0)
    count = int(placement.logcnt[0, 0])
    assert count == 4
    for token, row in enumerate(ids.tolist()):
        for k, e in enumerate(row):
            wanted = -1 if e < 0 else placement.log2phy[0, e, token % placement.logcnt[0, e]]
            assert slots[token, k] == wanted
    assert len(set(slots[:, 0].tolist())) == count
    np.testing.assert_array_equal(choose_replicas(ids[2:], placement, 0, tokens=[2, 3]), slots[2:])


@given(problems(), st.integers(1, 40))
@settings(deadline=None)
def test_a_chosen_slot_holds_the_expert_that_was_asked_for(problem, n):
    """And its replicas share any run of tokens evenly to within one. Catches a map of another layer."""
    w, *sizes = problem
    placement = rebalance_experts(w, *sizes)
    layer, e = len(w) - 1, w.shape[1] - 1
    slots = choose_replicas(np.full((n, 1), e), placement, layer)
    assert set(placement.phy2log[layer, slots[:, 0]].tolist()) == {e}
    used = [int((slots == s).sum()) for s in placement.log2phy[layer, e] if s >= 0]
    assert max(used) - min(used) <= 1
    ranks = slot_ranks(slots, placement, sizes[3])
    assert (ranks == slots // (sizes[0] // sizes[3])).all()


def test_replicas_of_what_is_not_there_are_refused():
    """Catches -1 as Python's last element, and a layer beyond the placement."""
    placement = rebalance_experts(np.ones((1, 4)), 8, 1, 1, 2)
    for ids, layer, complaint in [
        ([[4]], 0, "-1...3"),
        ([[-2]], 0, "-1...3"),
        ([[0]], 1, "layer 1 of a placement for 1"),
        ([0], 0, "expected"),
    ]:
        with pytest.raises(SpecError, match=complaint):
            choose_replicas(ids, placement, layer)
    with pytest.raises(SpecError, match="token numbers"):
        choose_replicas([[0]], placement, 0, tokens=[-1])
    with pytest.raises(SpecError, match="3 ranks do not divide 8 slots"):
        slot_ranks(np.zeros((1, 1), int), placement, 3)
