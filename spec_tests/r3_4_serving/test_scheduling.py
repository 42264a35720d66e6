"""Who runs when: policies and scheduler without a model, and the simulator that drives them in simulated time."""

import numpy as np
import pytest

from refimpl import SpecError
from refimpl.infer.engine import (
    POLICIES,
    Arrival,
    ArrivalGap,
    Blocks,
    ByComplexity,
    FirstCome,
    Job,
    Kind,
    Limits,
    Load,
    Queue,
    Scheduler,
    Served,
    ShortestFirst,
    StepTime,
    Work,
    arrivals,
    fit,
    simulate,
    summary,
    worst,
)

UNIT = StepTime(1.0, 0.0, 0.0, 0.0)  # every step takes a second
ROOM = {"blocks": 1000, "size": 16}


def job(i, prompt, output, arrival=0.0):
    return Job(i, arrival, [1000 * i + t for t in range(prompt)], output)


def ids(jobs):
    return [j.id for j in jobs]


# ---- Policies


def test_first_come_and_shortest_first():
    """Catches length without the answer, ties that jump the queue."""
    waiting = [job(0, 9, 9, 0.0), job(1, 2, 3, 1.0), job(2, 1, 30, 2.0), job(3, 4, 1, 3.0)]
    queue = Queue(5.0, waiting, [job(9, 1, 1)])
    assert ids(FirstCome().admits(queue)) == [0, 1, 2, 3]
    assert ids(ShortestFirst().admits(queue)) == [1, 3, 0, 2]


def test_a_batch_closes_when_arrivals_pause():
    """Catches a batch that closes at the first request, waits for ever, or is joined while it runs."""
    policy, waiting = ArrivalGap(full=4, factor=2.0, longest=100.0), [job(0, 1, 1, 10.0), job(1, 1, 1, 12.0)]
    came = [0.0, 4.0, 10.0, 12.0]  # mean gap 4: closes at 12 + 8
    assert policy.wake(Queue(13.0, waiting, [], came)) == 20.0
    assert ids(policy.admits(Queue(19.9, waiting, [], came))) == []
    assert ids(policy.admits(Queue(20.0, waiting, [], came))) == [0, 1]
    assert ids(policy.admits(Queue(20.0, waiting, [job(9, 1, 1)], came))) == []
    assert ids(policy.admits(Queue(13.0, waiting, [], came, more=False))) == [0, 1]
    many = [job(i, 1, 1, 12.0) for i in range(6)]
    assert ids(policy.admits(Queue(12.0, many, [], came))) == [0, 1, 2, 3]
    assert ArrivalGap(longest=5.0).wake(Queue(13.0, waiting, [], came)) == 15.0
    assert policy.wake(Queue(13.0, [], [], came)) is None and policy.admits(Queue(13.0, [], [], came)) == ()


def test_batches_of_one_kind():
    """Catches long requests among the short, a cap of the other kind, a batch that is joined."""
    policy = ByComplexity(short=3, long=2, limit=10)
    waiting = [job(0, 9, 2), job(1, 1, 1), job(2, 5, 5), job(3, 20, 1), job(4, 11, 9), job(5, 1, 1), job(6, 1, 1)]
    assert ids(policy.admits(Queue(0.0, waiting, []))) == [0, 3]
    assert ids(policy.admits(Queue(0.0, waiting[1:], []))) == [1, 2, 5]
    assert policy.admits(Queue(0.0, waiting, [job(9, 1, 1)])) == () and policy.admits(Queue(0.0, [], [])) == ()
    assert (ByComplexity().short, ByComplexity().long) == (32, 8)


# ---- Scheduler


def run(scheduler, step):
    for w in step.work:
        scheduler.done(w, 7 if w.decides else None)
        if w.decides and not w.job.left:
            scheduler.leave(w.job)


