"""When each step of a schedule runs: an event simulation with given durations, and the bubbles that come out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from refimpl.autograd.errors import SpecError, require

from .schedule import Batch, Message, Op, Schedule, Step, step_text


@dataclass(frozen=True)
class Times:
    """Durations of one chunk, in any one unit: F forward, B full backward, W its weight part (I = B - W).

    `FB` is a forward and a backward executed together (the report's F&B; F + B unless given), `message` what a
    transfer to another rank takes. Raises SpecError for negative times or W > B.
    """

    F: float = 1.0
    B: float = 2.0
    W: float = 1.0
    FB: float | None = None
    message: float = 0.0

    def __post_init__(self) -> None:
        known = {"F": self.F, "B": self.B, "W": self.W, "FB": self.overlapped, "message": self.message}
        for name, value in known.items():
            require(0 <= value < float("inf"), f"time {name} is {value}; expected a finite number >= 0")
        require(self.W <= self.B, f"time W is {self.W}, a part of B, which is {self.B}")

    @property
    def overlapped(self) -> float:
        """F&B."""
        return self.F + self.B if self.FB is None else self.FB

    def of(self, step: Step) -> float:
        """Duration of a step."""
        if len(step) == 2:
            return self.overlapped
        return {"F": self.F, "B": self.B, "I": self.B - self.W, "W": self.W}[step[0].kind]


class Span(NamedTuple):
    """One step of one rank, from `start` to `end`."""

    rank: int
    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """rank -> spans in order."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """End of the last step of all ranks."""
        return max((row[-1].end for row in self.spans if row), default=0.0)

    def busy(self, rank: int) -> float:
        """Time a rank computes."""
        return sum(span.end - span.start for span in self.spans[rank])

    def bubble(self, rank: int) -> float:
        """Makespan minus the rank's busy time."""
        return self.makespan - self.busy(rank)

    def chrome(self, unit_us: float = 1000.0) -> str:
        """A trace for chrome://tracing or Perfetto: one thread a rank, one time unit = `unit_us` microseconds."""
        return json.dumps({"traceEvents": list(_events(self, unit_us)), "displayTimeUnit": "ms"}, indent=0)


def _events(timeline: Timeline, unit_us: float) -> Iterator[dict[str, Any]]:
    name = timeline.schedule.name
    yield {"name": "process_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": name}}
    for rank, row in enumerate(timeline.spans):
        yield {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for span in row:
            yield {
                "name": step_text(span.step),
                "cat": "&".join(op.kind for op in span.step),
                "ph": "X",
                "pid": 0,
                "tid": rank,
                "ts": span.start * unit_us,
                "dur": (span.end - span.start) * unit_us,
                "args": {"stages": [timeline.schedule.layout.stage(rank, op) for op in span.step]},
            }


def simulate(schedule: Schedule, times: Times, *, synchronous: bool = False) -> Timeline:
    """start = max(end of the rank's last step, arrival of what the step needs); end = start + duration.

    Sends are buffered and a step waits only for its own inputs. `synchronous` replays the batches instead, as a
    rendezvous: a batch is over when every message in it has been posted by the other side too. Raises SpecError, with
    every rank's pending step, if the ranks wait for each other in a circle.
    """
    run = _Synchronous(schedule, times) if synchronous else _Buffered(schedule, times)
    while any(run.left(rank) for rank in range(schedule.layout.n_ranks)):
        moved = [run.advance(rank) for rank in range(schedule.layout.n_ranks)]
        if not any(moved):
            raise SpecError("the ranks wait for each other:\n" + "\n".join(run.pending()))
    return Timeline(schedule, tuple(tuple(row) for row in run.spans))


Result = tuple[str, int, int]  # ("F" or "B", stage that computes it, micro-batch)


class _Buffered:
    """The ranks' clocks, and when each result was ready."""

    def __init__(self, schedule: Schedule, times: Times) -> None:
        self.schedule, self.layout, self.times = schedule, schedule.layout, times
        self.spans: list[list[Span]] = [[] for _ in schedule.ranks]
        self.ready: dict[Result, float] = {}

    def left(self, rank: int) -> bool:
        """Whether the rank has a step to do."""
        return len(self.spans[rank]) < len(self.schedule.ranks[rank])

    def next_step(self, rank: int) -> Step:
        """The step the rank is at."""
        return self.schedule.ranks[rank][len(self.spans[rank])]

    def clock(self, rank: int) -> float:
        """When the rank's last step ended."""
        return self.spans[rank][-1].end if self.spans[rank] else 0.0

    def advance(self, rank: int) -> bool:
        """Run the rank as far as it can go; whether it moved."""
        before = len(self.spans[rank])
        while self.left(rank) and (start := self.start(rank)) is not None:
            step = self.next_step(rank)
            end = start + self.times.of(step)
            self.spans[rank].append(Span(rank, step, start, end))
            for op in step:
                if op.kind != "W":
                    self.ready[self.result(rank, op)] = end
        return len(self.spans[rank]) > before

    def result(self, rank: int, op: Op) -> Result:
        """What an op computes."""
        return "F" if op.kind == "F" else "B", self.layout.stage(rank, op), self.layout.micro_batch(op)

    def needs(self, rank: int, step: Step) -> Iterator[tuple[Result, float]]:
        """(result, how long it travels) for everything a step waits for."""
        for op in step:
            place = self.layout.source(rank, op)
            if place is not None:
                stage = self.layout.stages[place[0]][place[1]]
                travel = 0.0 if place[0] == rank else self.times.message
                yield ("F" if op.kind == "F" else "B", stage, self.layout.micro_batch(op)), travel

    def start(self, rank: int) -> float | None:
        """When the next step can start; None if something it needs has no time yet."""
        moment = self.clock(rank)
        for result, travel in self.needs(rank, self.next_step(rank)):
            if result not in self.ready:
                return None
            moment = max(moment, self.ready[result] + travel)
        return moment

    def pending(self) -> Iterator[str]:
        """One line a rank: where it is and what it waits for."""
        for rank in filter(self.left, range(self.layout.n_ranks)):
            step, at = self.next_step(rank), len(self.spans[rank])
            missing = [r for r, _ in self.needs(rank, step) if r not in self.ready]
            what = ", ".join(f"{kind} of stage {stage}, micro-batch {j}" for kind, stage, j in missing)
            yield f"  rank {rank}, step {at} ({step_text(step)}) waits for {what or 'its batch of messages'}"


class _Synchronous(_Buffered):
    """Batches as rendezvous: what was posted, when, by (sender, receiver, result)."""

    def __init__(self, schedule: Schedule, times: Times) -> None:
        super().__init__(schedule, times)
        self.posted: dict[tuple[str, int, Result], float] = {}  # (verb, sender, result) -> when
        for rank in range(self.layout.n_ranks):
            self._post(rank)

    def advance(self, rank: int) -> bool:
        """As buffered, one step at a time, and post the next batch."""
        moved = False
        while self.left(rank) and (start := self.start(rank)) is not None:
            step = self.next_step(rank)
            self.spans[rank].append(Span(rank, step, start, start + self.times.of(step)))
            self._post(rank)
            moved = True
        return moved

    def _batch(self, rank: int) -> Batch:
        return self.schedule.batches[rank][len(self.spans[rank])]

    def _key(self, rank: int, message: Message) -> tuple[int, Result]:
        """(sender, result) of a message that `rank` posts."""
        stage, layout = self.layout.stage(rank, message), self.layout
        if message.verb == "r":
            stage += -1 if message.kind == "F" else 1
        sender = rank if message.verb == "s" else message.peer
        return sender, (message.kind, stage, layout.micro_batch(message))

    def _post(self, rank: int) -> None:
        for message in self._batch(rank):
            self.posted[(message.verb, *self._key(rank, message))] = self.clock(rank)

    def start(self, rank: int) -> float | None:
        """When the batch before the next step is over; None if a partner has not come to its side of it."""
        batch, moment = self._batch(rank), self.clock(rank)
        for message in batch:
            other = ("r" if message.verb == "s" else "s", *self._key(rank, message))
            if other not in self.posted:
                return None
            moment = max(moment, self.posted[other])
        return moment + (self.times.message if batch else 0.0)
