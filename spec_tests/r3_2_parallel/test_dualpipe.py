"""R 3.2.1: DualPipe and DualPipeV, against the recorded orders of DeepSeek's own schedulers."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.parallel_emulation.pipeline import Times, check, facts, simulate
from refimpl.parallel_emulation.pipeline.bubbles import published
from refimpl.parallel_emulation.pipeline.dualpipe import dualpipe, dualpipev
from refimpl.parallel_emulation.pipeline.schedule import Op, step_text
from refimpl.spec_tests import golden

BUILD = {"dualpipe": dualpipe, "dualpipev": dualpipev}
RECORDED = json.loads(golden.file("dualpipe.json").read_text(encoding="utf-8"))["cases"]


def recorded(name):
    return f"{name['schedule']}-{name['pp_ranks']}-{name['microbatches']}"


@pytest.fixture(params=RECORDED, ids=recorded)
def case(request):
    c = request.param
    return BUILD[c["schedule"]](c["pp_ranks"], c["microbatches"]), c["ranks"]


def test_every_rank_computes_in_the_recorded_order(case):
    """Catches a step repeated once too often, a zero-bubble half switched one backward late, swapped directions."""
    schedule, ranks = case
    expected = [" ".join(word.split(":")[1] for word in rank["ops"].split()) for rank in ranks]
    assert str(schedule).splitlines() == expected


def test_messages_travel_in_the_recorded_batches(case):
    """Catches a send queued before its partner's receive: untagged messages are matched by order alone."""
    schedule, ranks = case
    for rank, record in enumerate(ranks):
        if "with_comm" in record:
            words = []
            for batch, step in schedule.program(rank):
                words += [f"C[{','.join(map(str, batch))}]"] * bool(batch) + [step_text(step)] * bool(step)
            assert " ".join(words) == record["with_comm"]


def test_the_peak_of_live_activations_is_the_recorded_one(case):
    """Catches a forward that could have waited: PP + 1 chunks is what the report pays for the small bubble."""
    schedule, ranks = case
    assert list(facts(schedule).peak_live) == [rank["peak_live_activations"] for rank in ranks]
    assert set(facts(schedule).peak_live) == {schedule.layout.n_stages + 1}


def test_the_recorded_orders_pass_the_checker(case):
    """Catches a checker that refuses the real thing; also no circular wait when a batch ends on both sides at once."""
    check(case[0])


def test_every_rank_idles_by_the_published_formula_in_unit_times(case):
    """Catches a pair that is not overlapped: bubble (PP/2 - 1)(F&B + B - 3W) with F = W = 1, B = 2, F&B = 3."""
    schedule, _ = case
    for synchronous in (False, True):
        timeline = simulate(schedule, Times(), synchronous=synchronous)
        bubbles = [timeline.bubble(rank) for rank in range(schedule.layout.n_ranks)]
        assert bubbles == [(schedule.layout.n_stages / 2 - 1) * (3 + 2 - 3)] * len(bubbles)


RANK_TOTALS = {0: (23, 8, 15, 15, 97), 7: (17, 9, 8, 8, 103)}  # of the official program: F, B, I, W, F&B


@pytest.mark.parametrize("rank", RANK_TOTALS)
def test_totals_at_the_size_of_the_training_run(rank):
    """16 stages and 120 micro-batches are beyond the recordings. Catches a main loop of the wrong length."""
    steps = dualpipe(16, 120).ranks[rank]
    count = Counter("".join(op.kind for op in step) for step in steps)
    assert tuple(count[kind] for kind in ("F", "B", "I", "W", "FB")) == RANK_TOTALS[rank]


sizes = st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(2 * n, 2 * n + 9)))


@given(sizes)
@settings(deadline=None)
def test_dualpipev_is_dualpipe_cut_in_half(size):
    """The first half of DualPipe's ranks do what DualPipeV's do. Catches near and far confused in one of the two."""
    n, m = size
    assert dualpipev(n, m).ranks == dualpipe(2 * n, 2 * m).ranks[:n]


@given(sizes)
@settings(deadline=None)
def test_dualpipe_is_symmetric(size):
    """Rank P-1-r does what rank r does with the directions exchanged. Catches a rank treated by its number alone."""
    n, m = size
    ranks = dualpipe(2 * n, 2 * m).ranks
    turned = [tuple(tuple(Op(k, 1 - d, c) for k, d, c in step) for step in steps) for steps in reversed(ranks)]
    assert list(ranks) == turned


@pytest.mark.slow
@given(sizes)
@settings(deadline=None)
def test_any_size_can_run(size):
    """Catches an order that only works for the recorded sizes: complete, first-in-first-out, no circular wait."""
    n, m = size
    for schedule in (dualpipe(2 * n, 2 * m), dualpipev(n, m)):
        assert set(check(schedule).peak_live) == {2 * n + 1}


def test_middle_ranks_do_not_overlap_their_first_pair():
    """The exception of step 4. Catches the uniform main loop, which costs a bubble more."""
    steps = dualpipe(8, 20).ranks
    first = [next(i for i, step in enumerate(steps[r]) if step[0].kind in "BI") for r in range(4)]
    assert [step_text(steps[r][first[r]]) for r in range(4)] == ["I1.0", "I1.0", "I1.0", "B1.0"]
    assert step_text(steps[3][first[3] - 1]) == "F0.4"


@pytest.mark.parametrize(("p", "m"), [(3, 8), (0, 4), (-2, 4), (1, 2), (4, 6), (4, 9), (8, 15), (2, 3)])
def test_dualpipe_refuses_sizes_it_cannot_work_with(p, m):
    """Odd PP, odd or too few micro-batches. Catches a schedule that is silently incomplete."""
    with pytest.raises(SpecError, match="DualPipe with"):
        dualpipe(p, m)


@pytest.mark.parametrize(("p", "m"), [(0, 4), (-1, 4), (3, 5), (1, 1)])
def test_dualpipev_refuses_sizes_it_cannot_work_with(p, m):
    with pytest.raises(SpecError, match="DualPipeV with"):
        dualpipev(p, m)


OUTSIDE = [
    (Times(F=1, B=2.2, W=1, FB=2.7), 5.7, (4.1, 5.1)),
    (Times(F=1, B=2, W=1, FB=4), 9.0, (9.0, 11.0)),
]


@pytest.mark.parametrize(("times", "formula", "simulated"), OUTSIDE)
def test_outside_its_conditions_the_formula_is_off_in_either_direction(times, formula, simulated):
    """What docs/schedules.md says. Catches a planner that trusts the formula for measured times."""
    schedule = dualpipe(8, 20)
    timeline = simulate(schedule, times)
    bubbles = [timeline.bubble(rank) for rank in range(8)]
    assert published(schedule, times) == pytest.approx(formula)
    assert (round(min(bubbles), 1), round(max(bubbles), 1)) == simulated
