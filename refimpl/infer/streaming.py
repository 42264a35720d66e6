"""Generation with the latent cache (R 3.4): the prompts at once, then a step for every token, or for several with speculation.

There is one loop. A step gives the model what is decided but unseen, and drafts; what it says of them is verified; the cache
forgets the drafts that fell. Without speculation there are no drafts, and verifying none is sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from refimpl.autograd.errors import require, where
from refimpl.autograd.tensor import Array
from refimpl.model import Impl

from .distribution import log_softmax, one_hot
from .drafter import Drafter, Speculation
from .ragged import padded
from .settings import Request, Settings
from .text import TextStream
from .verify import Draft, Tally, verify

Finish = Literal["eos", "stop", "length"]
"""Why a row ended: an end token, a stop text, or `max_tokens` (or the window)."""


@dataclass(frozen=True)
class Token:
    """A token of request `row`: its id, its log-probability under the model itself (temperature 1, nothing cut), the most
    likely (id, log-probability) beside it, the text that it made certain, and, if it was the last, why.
    """

    row: int
    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    text: str = ""
    finish: Finish | None = None


@dataclass
class Completion:
    """Everything that came of one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None

    def add(self, token: Token) -> None:
        """One more token."""
        self.tokens.append(token.id)
        self.logprobs.append(token.logprob)
        self.text += token.text
        self.finish = token.finish


class _Row:
    """A request on its way."""

    def __init__(self, number: int, request: Request, left: int) -> None:
        self.number, self.left, self.settings = number, left, request.settings
        self.tokens = [int(t) for t in request.prompt]
        self.draw = request.draws()
        self.text = TextStream(request.decode, request.settings.stop) if request.decode else None
        self.pending = self.tokens.copy()  # decided, not yet seen by the model
        self.drafts: list[Draft] = []
        self.done = False

    def fed(self) -> Array:
        """What the model is to see next: what is decided, then the drafts."""
        return np.array(self.pending + [d.token for d in self.drafts])

    def target(self, logits: Array, drafts: Sequence[int]) -> Array:
        """The distribution of the token after these drafts.  logits (V,) -> (V,)."""
        return self.settings.distribution(logits, self.tokens + list(drafts))

    def draft(self, logits: Array, before: Sequence[int], *, greedy: bool) -> Draft:
        """A draft after those before, from what a module says.  logits (V,)."""
        q = self.target(logits, before)
        return self.likeliest(q) if greedy else Draft(self.draw(q), q)

    def likeliest(self, p: Array) -> Draft:
        """The most likely token, as a draft that could be no other.  p (V,), or its logits."""
        best = int(np.argmax(p))
        return Draft(best, one_hot(best, len(p)))

    def verified(self, logits: Array) -> list[int]:
        """The drafts that stand and the token that follows.  logits (1 + drafts, V)."""
        ids = [d.token for d in self.drafts]
        stood, last = verify(lambda j: self.target(logits[j], ids[:j]), self.drafts, self.draw)
        return [*ids[:stood], last]

    def take(self, token: int, logits: Array) -> Token:
        """Append a token and see whether it was the last.  logits (V,) that foretold it."""
        self.tokens.append(token)
        self.left -= 1
        scores = log_softmax(logits)
        best = np.argsort(-scores, kind="stable")[: self.settings.logprobs]
        end = token in self.settings.eos
        text = self.text.push(token) if self.text and not end else ""
        finish: Finish | None = "eos" if end else "stop" if self.text and self.text.stopped else None
        finish = finish or (None if self.left else "length")
        self.done = finish is not None
        if self.text and self.done and finish != "stop":
            text += self.text.finish()
            finish = "stop" if self.text.stopped else finish
        return Token(
            self.number, token, float(scores[token]), tuple([(int(i), float(scores[i])) for i in best]), text, finish
        )


def stream(
    impl: Impl, requests: Sequence[Request], *, speculate: Speculation | None = None, tally: Tally | None = None
) -> Iterator[Token]:
    """The tokens of all requests as they come, each request with its own settings and draws, whatever the others do.

    SpecError at once for a request that the model cannot take (nothing is run then), or for speculation without MTP modules.
    """
    rows = []
    require(len(requests) > 0, "no requests")
    for i, request in enumerate(requests):
        with where(f"in request {i}"):
            rows.append(_Row(i, request, request.check(impl.model.config)))
    return _steps(impl, rows, Drafter(impl, speculate) if speculate else None, tally or Tally())


def _steps(impl: Impl, rows: list[_Row], drafter: Drafter | None, tally: Tally) -> Iterator[Token]:
    state = impl.new_cache()
    while rows:
        first = not state
        tokens, valid = padded([row.fed() for row in rows])
        absorbed = None if first or impl.attend != "auto" else "absorbed"
        out = impl.advance(tokens, state, valid=None if valid.all() else valid, attend=absorbed)
        seen = []  # per row, how many of the tokens fed are decided now
        for row, logits in zip(rows, out.logits, strict=True):
            at = len(row.pending)
            logits = logits[at - 1 : at + len(row.drafts)]
            new = row.verified(logits)
            seen.append(at + len(new) - 1)
            for j, token in enumerate(new):
                yield row.take(token, logits[j])
                if row.done:
                    break
            if not first:
                tally.add(len(row.drafts), len(new) - 1, j + 1)
        going = [b for b, row in enumerate(rows) if not row.done]
        rows = [rows[b] for b in going]
        for row in rows:
            row.pending, row.drafts = row.tokens[-1:], []
        if rows:
            state["kv"] = state["kv"].kept(np.array(going), np.array([len(row.tokens) - 1 for row in rows]))
        if drafter and any(row.left > 1 for row in rows):
            _draft(drafter, rows, going, [h[: seen[b]] for b, h in enumerate(impl.model.mtp_start(out))])


def _draft(drafter: Drafter, rows: list[_Row], going: list[int], hidden: list[Array]) -> None:
    """Give every row its drafts, no more than it has room for. A last token is never drafted: something must follow a draft.
    Drafts without room are made for the others' sake and cost no draw, so that a row's draws are the same in every company.
    """

    def draft(b: int, logits: Array, before: Sequence[int]) -> Draft:
        row = rows[b]
        return row.draft(logits, before, greedy=drafter.greedy) if len(before) < row.left - 1 else row.likeliest(logits)

    drafts = drafter.propose(going, [hidden[b] for b in going], [row.tokens for row in rows], draft)
    for row, found in zip(rows, drafts, strict=True):
        row.drafts = found[: row.left - 1]


def generate(
    impl: Impl, requests: Sequence[Request], *, speculate: Speculation | None = None, tally: Tally | None = None
) -> list[Completion]:
    """Everything `stream` gives, gathered by request."""
    found = [Completion() for _ in requests]
    for token in stream(impl, requests, speculate=speculate, tally=tally):
        found[token.row].add(token)
    return found


def greedy(impl: Impl, prompts: Any, n: int, *, eos: int | None = None, speculate: Speculation | None = None) -> Array:
    """The n most likely next tokens, each fed back.  prompts (B, S) -> (B, n) int; after `eos` a row repeats it.

    Ties go to the lower token id.
    """
    if n == 0:
        return np.zeros((len(prompts), 0), np.int64)
    settings = Settings(temperature=0, max_tokens=n, eos=() if eos is None else (eos,))
    rows = [c.tokens for c in generate(impl, [Request(p, settings) for p in prompts], speculate=speculate)]
    return np.array([row + row[-1:] * (n - len(row)) for row in rows])
