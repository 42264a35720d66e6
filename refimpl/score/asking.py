"""A case's rows put to an OpenAI-compatible server, in the first way that it answers: of the whole prompt at once (prompt_logprobs,
echo), of one more token at every position, or with tokens alone. Then again in other company.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from refimpl.autograd.errors import SpecError, require, where

from .client import Client, Unreachable
from .replies import generated, whole
from .shown import Again, Entry, Impossible, Place, Shown
from .spelling import Spelling

Track = Callable[[list[Any]], Iterable[Any]]
_PATH = "/v1/completions"
_GREEDY = {"max_tokens": 1, "temperature": 0, "stream": False}
_TOGETHER = 8
"""Requests at once."""


@dataclass(frozen=True)
class Way:
    """A way to ask: the keys of the body for so many most likely tokens, and whether the reply shows the whole prompt."""

    name: str
    keys: Callable[[int], Mapping[str, Any]]
    prompt: bool


WAYS = (
    Way("prompt_logprobs", lambda k: {"prompt_logprobs": k}, True),
    Way("echo", lambda k: {"echo": True, "logprobs": k}, True),
    Way("a request a position", lambda k: {"logprobs": k, "return_tokens_as_token_ids": True}, False),
    Way("a request a position", lambda k: {"logprobs": True, "top_logprobs": k}, False),
    Way("a request a position, tokens alone", lambda k: {}, False),
)
"""What shows most with the fewest requests comes first."""
TOPS = (20, 10, 5, 1)
"""How many most likely tokens are asked for where that many are refused."""


@dataclass(frozen=True)
class Asked:
    """What one request showed: entries by position, the token that was generated after the last one."""

    entries: Mapping[int, Entry]
    chosen: int | None


@dataclass(frozen=True)
class Asker:
    """Asks in one way, prompts as ids or as text."""

    client: Client
    way: Way
    top: int
    model: str
    spelling: Spelling
    text: bool

    def __call__(self, tokens: Sequence[int], *, retries: int | None = None) -> Asked:
        """One prompt. SpecError for a server that takes it for other tokens."""
        prompt: Any = self.spelling.text(tokens) if self.text else list(tokens)
        named = {"model": self.model} if self.model else {}
        body = {**named, "prompt": prompt, **_GREEDY, **self.way.keys(self.top)}
        reply = self.client.post(_PATH, body, retries=retries)
        with where(f"in the answer of {self.client.url}"):
            _counted(reply, len(tokens))
            entry, chosen = generated(reply, self.spelling.words) if not self.way.prompt else ({}, None)
            last = len(tokens) - 1
            if self.way.prompt:
                return Asked(whole(reply, 0, tokens, self.spelling.words), chosen)
            return Asked({last: entry} if entry else {}, chosen)

    @property
    def described(self) -> str:
        """In words."""
        most = f", {self.top} most likely" if self.way.keys(1) else ""
        return f"{self.way.name}{most}, prompts as {'text' if self.text else 'ids'}"


def ask(
    client: Client, tokens: list[list[int]], spelling: Spelling, *, model: str = "", top: int = 20, track: Track = iter
) -> Shown:
    """Everything the server shows of the rows, alone, and again: each row a second time, all at once, after a prefix of itself with
    another end. SpecError where it answers in no way. The longest beginning of a row comes first: mlx-lm 0.32.2 ends where a prompt
    is a cached one and the token that followed it.
    """
    asker = _found(client, tokens[0], spelling, model or _only_model(client), top)
    prompts = [
        (b, n) for b, row in enumerate(tokens) for n in ([len(row)] if asker.way.prompt else range(len(row), 0, -1))
    ]
    alone = {(b, n): asker(tokens[b][:n]) for b, n in track(prompts)}
    rows = [(b, len(row)) for b, row in enumerate(tokens)]
    again = (
        _again("twice", {p: asker(tokens[p[0]]) for p in reversed(rows)}),
        _again("in a batch", _together(asker, tokens)),
        _again("after a prefix", {p: _after_prefix(asker, tokens[p[0]]) for p in rows if p[1] > 1}),
    )
    return Shown(tokens, _places(alone), _chosen(alone), again, f"{client.url}: {asker.described}", spelling.unnamed)


def _found(client: Client, row: list[int], spelling: Spelling, model: str, top: int) -> Asker:
    """The first way in which the server answers a row with log-probabilities, or with tokens."""
    said: list[tuple[bool, str]] = []  # whether somebody answered, and what; exceptions would keep sockets open
    for way in WAYS:
        tops = [top, *(k for k in TOPS if k < top)] if way.keys(1) else [0]
        for text in [False, True] if spelling.readable(row) else [False]:
            for k in tops:
                asker = Asker(client, way, k, model, spelling, text)
                try:
                    asked = asker(row, retries=0)
                except SpecError as error:
                    said.append((not isinstance(error, Unreachable), str(error)))
                    if isinstance(error, Impossible) or "no answer within" in str(error):
                        raise
                    continue
                if asked.entries or (not way.keys(1) and spelling.words.ids):
                    return asker
                break  # it answers, and does not show this: fewer would not be shown either
    if said and not any(answered for answered, _ in said):
        raise SpecError(said[0][1])
    why = "".join(f"; {text}" for text in (f"last: {said[-1][1]}" if said else "", spelling.why) if text)
    raise SpecError(f"{client.url} shows neither log-probabilities nor tokens that can be told apart{why}")


def _only_model(client: Client) -> str:
    """The model's name, where the server lists one alone; "" where it does not say."""
    listed: Any = {}
    with suppress(SpecError):
        listed = client.get("/v1/models")
    found = listed.get("data") if isinstance(listed, dict) else None
    names = [m.get("id") for m in found if isinstance(m, dict)] if isinstance(found, list) else []
    return names[0] if len(names) == 1 and isinstance(names[0], str) else ""


def _together(asker: Asker, tokens: list[list[int]]) -> dict[tuple[int, int], Asked]:
    with ThreadPoolExecutor(min(_TOGETHER, max(2, len(tokens)))) as pool:
        rows = [*enumerate(tokens)] * (2 if len(tokens) == 1 else 1)  # a row alone is no batch
        done = list(pool.map(lambda pair: (pair[0], asker(pair[1])), rows))
    return {(b, len(tokens[b])): asked for b, asked in done}


def _after_prefix(asker: Asker, row: list[int]) -> Asked:
    """The row, behind a prompt that shares its first half and ends otherwise: in its first token."""
    half = max(1, len(row) // 2)
    asker([*row[:half], row[0]])
    return asker(row)


def _places(asked: Mapping[tuple[int, int], Asked]) -> dict[Place, Entry]:
    return {(b, t): e for (b, _), a in asked.items() for t, e in a.entries.items()}


def _chosen(asked: Mapping[tuple[int, int], Asked]) -> dict[Place, int]:
    return {(b, n - 1): a.chosen for (b, n), a in asked.items() if a.chosen is not None}


def _again(how: str, asked: Mapping[tuple[int, int], Asked]) -> Again:
    return Again(how, _places(asked), _chosen(asked))


def _counted(reply: Any, length: int) -> None:
    usage = reply.get("usage") if isinstance(reply, dict) else None
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    require(
        count is None or count == length,
        f"the server counts {count} tokens in a prompt of {length}: it adds some of its own, or has another tokenizer",
    )
