"""R 3.4.1: redundant experts that move: which run in a step, new plans from what was asked, weights on the way."""

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.infer.split import Deployment, Experts, choose_residents, experts, migrate, moves, serve
from refimpl.infer.split.moves import mine
from refimpl.infer.split.residents import only
from refimpl.parallel_emulation.collectives import make_nodes
from refimpl.parallel_emulation.comm import Log, spmd
from refimpl.parallel_emulation.eplb import imbalance, rebalance_experts
from refimpl.parallel_emulation.eplb_check import placement
from refimpl.parallel_emulation.serving import choose_replicas
from refimpl.spec_tests.cases.serving_programs import CONFIG, TOKENS, model, prompts

MODEL = model()


# ---- Who runs


@st.composite
def held(draw, most_ranks=3):
    """(loads, phy2log, ranks, active): every expert somewhere, and room for all."""
    ranks = draw(st.integers(1, most_ranks))
    each = draw(st.integers(1, 3 if ranks < 3 else 2))
    n = draw(st.integers(1, ranks * each))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    phy2log = rng.permutation(np.concatenate([np.arange(n), rng.integers(0, n, ranks * each - n)]))
    return rng.integers(0, draw(st.sampled_from([1, 9])) + 1, n), phy2log, ranks, draw(st.integers(1, each))