@pytest.mark.parametrize("reserve", ["prompt", "all"])
@pytest.mark.parametrize("seed", range(8))
def test_a_random_day(seed, reserve):
    """Catches a budget exceeded, a decoding request left out while prompts are read, a job beyond the limit, one that never ends, a
    block that leaks; `reserve="all"` sends nobody away; fixed seeds."""
    rng = np.random.default_rng(seed)
    blocks, limits = (
        Blocks(int(rng.integers(9, 14)), 4),
        Limits(rows=5, tokens=int(rng.integers(5, 12)), reserve=reserve),
    )
    scheduler, jobs, now = Scheduler(blocks, limits), [], 0.0
    while len(jobs) < 25 or scheduler.running or scheduler.waiting or scheduler.returning:
        now += 1
        assert now < 2000, "somebody waits for ever"
        if len(jobs) < 25 and rng.random() < 0.5:
            jobs.append(Job(len(jobs), now, rng.integers(0, 2, rng.integers(1, 25)).tolist(), int(rng.integers(1, 12))))
            scheduler.submit(jobs[-1])
        before = list(scheduler.running)
        decoding = [j for j in before if j.missing == 1]
        step = scheduler.step(now)
        assert sum(w.stop - w.start for w in step.work) <= limits.tokens and len(scheduler.running) <= limits.rows
        worked = [w.job for w in step.work]
        assert len(set(worked)) == len(worked) and not set(worked) & set(step.preempted)
        assert all(j in worked or j in step.preempted for j in decoding)
        assert all(w.start == w.job.computed < w.stop <= len(w.job.tokens) <= w.stop + w.job.missing for w in step.work)
        held = [b for j in scheduler.running for b in j.table]
        assert blocks.refs == [held.count(b) for b in range(blocks.count)]
        assert before[: len(before) - len(step.preempted)] == [j for j in scheduler.running if j in before]
        assert not (step.preempted and reserve == "all")
        assert (order := ids([*scheduler.running, *scheduler.returning, *scheduler.waiting])) == sorted(order)
        run(scheduler, step)
    assert blocks.free == blocks.count and all(j.left == 0 for j in jobs)


def test_decoding_goes_on_beside_a_long_prompt():
    """Catches a prompt that takes the whole step: 3 tokens of it fit beside one that decodes."""
    scheduler = Scheduler(Blocks(20, 4), Limits(tokens=4))
    scheduler.submit(job(0, 3, 9))
    run(scheduler, scheduler.step(0.0))
    scheduler.submit(job(1, 10, 2))
    seen = []
    for _ in range(4):
        step = scheduler.step(0.0)
        seen.append([(w.job.id, w.start, w.stop) for w in step.work])
        run(scheduler, step)
    assert seen == [[(0, 3, 4), (1, 0, 3)], [(0, 4, 5), (1, 3, 6)], [(0, 5, 6), (1, 6, 9)], [(0, 6, 7), (1, 9, 10)]]


def test_who_began_last_gives_way_and_returns_first():
    """Catches the oldest sent away, a newcomer before whoever was sent away, its work done nevertheless."""
    scheduler = Scheduler(Blocks(4, 2), Limits())
    for i in range(3):
        scheduler.submit(Job(i, float(i), [i] * 2, 5))
    run(scheduler, scheduler.step(0.0))
    assert ids(scheduler.running) == [0, 1, 2]
    step = scheduler.step(0.0)  # all want a second block; one is left
    assert ids(step.preempted) == [2] and ids(w.job for w in step.work) == [0, 1]
    run(scheduler, step)
    scheduler.submit(Job(3, 3.0, [3], 1))
    began = []
    for _ in range(20):
        before = ids(scheduler.running)
        step = scheduler.step(0.0)
        began += [w.job.id for w in step.work if w.job.id not in before]
        run(scheduler, step)
    assert [i for i in began if i in (2, 3)][-2:] == [2, 3] and 3 not in began[:-1]
    assert scheduler.running == scheduler.waiting == scheduler.returning == []


