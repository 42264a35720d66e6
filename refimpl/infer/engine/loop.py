"""The batching engine: requests come and go at any step; each gets the tokens it would get alone (R 3.4, continuous batching)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from refimpl.autograd.errors import SpecError, require, where
from refimpl.autograd.tensor import Array
from refimpl.infer.row import Row, Token
from refimpl.infer.settings import Request
from refimpl.layers.stage import observing
from refimpl.model import Impl

from .forward import Piece, forward
from .invariant import Tiled
from .job import Job, Work
from .pages import Pages
from .policies import Policy
from .prompt import PromptScores
from .scheduler import Limits, Scheduler, Step


@dataclass
class Counts:
    """What an engine has done so far: steps, tokens run, tokens found in the cache, jobs sent away."""

    steps: int = 0
    run: int = 0
    found: int = 0
    preempted: int = 0


class Engine:
    """Submit requests, cancel them, step; a step gives the tokens that it decided."""

    def __init__(
        self,
        impl: Impl,
        pages: Pages,
        *,
        limits: Limits | None = None,
        policy: Policy | None = None,
        invariant: Tiled | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`pages`: where the latents go, `Pages(impl, blocks=, size=)`; what they hold already is found again. `invariant`: the
        same bits for each request whatever the batch, the schedule and the cache, for more time. SpecError for another
        model's pages.
        """
        pages.check(impl)
        held = sum(r > 0 for r in pages.blocks.refs)
        require(not held, f"{held} blocks are in use: another engine still runs on these pages")
        self.impl, self.pages, self.invariant, self.clock = impl, pages, invariant, clock
        self.scheduler = Scheduler(pages.blocks, limits, policy)
        self.counts = Counts()
        self._rows: dict[int, tuple[Row, Job]] = {}
        self._prompts: dict[int, PromptScores] = {}
        self._next = 0

    def submit(self, request: Request, *, prompt_logprobs: int | None = None) -> int:
        """The number under which its tokens will come (`Token.row`). `prompt_logprobs`: with the first one come the prompt's own
        log-probabilities (`Token.prompt`), each with so many of the likeliest; all of the prompt is run then, whatever is in the
        cache. SpecError, and nothing changes, for what the model cannot take or the cache could never hold.
        """
        left = request.check(self.impl.model.config)
        row = Row(self._next, request, left)
        job = Job(self._next, self.clock(), row.tokens.copy(), left, whole=prompt_logprobs is not None)
        scores = (
            None
            if prompt_logprobs is None
            else PromptScores(row.tokens, prompt_logprobs, self.impl.model.config.vocab_size)
        )
        self.scheduler.submit(job)
        if scores:
            self._prompts[self._next] = scores
        self._rows[self._next] = (row, job)
        self._next += 1
        return row.number

    def cancel(self, number: int) -> bool:
        """Give a request up and free its blocks; False if it is over already (or never was)."""
        if number not in self._rows:
            return False
        self.scheduler.leave(self._rows.pop(number)[1])
        self._prompts.pop(number, None)
        return True

    def __len__(self) -> int:
        """Requests that are not over."""
        return len(self._rows)

    def step(self, *, more: bool = True) -> list[Token]:
        """Run what the scheduler says -> the tokens decided, none if nobody may begin yet. `more` False: no one else will
        come, so a policy need not wait.
        """
        step = self.scheduler.step(self.clock(), more=more)
        if not step.work:
            return []
        logits = self._run(step)
        self._count(step)
        return [token for work, z in zip(step.work, logits, strict=True) for token in self._done(work, z)]

    def submit_all(self, requests: Sequence[Request], *, prompt_logprobs: int | None = None) -> list[int]:
        """All of them or, with SpecError, none."""
        numbers = list[int]()
        try:
            for i, request in enumerate(requests):
                with where(f"in request {i}"):
                    numbers.append(self.submit(request, prompt_logprobs=prompt_logprobs))
        except SpecError:
            for n in numbers:
                self.cancel(n)
            raise
        return numbers

    def drain(self) -> Iterator[Token]:
        """Tokens as they come until all requests are over."""
        while self._rows:
            yield from self.step(more=False)

    def _run(self, step: Step) -> list[Array]:
        """Logits behind every piece of work, (1, V), or behind each of its tokens, (S, V)."""
        self.pages.copy(step.copies)
        pieces = [Piece(w.job.tokens[w.start : w.stop], w.start, w.job.table, w.job.whole) for w in step.work]
        with ExitStack() as around:
            around.enter_context(self.impl.rounding())
            if self.invariant:
                around.enter_context(observing(self.invariant))
            logits = forward(self.impl.model, pieces, self.pages, singly=self.invariant is not None)
        return np.split(logits, np.cumsum([len(p.tokens) if p.every else 1 for p in pieces])[:-1])

    def _done(self, work: Work, logits: Array) -> Iterator[Token]:
        """Tell the scheduler, and give the token if the piece decides one.  logits (S, V) behind its tokens, or (1, V)."""
        scores = self._prompts.get(work.job.id)
        if scores:
            scores.read(work.start, logits)
        if not work.decides:
            self.scheduler.done(work)
            return
        row, job = self._rows[work.job.id]
        row.pending = row.pending[-1:]  # the rest was seen in earlier pieces
        for token in row.decide(logits[-1:], None):
            self.scheduler.done(work, token.id)
            if scores:
                token, job.whole = replace(token, prompt=scores.all()), False
                del self._prompts[job.id]
            if token.finish:
                self.scheduler.leave(job)
                del self._rows[job.id]
            yield token

    def _count(self, step: Step) -> None:
        n = self.counts
        n.steps, n.run = n.steps + 1, n.run + sum(w.stop - w.start for w in step.work)
        n.preempted += len(step.preempted)
        n.found += step.found