def rank_loads(load, phy2log, on, ranks):
    """Loads of the ranks, slot by slot."""
    total = [0.0] * ranks
    for s in np.flatnonzero(on):
        e = phy2log[s]
        total[s * ranks // len(phy2log)] += load[e] / sum(1 for t in np.flatnonzero(on) if phy2log[t] == e)
    return total


def admissible(load, phy2log, on, ranks, active):
    """Whether nobody runs more than it may, every expert with tokens runs, and none without."""
    per = [sum(on[r * len(on) // ranks : (r + 1) * len(on) // ranks]) for r in range(ranks)]
    running = {phy2log[s] for s in range(len(on)) if on[s]}
    return max(per) <= active and running == set(np.flatnonzero(load).tolist())


def best(load, phy2log, ranks, active):
    """The least load of the busiest rank over all choices, or None where there is none: enumeration."""
    found = [
        max(rank_loads(load, phy2log, on, ranks))
        for on in itertools.product([False, True], repeat=len(phy2log))
        if admissible(load, phy2log, np.array(on), ranks, active)
    ]
    return min(found, default=None)


@given(held())
@settings(deadline=None, max_examples=30)
def test_every_choice_of_residents_is_one_and_none_is_missed(problem):
    """Against enumeration: admissible if anything is, refused if nothing is. Catches an expert left out that could have been moved
    in, and a rank that runs more than it may.
    """
    load, phy2log, ranks, active = problem
    if best(load, phy2log, ranks, active) is None:
        with pytest.raises(SpecError, match="do not fit"):
            choose_residents(load, phy2log, ranks, active)
        return
    assert admissible(load, phy2log, choose_residents(load, phy2log, ranks, active), ranks, active)


def test_the_choice_is_nearly_always_the_best_there_is():
    """Against enumeration, fixed random cases. Measured on 2,283 such (up to 9 slots): the best in 97 %, 0.8 % above it on
    average, in the worst twice. Catches replicas that are not used, and heavy experts together.
    """
    rng, ratios = np.random.default_rng(1), []
    while len(ratios) < 150:
        ranks, each = int(rng.integers(2, 4)), int(rng.integers(1, 3))
        n = int(rng.integers(1, ranks * each + 1))
        phy2log = rng.permutation(np.concatenate([np.arange(n), rng.integers(0, n, ranks * each - n)]))
        load, active = rng.integers(1, 10, n), int(rng.integers(1, each + 1))
        least = best(load, phy2log, ranks, active)
        if least:
            on = choose_residents(load, phy2log, ranks, active)
            ratios.append(max(rank_loads(load, phy2log, on, ranks)) / least)
    assert np.mean(np.array(ratios) < 1 + 1e-9) >= 0.95 and np.mean(ratios) <= 1.02


def test_an_expert_makes_room_for_another():
    """By hand: expert 0 is on both ranks, 1 on the first only, one runs a rank; 0 is heavier and comes first. Catches a greedy
    choice that gives up.
    """
    on = choose_residents(np.array([9, 1]), np.array([0, 1, 0, 0]), 2, 1)
    assert on.tolist()[:2] == [False, True] and sum(on.tolist()[2:]) == 1


def test_the_busiest_gets_help_while_there_is_room():
    """By hand: 8 and 2 tokens, both experts on both ranks: 5 and 5 with room for two each; with room for one, 8 and 2.
    Catches replicas that never run, and replicas that run in others' place.
    """
    assert choose_residents(np.array([8, 2]), np.array([0, 1, 0, 1]), 2, 2).sum() == 4
    assert choose_residents(np.array([8, 2]), np.array([0, 1, 0, 1]), 2, 1).sum() == 2


def test_an_expert_moves_where_that_is_better_than_a_replica():
    """By hand: 5 tokens for an expert on both ranks, 4 for one on the first only: 4 and 5, not 6.5 and 2.5. Catches a search that
    only ever adds.
    """
    load, phy2log = np.array([5, 4]), np.array([0, 1, 0, 0])
    assert rank_loads(load, phy2log, choose_residents(load, phy2log, 2, 2), 2) == [4.0, 5.0]


def test_tokens_go_to_running_replicas_only():
    """`only` keeps the slots that run, in order. Catches a token sent to a slot that stands idle."""
    p = placement(np.array([[0, 1, 0, 0], [1, 1, 0, 0]]), 2)
    narrow = only(p, 0, np.array([True, True, False, True]))
    slots = choose_replicas(np.zeros((4, 1), int), narrow, 0)
    assert slots[:, 0].tolist() == [0, 3, 0, 3]
    assert narrow.logcnt.tolist() == [[2, 1]]


@pytest.mark.parametrize("seed", [None, 3])
def test_in_a_run_tokens_go_to_the_residents_of_all_ranks_tokens(monkeypatch, seed):
    """What each choice of residents saw and gave, and the slots that ranks then asked for. Catches residents that are chosen and
    not used, or from one rank's tokens, or without their number.
    """
    how = Deployment(tp=1, decode=4, decode_slots=36, decode_active=4, replan=2)
    seen, asked, real = [], {}, (experts.choose_residents, experts.plan)

    def residents(load, phy2log, ranks, active):
        on = real[0](load, phy2log, ranks, active)
        if ranks == 4:
            seen.append((load.sum(), on))
        return on

    def planned(nodes, slots, **more):
        if nodes.world.size == 4:
            asked.setdefault(more["label"], []).append((slots, *seen.pop()))
        return real[1](nodes, slots, **more)

    monkeypatch.setattr(experts, "choose_residents", residents)
    monkeypatch.setattr(experts, "plan", planned)
    spmd(how.ranks, lambda comm: serve(comm, MODEL, prompts((3,) * 12), TOKENS, how), seed=seed)
    for calls in asked.values():
        assert calls and len(calls) % 4 == 0
        for step in (calls[i : i + 4] for i in range(0, len(calls), 4)):
            assert all(total == sum(slots.size for slots, *_ in step) for _, total, _ in step)
            on = step[0][2]
            assert all((other == on).all() for *_, other in step) and on.reshape(4, 9).sum(axis=1).max() <= 4
            assert all(on[slots].all() for slots, *_ in step)


# ---- New plans


@st.composite
def two_plans(draw):
    ranks, each, n = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    slots = ranks * max(each, -(-n // ranks))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    return *[rebalance_experts(rng.integers(0, 50, (2, n)), slots, 1, 1, ranks) for _ in range(2)], ranks


@given(two_plans())
@settings(deadline=None, max_examples=60)
def test_what_moves_is_what_is_lacking(plans):
    """Set by set. Catches a weight that travels to a rank that has it, twice to the same, or from a rank that has it not."""
    old, new, ranks = plans
    plan = moves(old, new, ranks)
    assert len(plan) == len({(m.layer, m.expert, m.to) for m in plan})
    for layer in range(2):
        for rank in range(ranks):
            was, will = (set(mine(p, ranks, rank)[layer].tolist()) for p in (old, new))
            assert {m.expert for m in plan if (m.layer, m.to) == (layer, rank)} == will - was
        for m in plan:
            assert m.expert in mine(old, ranks, m.source)[m.layer]
    assert moves(old, old, ranks) == []


def test_after_a_move_every_slot_has_its_experts_weights():
    """Every slot against the whole model, and 3 D F numbers a move on the wire. Catches weights in another slot, gate taken for up,
    and weights sent that nobody needed.
    """
    log, ranks, slots = Log(), 4, 16
    rng = np.random.default_rng(0)
    new = rebalance_experts(rng.integers(0, 100, (1, CONFIG.n_routed_experts)), slots, 1, 1, ranks)

    def program(comm):
        e = Experts(make_nodes(comm, 1), MODEL, slots)
        after, plan = migrate(comm, [m.experts for m in e.layers], e.placement, new)
        return [[dict(m.named_weights()) for m in layer] for layer in after], plan

    got = spmd(ranks, program, log=log)
    whole = MODEL.model.layers[1].mlp.experts
    for rank, (layers, plan) in enumerate(got):
        assert plan == got[0][1] and plan
        for expert, weights in zip(mine(new, ranks, rank)[0], layers[0], strict=True):
            for name, w in whole[expert].named_weights():
                np.testing.assert_array_equal(weights[name], w)
    numbers = 3 * CONFIG.hidden_size * CONFIG.moe_intermediate_size
    assert log.bytes(label="eplb.move") == len(got[0][1]) * numbers * 8


def test_a_new_plan_is_the_published_one_for_what_all_ranks_saw():
    """Loads of a known routing; the plan, and the counters at zero. Catches a plan from one rank's tokens, from loads that are
    never forgotten, or from which replicas were chosen. And it balances what was seen better than the first did.
    """
    ids = [np.sort(np.random.default_rng(r).integers(0, 4, (30, 1)) ** 2 % 12) for r in range(3)]

    def program(comm):
        e = Experts(make_nodes(comm, 1), MODEL, 15)
        first = e.placement
        for part in (slice(0, 20), slice(20, 30)):
            e.send(1, ids[comm.rank][part], np.arange(30)[part], ".t")
        plan = e.replan()
        return first, e.placement, plan, e.seen

    got = spmd(3, program)
    loads = np.bincount(np.concatenate(ids).ravel(), minlength=12)[None]
    for first, second, plan, seen in got:
        np.testing.assert_array_equal(second.phy2log, rebalance_experts(loads, 15, 1, 1, 3).phy2log)
        assert plan == moves(first, second, 3) and not seen.any()
        assert imbalance(loads, second, 3)[0] < imbalance(loads, first, 3)[0]


def test_moves_of_a_run_are_counted_and_logged():
    """The moves that a run reports are the bytes that it sent. Catches a count of slots that changed, where weights were there."""
    log, how = Log(), Deployment(tp=1, decode=4, decode_slots=20, replan=1)
    got = spmd(how.ranks, partial(_run, how), log=log)
    counted = {len(s.moves) for s in got[how.prefill :]}
    assert len(counted) == 1
    (n,) = counted
    assert n > 0 and log.bytes(label="eplb.move") == n * 3 * CONFIG.hidden_size * CONFIG.moe_intermediate_size * 8


def _run(how, comm):
    return serve(comm, MODEL, prompts(), TOKENS, how)


def test_plans_of_different_models_are_refused():
    """Catches layers paired by broadcasting."""
    a, b = (rebalance_experts(np.ones((n, 4)), 4, 1, 1, 2) for n in (1, 2))
    with pytest.raises(SpecError, match="placements of"):
        moves(a, b, 2)
    with pytest.raises(SpecError, match="3 ranks do not divide 4 slots"):
        moves(a, a, 3)
    with pytest.raises(SpecError, match="3 ranks do not divide 4 slots"):
        choose_residents(np.ones(4), np.arange(4), 3, 1)
    with pytest.raises(SpecError, match="0 active"):
        choose_residents(np.ones(4), np.arange(4), 2, 0)
