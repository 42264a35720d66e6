"""Who may begin, and when: small named objects that look at the queue and change nothing.

R 3.4 says nothing of the order of requests. First come and shortest first join a running batch at any step (continuous batching,
Orca, OSDI 2022); the two others let a batch run to its end, as articles about serving describe them, and are here to be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .job import Job


@dataclass(frozen=True)
class Queue:
    """What a policy sees: those who wait, in order of arrival; those who run; the times of the latest arrivals; whether more may
    come.
    """

    now: float
    waiting: Sequence[Job]
    running: Sequence[Job]
    arrivals: Sequence[float] = ()
    more: bool = True


class Policy(Protocol):
    """A rule of admission."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def closed(self) -> bool:
        """Whether those admitted together are a batch: all begin, as steps have room, before anybody else is looked at."""

    def admits(self, queue: Queue) -> Sequence[Job]:
        """Those of `waiting` who may begin now, best first. If the first has no room, nobody overtakes it."""

    def wake(self, queue: Queue) -> float | None:
        """When to look again though nothing happened; None: not before something does."""


@dataclass(frozen=True)
class FirstCome:
    """In order of arrival."""

    name: str = "first-come"
    closed: bool = False

    def admits(self, queue: Queue) -> Sequence[Job]:
        """All, as they came."""
        return queue.waiting

    def wake(self, queue: Queue) -> float | None:
        """Never."""
        return None


@dataclass(frozen=True)
class ShortestFirst:
    """The least work first: prompt still to be read and tokens to come. A long request may wait for ever under constant load."""

    name: str = "shortest-first"
    closed: bool = False

    def admits(self, queue: Queue) -> Sequence[Job]:
        """All, by tokens to run, then arrival."""
        return sorted(queue.waiting, key=lambda j: (len(j.tokens) + j.left, j.arrival, j.id))

    def wake(self, queue: Queue) -> float | None:
        """Never."""
        return None


@dataclass(frozen=True)
class ArrivalGap:
    """Dynamic batching: a batch closes when it is full, when arrivals pause (no one came for `factor` mean gaps), or when its first
    request has waited `longest` seconds; then it runs to its end.
    """

    full: int = 32
    factor: float = 2.0
    longest: float = 1.0
    name: str = "arrival-gap"
    closed: bool = True

    def admits(self, queue: Queue) -> Sequence[Job]:
        """A batch once it is closed, and nobody while one runs."""
        closes = self.wake(queue)
        if queue.running or closes is None:
            return ()
        ready = len(queue.waiting) >= self.full or queue.now >= closes or not queue.more
        return queue.waiting[: self.full] if ready else ()

    def wake(self, queue: Queue) -> float | None:
        """When the batch closes if nobody comes."""
        if not queue.waiting:
            return None
        times = queue.arrivals
        gap = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        return min(times[-1] + self.factor * gap if times else queue.now, queue.waiting[0].arrival + self.longest)


@dataclass(frozen=True)
class ByComplexity:
    """Batches of one kind, 32 short requests or 8 long ones, each run to its end. Described in articles, with these
    numbers; neither in R nor in DeepSeek's code.
    """

    short: int = 32
    long: int = 8
    limit: int = 256
    name: str = "by-complexity"
    closed: bool = True

    def admits(self, queue: Queue) -> Sequence[Job]:
        """The kind of whoever has waited longest, when nobody runs."""
        if queue.running or not queue.waiting:
            return ()
        kind = self.is_long(queue.waiting[0])
        return [j for j in queue.waiting if self.is_long(j) == kind][: self.long if kind else self.short]

    def wake(self, queue: Queue) -> float | None:
        """Never."""
        return None

    def is_long(self, job: Job) -> bool:
        """Prompt and answer together over `limit` tokens."""
        return len(job.tokens) + job.left > self.limit


POLICIES: dict[str, Policy] = {p.name: p for p in (FirstCome(), ShortestFirst(), ArrivalGap(), ByComplexity())}
"""By name, with their default numbers."""
