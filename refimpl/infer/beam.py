"""Beam search: the W best texts found by always going on from the W best beginnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.model import Impl

from .distribution import log_softmax
from .settings import Request, Settings


@dataclass(frozen=True)
class Beam:
    """A continuation, log P of it under the model, and what it is ranked by: log P / length^penalty."""

    tokens: tuple[int, ...]
    logprob: float
    score: float


def beam_search(
    impl: Impl,
    prompt: Sequence[int],
    *,
    beams: int,
    max_tokens: int,
    eos: tuple[int, ...] = (),
    length_penalty: float = 1.0,
) -> list[Beam]:
    """The `beams` best continuations found, best first: the last that `search_beams` gives."""
    *_, found = search_beams(impl, prompt, beams=beams, max_tokens=max_tokens, eos=eos, length_penalty=length_penalty)
    return found


def search_beams(
    impl: Impl,
    prompt: Sequence[int],
    *,
    beams: int,
    max_tokens: int,
    eos: tuple[int, ...] = (),
    length_penalty: float = 1.0,
) -> Iterator[list[Beam]]:
    """The `beams` best continuations after each token, best first. With as many beams as there are beginnings it is exhaustive.

    Of all one-token continuations of the running beams the likeliest are taken (ties: earlier beam, lower id), until there are
    `beams` that go on; those among the first `beams` that end with `eos` are done. It stops when nothing that runs can come
    before the `beams` best that are done: log P only falls, so log P / max_tokens^penalty is the most that a running one can
    reach.
    """
    require(isinstance(beams, int) and beams >= 1, f"beams is {beams!r}; expected a whole number from 1")
    real = isinstance(length_penalty, int | float) and -32 <= length_penalty <= 32
    require(real, f"length_penalty is {length_penalty!r}; expected -32 to 32")  # its power is a float
    limit = Request(prompt, Settings(max_tokens=max_tokens, eos=eos)).check(impl.model.config)
    state = impl.new_cache()
    running, done = [_beam((), 0.0, length_penalty)], list[Beam]()
    last = impl.advance([list(prompt)], state, at=np.array([len(prompt) - 1])).logits[:, -1]
    for length in range(1, limit + 1):
        parents, running = _extend(running, last, beams, eos, length_penalty, done)
        done = _best(done, beams)
        furthest = limit if length_penalty > 0 else length + 1
        yield _best(done + running, beams)
        hopeless = [b for b in running if len(done) == beams and b.logprob / furthest**length_penalty <= done[-1].score]
        if not running or length == limit or len(hopeless) == len(running):
            break
        state["kv"] = state["kv"].kept(np.array(parents), np.full(len(parents), len(state["kv"])))
        last = impl.advance([[b.tokens[-1]] for b in running], state).logits[:, -1]


def _extend(
    running: list[Beam], logits: Array, beams: int, eos: tuple[int, ...], penalty: float, done: list[Beam]
) -> tuple[list[int], list[Beam]]:
    """The beams that go on, and which ones they continue; those that end are added to `done`.  logits (R, V)."""
    totals = np.stack([b.logprob + log_softmax(z) for b, z in zip(running, logits, strict=True)])
    parents, following = [], list[Beam]()
    for rank, i in enumerate(np.argsort(-totals, axis=None, kind="stable")):
        if len(following) == beams or not np.isfinite(totals.flat[i]):
            break
        parent, token = divmod(int(i), totals.shape[1])
        beam = _beam((*running[parent].tokens, token), float(totals.flat[i]), penalty)
        if token not in eos:
            parents.append(parent)
            following.append(beam)
        elif rank < beams:
            done.append(beam)
    return parents, following


def _beam(tokens: tuple[int, ...], logprob: float, penalty: float) -> Beam:
    return Beam(tokens, logprob, logprob / max(1, len(tokens)) ** penalty)


def _best(found: list[Beam], n: int) -> list[Beam]:
    return sorted(found, key=lambda b: -b.score)[:n]
