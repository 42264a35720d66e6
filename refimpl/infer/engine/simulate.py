"""The same scheduler in simulated time: events are arrivals and ends of steps, a step takes what `StepTime` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .blocks import Blocks
from .job import Job
from .policies import Policy
from .scheduler import Limits, Scheduler, Step
from .steptime import Load, StepTime
from .traces import Arrival


@dataclass
class Served:
    """What happened to a request: when it came, when its first and last tokens did, how many there were, how often it was
    sent away.
    """

    arrival: float
    tokens: int
    first: float = 0.0
    last: float = 0.0
    preempted: int = 0

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.first - self.arrival

    @property
    def tpot(self) -> float:
        """Time per output token after the first; 0 if there is no other."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0


def simulate(
    trace: Sequence[Arrival], times: StepTime, *, blocks: int, size: int, limits: Limits, policy: Policy
) -> list[Served]:
    """Every request of the trace, served. SpecError for one that never fits. The trace is in order of time."""
    scheduler = Scheduler(Blocks(blocks, size), limits, policy)
    served = [Served(a.time, a.output) for a in trace]
    now, come = 0.0, 0
    while True:
        while come < len(trace) and trace[come].time <= now:
            a = trace[come]
            scheduler.submit(Job(come, a.time, list(a.prompt), a.output))
            come += 1
        step = scheduler.step(now, more=come < len(trace))
        if step.work:
            now += times.seconds(Load.of(step.work))
            _finish(step, scheduler, served, now)
            continue
        queue = scheduler.queue(now)
        wake = scheduler.policy.wake(queue) if queue.waiting else None
        events = [*([trace[come].time] if come < len(trace) else []), *([wake] if wake is not None else [])]
        if not events:
            assert not queue.waiting, "a policy holds requests back for ever"
            return served
        assert min(events) > now, "time stands still"
        now = min(events)


def _finish(step: Step, scheduler: Scheduler, served: list[Served], now: float) -> None:
    """The step's tokens, all at its end."""
    for job in step.preempted:
        served[job.id].preempted += 1
    for work in step.work:
        job, s = work.job, served[work.job.id]
        if not work.decides:
            scheduler.done(work)
            continue
        scheduler.done(work, -1 - job.id)  # tokens of no one else
        s.first = s.first or now
        if not job.left:
            s.last = now
            scheduler.leave(job)
