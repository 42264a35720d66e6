"""Generation with the latent cache (R 3.4): the prompts at once, then a step for every token, or for several with speculation.

There is one loop. A step gives the model what is decided but unseen, and drafts; what it says of them is verified; the cache
forgets the drafts that fell. Without speculation there are no drafts, and verifying none is sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.autograd.errors import require, where
from refimpl.autograd.tensor import Array
from refimpl.layers.mla import Attend
from refimpl.model import Impl

from .drafter import Drafter, Speculation
from .ragged import padded
from .row import Finish, Row, Token, likeliest
from .settings import Request, Settings
from .verify import Draft, Tally


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
            rows.append(Row(i, request, request.check(impl.model.config)))
    return _steps(impl, rows, Drafter(impl, speculate) if speculate else None, tally or Tally())


def _steps(impl: Impl, rows: list[Row], drafter: Drafter | None, tally: Tally) -> Iterator[Token]:
    state = impl.new_cache()
    while rows:
        fed = [row.fed() for row in rows]
        tokens, valid = padded(fed)
        steps = bool(state)  # the prompts are behind us; from now on latents are read, not expanded
        attend: Attend | None = "absorbed" if steps and impl.attend == "auto" else None
        at = None if steps else np.array([len(ids) - 1 for ids in fed])  # behind a prompt, not inside it
        out = impl.advance(tokens, state, valid=None if valid.all() else valid, attend=attend, at=at)
        for row, logits in zip(rows, out.logits, strict=True):
            yield from row.decide(logits[: len(row.fed())] if steps else logits, tally if steps else None)
        going = [b for b, row in enumerate(rows) if not row.done]
        hidden = [h[: rows[b].seen] for b, h in enumerate(impl.model.mtp_start(out)) if not rows[b].done]
        rows = [rows[b] for b in going]
        if rows:
            state["kv"] = state["kv"].kept(np.array(going), np.array([len(row.tokens) - 1 for row in rows]))
        if drafter and any(row.left > 1 for row in rows):
            _draft(drafter, rows, going, hidden)


def _draft(drafter: Drafter, rows: list[Row], going: list[int], hidden: list[Array]) -> None:
    """Give every row its drafts, no more than it has room for. A last token is never drafted: something must follow a draft.
    Drafts without room are made for the others' sake and cost no draw, so that a row's draws are the same in every company.
    """

    def draft(b: int, logits: Array, before: Sequence[int]) -> Draft:
        row = rows[b]
        return row.draft(logits, before, greedy=drafter.greedy) if len(before) < row.left - 1 else likeliest(logits)

    most = max(row.left for row in rows) - 1
    drafts = drafter.propose(going, hidden, [row.tokens for row in rows], draft, most)
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
