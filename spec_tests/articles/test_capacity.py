"""Experts with a capacity: the load factor, dropping, the next best expert with room."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.autograd import SpecError
from refimpl.layers import STAGES, router
from refimpl.layers.variants.capacity import capacity


def stage(name):
    return STAGES[f"variant.{name}"]


@st.composite
def routings(draw):
    """(affinities (B, S, E), ids (B, S, K) as V3 would choose them, E, K); some experts are favourites."""
    b, s, e = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(2, 7))
    k = draw(st.integers(1, e))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    a = rng.normal(size=(b, s, e)) + draw(st.sampled_from([0.0, 1.0, 5.0])) * np.arange(e)[::-1]
    return a, router.top_k(a, k), e, k


def turns(ids):
    """(token, slot) in the order in which seats are given: first choices of all tokens, then second ones."""
    b, s, k = ids.shape
    return [((i, j), slot) for slot in range(k) for i in range(b) for j in range(s)]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any))
def test_the_factor_is_the_load_in_units_of_the_mean(loads):
    """Catches a share of all rows, or a load over the largest one: fractions, whose mean is 1."""
    mean = Fraction(sum(loads), len(loads))
    found = stage("load_factor")(np.array(loads))
    np.testing.assert_allclose(found, [float(n / mean) for n in loads], rtol=1e-14)  # two roundings
    assert np.mean(found) == pytest.approx(1, rel=1e-14)


@given(routings(), st.sampled_from([1.0, 1.25, 2.0]))
def test_an_expert_keeps_whom_it_saw_first(case, limit):
    """Catches second choices seated before first ones, seats counted per sequence, a capacity off by one."""
    _, ids, n_experts, _ = case
    if limit * ids.size < n_experts:
        return
    seats = Counter({e: int(limit * ids.size / n_experts + 1e-9) for e in range(n_experts)})
    kept = stage("kept")(ids, n_experts=n_experts, limit=limit)
    for token, slot in turns(ids):
        e = int(ids[*token, slot])
        assert kept[*token, slot] == (seats[e] > 0)
        seats[e] -= 1
    load = np.bincount(ids[kept == 1], minlength=n_experts)
    assert load.max() / (ids.size / n_experts) <= limit + 1e-9


@given(routings(), st.sampled_from([1.0, 1.25, 2.0]))
def test_nobody_is_rerouted_past_an_expert_with_room(case, limit):
    """Catches a choice that is not the best with room at its turn, an expert held twice, a seat too many: checked turn by turn."""
    a, ids, n_experts, k = case
    if limit * ids.size < n_experts:
        return
    found = stage("rerouted")(a, k=k, limit=limit)
    seats = capacity(ids.size, n_experts=n_experts, limit=limit)
    taken, held = Counter(), {}
    for token, slot in turns(found):
        e, own = int(found[*token, slot]), held.setdefault(token, set())
        better = [f for f in range(n_experts) if f not in own and a[*token, f] > a[*token, e]]
        with_room = [f for f in range(n_experts) if f not in own and taken[f] < seats]
        assert e not in own
        assert e in with_room or not with_room
        assert all(taken[f] >= seats for f in better) or not with_room
        own.add(e)
        taken[e] += 1
    kept = stage("kept")(found, n_experts=n_experts, limit=limit)
    assert (kept.sum() == found.size) == (max(taken.values()) <= seats)


@given(routings())
def test_with_room_for_all_nothing_changes(case):
    """Catches a capacity that bites below its limit, and re-routing that forgets V3's order."""
    a, ids, n_experts, k = case
    assert stage("kept")(ids, n_experts=n_experts, limit=n_experts).all()
    np.testing.assert_array_equal(stage("rerouted")(a, k=k, limit=n_experts), ids)


def test_two_favourites_drop_or_send_on():
    """Catches a limit that is ignored: 16 tokens prefer experts 0 and 1 of 8; lambda is 4, then 1.25 by dropping or sending on."""
    a = np.random.default_rng(2).normal(size=(1, 16, 8)) + np.array([9, 9, 0, 0, 0, 0, 0, 0])
    ids = router.top_k(a, 2)

    def factors(ids, kept):
        return stage("load_factor")(np.bincount(ids[kept == 1], minlength=8)), kept.mean()

    before, _ = factors(ids, np.ones_like(ids))
    dropped, share = factors(ids, stage("kept")(ids, n_experts=8, limit=1.25))
    assert before.max() == 4 and dropped.max() == 4  # of what is left, two experts have all
    assert share == 10 / 32  # with 5 seats each: 1.25 times the mean of all
    new = stage("rerouted")(a, k=2, limit=1.25)
    sent, share = factors(new, stage("kept")(new, n_experts=8, limit=1.25))
    assert share == 1 and sent.max() <= 1.25 and sent.min() > 0
    weights = np.full(ids.shape, 0.5)
    kept = stage("kept")(ids, n_experts=8, limit=1.25)
    assert stage("capacity_weights")(weights, kept).sum() == 0.5 * 10


def test_a_token_that_holds_the_last_free_expert_is_dropped():
    """Catches an endless search, and an expert given twice: one token, two experts with one seat each, three choices."""
    a = np.array([[[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]])
    found = stage("rerouted")(a, k=2, limit=1.0)  # 4 rows, 3 seats
    assert found.tolist() == [[[0, 2], [1, 0]]]
    assert stage("kept")(found, n_experts=3, limit=1.0).tolist() == [[[1, 1], [1, 0]]]


def test_no_seat_and_no_load():
    """Catches a capacity of 0 that would drop everything in silence, and 0 / 0."""
    with pytest.raises(SpecError, match="leaves no seat: 2 rows for 8 experts"):
        stage("kept")(np.zeros((1, 2, 1), int), n_experts=8, limit=1.0)
    with pytest.raises(SpecError, match="no expert has a load"):
        stage("load_factor")(np.zeros(4, int))
    with pytest.raises(SpecError, match="the best 5 of 4"):
        stage("rerouted")(np.zeros((1, 2, 4)), k=5, limit=1.0)
    assert capacity(100, n_experts=1, limit=1.15) == 115  # 1.15 * 100 is less in float64
