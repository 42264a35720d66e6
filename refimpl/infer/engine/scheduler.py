"""What the next step runs: decoding and pieces of prompts together, within a number of tokens; who begins, who must give way.

Each job is given what it misses: those who run in the order they began (all of them decoding, so missing one token, but perhaps
the last), then new ones as the policy says. A job that needs a block when there is none sends away whoever began last; that
one's blocks stay findable until they are needed, and it begins again before anybody new (recomputation, as in vLLM).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from refimpl.autograd.errors import require

from .blocks import Blocks, Copy
from .job import Job, Work
from .policies import FirstCome, Policy, Queue

REMEMBERED = 64
"""Arrivals that a policy sees."""


@dataclass(frozen=True)
class Limits:
    """`rows`: jobs that run at once. `tokens`: tokens a step. `reserve`: what must be free before a job begins, the blocks of its
    prompt, or those of everybody's longest answer too ("all": nobody is ever sent away).
    """

    rows: int = 32
    tokens: int = 256
    reserve: Literal["prompt", "all"] = "prompt"

    def __post_init__(self) -> None:
        for name in ("rows", "tokens"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(whole, f"{name} is {value!r}; expected a whole number from 1")
        require(self.reserve in ("prompt", "all"), f"reserve is {self.reserve!r}; expected 'prompt' or 'all'")


@dataclass
class Step:
    """What to run, after these copies; who was sent away for it; how many tokens of those who begin were in the cache."""

    work: list[Work] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    preempted: list[Job] = field(default_factory=list)
    found: int = 0


class Scheduler:
    """Jobs over blocks. The caller asks for a step, runs it, and says what came of it."""

    def __init__(self, blocks: Blocks, limits: Limits | None = None, policy: Policy | None = None) -> None:
        self.blocks, self.limits, self.policy = blocks, limits or Limits(), policy or FirstCome()
        self.running: list[Job] = []  # in the order they began
        self.returning: list[Job] = []  # sent away, in the order they began
        self.waiting: list[Job] = []
        self._batch: list[Job] = []  # of `waiting`, those of a closed batch that had no room in its first steps
        self._arrivals: deque[float] = deque(maxlen=REMEMBERED)

    def submit(self, job: Job) -> None:
        """One more who waits. SpecError if its blocks are more than there are at all."""
        need, b = self.blocks.needed(job.most), self.blocks
        require(
            need <= b.count,
            f"{job.prompt} tokens of prompt and up to {job.left} more need {need} blocks of {b.size}; "
            f"the cache has {b.count}, so it can never run",
        )
        self.waiting.append(job)
        self._arrivals.append(job.arrival)

    def step(self, now: float, *, more: bool = True) -> Step:
        """What to run now; no work if nobody may begin."""
        step, budget = Step(), self.limits.tokens
        for job in list(self.running):  # a prompt read in part is the last of them: nobody begins behind it
            if job in self.running and budget:
                self._go_on(job, min(job.missing, budget), step)
                budget = self.limits.tokens - sum(w.stop - w.start for w in step.work)
        if not step.preempted:
            for job in [*self.returning, *self._chosen(now, more)]:
                if not budget or len(self.running) >= self.limits.rows or not self._begin(job, step, budget):
                    break
                budget -= step.work[-1].stop - step.work[-1].start
        assert step.work or not self.running, "the first of the running always fits"
        return step

    def _chosen(self, now: float, more: bool) -> list[Job]:
        """Whom the policy lets begin; the rest of a closed batch before it is asked again."""
        if self._batch:
            return self._batch.copy()
        found = list(self.policy.admits(self.queue(now, more=more)))
        self._batch = found.copy() if self.policy.closed else []
        return found

    def queue(self, now: float, *, more: bool = True) -> Queue:
        """What the policy sees."""
        return Queue(now, self.waiting, [*self.running, *self.returning], self._arrivals, more)

    def done(self, work: Work, token: int | None = None) -> None:
        """The piece was run, and gave this token if it decides one. Its full blocks may be found from now on."""
        job, size = work.job, self.blocks.size
        for i in range(job.computed // size, work.stop // size):
            self.blocks.commit(job.table, i, job.tokens[i * size : (i + 1) * size])
        job.computed = work.stop
        if token is not None:
            job.tokens.append(token)
            job.left -= 1

    def leave(self, job: Job) -> None:
        """The job is over, finished or given up, wherever it is; its blocks are free."""
        for place in (self.running, self.returning, self.waiting, self._batch):
            if job in place:
                place.remove(job)
        self._free(job)

    def _go_on(self, job: Job, n: int, step: Step) -> None:
        """Give a running job n tokens; whoever began last gives way until it has room, itself if it is the last."""
        start, stop = job.computed, job.computed + n
        while self.blocks.missing(job.table, start, stop) > self.blocks.free:
            victim = self.running[-1]
            self._send_away(victim, step)
            if victim is job:
                return
        step.copies += self.blocks.reserve(job.table, start, stop)
        step.work.append(Work(job, start, stop, decides=stop == len(job.tokens)))

    def _send_away(self, job: Job, step: Step) -> None:
        self.running.remove(job)
        self._free(job)
        job.preempted += 1
        self.returning.insert(0, job)  # all who are there began later
        step.work = [w for w in step.work if w.job is not job]
        step.preempted.append(job)

    def _begin(self, job: Job, step: Step, budget: int) -> bool:
        """Let a job run if there is room: with what is found of it, its first piece."""
        table, n = ([], 0) if job.whole else self.blocks.match(job.tokens)
        if (
            not self._room(job, table, n) and n % self.blocks.size
        ):  # a block shared in part is one more until it is copied
            table, n = table[:-1], n - n % self.blocks.size
        if not self._room(job, table, n):
            return False
        self.blocks.share(table)
        job.table, job.computed = table, n
        step.found += n
        for place in (self.returning, self.waiting, self._batch):
            if job in place:
                place.remove(job)
        self.running.append(job)
        self._go_on(job, min(job.missing, budget), step)
        return True

    def _room(self, job: Job, table: list[int], n: int) -> bool:
        b, whole = self.blocks, n // self.blocks.size  # a block found in part is copied, so its place is needed anew
        promised = sum(b.missing(j.table, j.computed, self._goal(j)) for j in self.running)
        return b.idle(table) + promised + b.needed(self._goal(job)) - whole <= b.free

    def _goal(self, job: Job) -> int:
        """For how many tokens a running job is promised room."""
        return len(job.tokens) if self.limits.reserve == "prompt" else job.most

    def _free(self, job: Job) -> None:
        self.blocks.release(job.table)
        job.table, job.computed = [], 0