def test_a_closed_batch_begins_whole():
    """Catches a batch cut to what its first step has room for: the rest would wait for its end; nobody else joins meanwhile."""
    scheduler = Scheduler(Blocks(20, 4), Limits(tokens=4), ByComplexity(short=3))
    for i in range(4):
        scheduler.submit(job(i, 3, 9))
    for begun in ([0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2]):
        step = scheduler.step(0.0)
        assert ids(scheduler.running) == begun
        run(scheduler, step)
    assert ids(scheduler.waiting) == [3]
    fresh = Scheduler(Blocks(20, 4), Limits(tokens=4), ByComplexity(short=3))
    jobs = [job(i, 3, 1) for i in range(4)]
    for j in jobs:
        fresh.submit(j)
    run(fresh, fresh.step(0.0))
    fresh.leave(jobs[2])  # given up before it began
    while fresh.running or fresh.waiting:
        run(fresh, fresh.step(0.0))
    assert fresh.blocks.free == 20


def test_work_counts_query_key_pairs():
    """Catches an attention cost off by the diagonal."""
    assert Work(job(0, 9, 1), 3, 6).pairs == 4 + 5 + 6
    assert Load.of([Work(job(0, 9, 1), 3, 6), Work(job(1, 5, 1), 4, 5)]) == Load(4, 20, 2)


# ---- Simulated time


def test_the_simulator_by_hand():
    """Catches arrivals seen too early, tokens dated at the start of a step, an idle time skipped or slept in."""
    trace = [Arrival(0.5, (1, 2, 3), 3), Arrival(1.0, (4,), 1), Arrival(9.0, (5,), 2)]
    served = simulate(trace, UNIT, **ROOM, limits=Limits(tokens=2), policy=FirstCome())
    # 0.5-1.5 reads 1, 2; 1.5-2.5 reads 3 and 4: both decide; 2.5-3.5, 3.5-4.5 decode; nothing until 9
    assert [(s.first, s.last) for s in served] == [(2.5, 4.5), (2.5, 2.5), (10.0, 11.0)]
    assert [s.ttft for s in served] == [2.0, 1.5, 1.0] and [s.tpot for s in served] == [1.0, 0.0, 1.0]


def test_policies_in_simulated_time():
    """Catches a policy that the simulator does not ask, or asks with the wrong queue: who is first by hand."""
    trace = [Arrival(0.0, (1,), 4), Arrival(0.1, tuple(range(50)), 30), Arrival(0.2, (2,), 2)]
    one = Limits(rows=1)
    first = {n: simulate(trace, UNIT, **ROOM, limits=one, policy=p) for n, p in POLICIES.items()}
    assert [s.first for s in first["first-come"]] == [1.0, 5.0, 35.0]
    assert [s.first for s in first["shortest-first"]] == [1.0, 7.0, 5.0]
    gap = simulate(trace, UNIT, **ROOM, limits=Limits(), policy=ArrivalGap(factor=3.0, longest=9.0))
    assert [s.first for s in gap] == [1.0, 5.0, 5.0]  # the first at once: no gap is known yet
    later = [Arrival(0.0, (1,), 1), Arrival(10.0, (2,), 1), Arrival(11.0, (3,), 1), Arrival(90.0, (4,), 1)]
    gap = simulate(later, UNIT, **ROOM, limits=Limits(), policy=ArrivalGap(factor=1.0, longest=9.0))
    assert [s.first for s in gap] == [1.0, 17.5, 17.5, 91.0]  # 11 + (11 - 0) / 2; the last: no one else will come
    kinds = simulate(trace, UNIT, **ROOM, limits=Limits(), policy=ByComplexity(limit=60))
    assert [s.first for s in kinds] == [1.0, 5.0, 35.0]


