"""One request on its way: what is decided, what is drafted, what a run of the model decides next, and when it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from refimpl.autograd.tensor import Array

from .distribution import log_softmax, one_hot
from .settings import Request
from .text import TextStream
from .verify import Draft, Tally, verify

Finish = Literal["eos", "stop", "length"]
"""Why a row ended: an end token, a stop text, or `max_tokens` (or the window)."""


Likely: TypeAlias = tuple[tuple[int, float], ...]
"""The most likely (id, log-probability), falling; ties by rising id."""


@dataclass(frozen=True)
class Scored:
    """A token that was given: its id, its log-probability after those before it, its rank from 1, the most likely beside it."""

    id: int
    logprob: float
    rank: int
    top: Likely = ()

    @classmethod
    def of(cls, token: int, logits: Array, n: int) -> Scored:
        """What the logits (V,) before a token say of it, and their n most likely."""
        scores = log_softmax(logits)
        best = np.argsort(-scores, kind="stable")[:n]
        rank = 1 + int((scores > scores[token]).sum())
        return cls(token, float(scores[token]), rank, tuple([(int(i), float(scores[i])) for i in best]))


@dataclass(frozen=True)
class Token:
    """A token of request `row`: its id, its log-probability under the model itself (temperature 1, nothing cut), the most
    likely beside it, the text that it made certain, and, if it was the last, why. `prompt`: of the prompt's tokens but the first,
    with an engine's first token if it was asked for.
    """

    row: int
    id: int
    logprob: float
    top: Likely = ()
    text: str = ""
    finish: Finish | None = None
    prompt: tuple[Scored, ...] = ()


def likeliest(p: Array) -> Draft:
    """The most likely token, as a draft that could be no other.  p (V,), or its logits."""
    best = int(np.argmax(p))
    return Draft(best, one_hot(best, len(p)))


class Row:
    """A request on its way."""

    def __init__(self, number: int, request: Request, left: int) -> None:
        self.number, self.left, self.settings = number, left, request.settings
        self.tokens = [int(t) for t in request.prompt]
        self.draw = request.draws()
        self.text = TextStream(request.decode, request.settings.stop) if request.decode else None
        self.pending = self.tokens.copy()  # decided, not yet seen by the model
        self.drafts: list[Draft] = []
        self.seen = 0  # of the tokens fed last, how many are decided
        self.done = False

    def fed(self) -> Array:
        """What the model is to see next: what is decided, then the drafts."""
        return np.array(self.pending + [d.token for d in self.drafts])

    def draft(self, logits: Array, before: Sequence[int], *, greedy: bool) -> Draft:
        """A draft after those before, from what a module says.  logits (V,)."""
        q = self.settings.distribution(logits, self.tokens + list(before))
        return likeliest(q) if greedy else Draft(self.draw(q), q)

    def decide(self, logits: Array, tally: Tally | None) -> Iterator[Token]:
        """The tokens that a run of the model decides: the drafts that stand and one more.  logits (S, V) of what was fed, at least
        of the last token decided and the drafts.
        """
        at, ids = len(self.pending), [d.token for d in self.drafts]
        z = logits[-1 - len(ids) :]  # (1 + drafts, V)
        context = self.tokens.copy()
        stood, last = verify(lambda j: self.settings.distribution(z[j], context + ids[:j]), self.drafts, self.draw)
        before = len(context)
        for j, token in enumerate([*ids[:stood], last]):
            yield self._take(token, z[j])
            if self.done:
                break
        self.seen, self.pending, self.drafts = at + stood, self.tokens[-1:], []
        if tally:
            tally.add(len(ids), stood, len(self.tokens) - before)

    def _take(self, token: int, logits: Array) -> Token:
        """Append a token and see whether it was the last.  logits (V,) that foretold it."""
        self.tokens.append(token)
        self.left -= 1
        scored = Scored.of(token, logits, self.settings.logprobs)
        end = token in self.settings.eos
        text = self.text.push(token) if self.text and not end else ""
        finish: Finish | None = "eos" if end else "stop" if self.text and self.text.stopped else None
        finish = finish or (None if self.left else "length")
        self.done = finish is not None
        if self.text and self.done and finish != "stop":
            text += self.text.finish()
            finish = "stop" if self.text.stopped else finish
        return Token(self.number, token, scored.logprob, scored.top, text, finish)