def test_all_requests_are_served_under_pressure():
    """Catches simulated blocks without end: with few blocks requests are sent away, everybody is served, later."""
    trace = arrivals(2.0, 40, np.random.default_rng(0), mix=[Kind(1.0, (4, 20), (5, 30))])
    wide = simulate(trace, UNIT, blocks=500, size=4, limits=Limits(), policy=FirstCome())
    tight = simulate(trace, UNIT, blocks=16, size=4, limits=Limits(), policy=FirstCome())
    for served in (wide, tight):
        assert all(s.arrival < s.first <= s.last and s.tokens == a.output for s, a in zip(served, trace, strict=True))
    assert summary(tight).preempted > 0 == summary(wide).preempted
    assert summary(tight).throughput < summary(wide).throughput
    with pytest.raises(SpecError, match="can never run"):
        simulate([Arrival(0.0, (1,) * 70, 1)], UNIT, blocks=16, size=4, limits=Limits(), policy=FirstCome())


@pytest.mark.slow
def test_gaps_have_their_mean_and_spread():
    """Catches a rate taken for a gap, a shape taken for its root; 20,000 gaps, errors of the mean and of the spread below 5 %."""
    for cv in (1.0, 3.0):
        trace = arrivals(4.0, 20000, np.random.default_rng(1), cv=cv)
        gaps = np.diff([0.0, *[a.time for a in trace]])
        assert abs(gaps.mean() * 4 - 1) < 0.05 and abs(gaps.std() / gaps.mean() / cv - 1) < 0.05
    assert arrivals(4.0, 5, np.random.default_rng(1)) == arrivals(4.0, 5, np.random.default_rng(1))
    long = [a for a in trace if len(a.prompt) > 100]
    assert 0.18 < len(long) / len(trace) < 0.22 and {len(a.prompt) for a in long} == set(range(192, 321))
    with pytest.raises(SpecError, match="expected positive"):
        arrivals(0.0, 5, np.random.default_rng(1))


def test_step_times_are_found_again():
    """Catches a column exchanged, an intercept lost, a fit that long steps rule alone, a negative cost."""
    rng, true = np.random.default_rng(0), StepTime(2e-3, 1e-4, 3e-8, 5e-5)
    loads = [Load(int(t), int(t * k), int(r)) for t, k, r in zip(*rng.integers(1, 300, (3, 40)), strict=True)]
    samples = [(load, true.seconds(load)) for load in loads]
    found = fit(samples)
    np.testing.assert_allclose([found.step, found.token, found.pair, found.row], [2e-3, 1e-4, 3e-8, 5e-5], rtol=1e-6)
    assert worst(found, samples) < 1e-6
    free = fit([(load, 1e-3 + 1e-4 * load.tokens - 1e-9 * load.pairs + 1e-6) for load in loads])
    assert min(free.step, free.token, free.pair, free.row) >= 0
    with pytest.raises(SpecError, match="at least four"):
        fit(samples[:3])


def test_the_summary_by_hand():
    """Catches a percentile that never occurred, a throughput over the wrong span."""
    served = [Served(float(i), 3, i + 1.0 + i, i + 3.0 + i) for i in range(4)]  # ttft 1, 2, 3, 4; tpot 1
    s = summary([*served, Served(0.0, 1, 9.0, 9.0)])
    assert (s.throughput, s.ttft_p50, s.ttft_p99, s.tpot_p50, s.tpot_p99) == (13 / 9, 3.0, 9.0, 1.0, 1.0)


def test_the_figure_is_an_svg_and_always_the_same():
    """Catches a policy or a trace left out, a date in the file."""
    pytest.importorskip("matplotlib")
    from refimpl.infer.engine.plot import PANELS, svg

    trace = arrivals(2.0, 10, np.random.default_rng(0))
    results = {
        t: {n: simulate(trace, UNIT, **ROOM, limits=Limits(), policy=p) for n, p in POLICIES.items()}
        for t in ("a trace", "b")
    }
    picture = svg(results)
    assert picture == svg(results) and picture.startswith(b"<?xml")
    assert all(word.encode() in picture for word in (*POLICIES, *PANELS.values(), "a trace"))


def test_the_distribution_function():
    """Catches a part that never reaches 1; needs no matplotlib."""
    from refimpl.infer.engine.plot import curve

    assert curve([3.0, 1.0]) == ([1.0, 3.0], [0.5, 1.0])
