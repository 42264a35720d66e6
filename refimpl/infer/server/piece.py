"""What tokens add to an answer: pieces, which a stream sends as they come and a whole answer joins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from refimpl.infer.row import Likely, Scored, Token
from refimpl.infer.text import UNFINISHED, TextStream
from refimpl.infer.tokenizer import Tokenizer

from .asked import Asked

FINISH = {"eos": "stop", "stop": "stop", "length": "length", None: None}
"""OpenAI does not tell an end token from a stop text."""


@dataclass(frozen=True)
class Entry:
    """A token with its log-probability, None for a prompt's first, the likeliest beside it, where in the text it begins."""

    id: int
    logprob: float | None
    top: Likely
    offset: int


@dataclass
class Piece:
    """Text, tokens, their entries if log-probabilities were asked for, why it ended; `prompt`: with the first token, what the
    prompt's own were worth.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    finish: str | None = None
    prompt: tuple[Scored, ...] = ()

    def join(self, later: Piece) -> None:
        """Add what came afterwards."""
        self.text += later.text
        self.ids += later.ids
        self.entries += later.entries
        self.finish, self.prompt = later.finish, self.prompt or later.prompt


class Choice:
    """Tokens of one choice to pieces. Offsets count the decoded text, special tokens left out."""

    def __init__(self, asked: Asked, number: int) -> None:
        self._asked, self.prompt, request = asked, asked.prompt(number), asked.choices[number]
        self._text = TextStream(request.decode) if request.decode else None
        self._at, self._begun, self._decode = 0, False, request.decode

    def piece(self, token: Token) -> Piece:
        """What the token adds, the prompt too if it is the first and the prompt is to be shown."""
        made = Piece(self._echo(), prompt=token.prompt, finish=FINISH[token.finish])
        if self._asked.echo and self._asked.logprobs is not None and not self._begun:
            made.entries = self._echoed(token.prompt)
        self._begun = True
        if self._asked.silent:
            made.finish = "length"
            return made
        made.text, made.ids = made.text + token.text, [token.id]
        if self._asked.logprobs is not None:
            made.entries.append(self._entry(token.id, token.logprob, token.top))
        return made

    def _echo(self) -> str:
        """The prompt before the first token, if it is to be shown."""
        if self._begun or not self._asked.echo:
            return ""
        if self.prompt.text is not None:
            return self.prompt.text
        return self._decode(self.prompt.ids) if self._decode else ""

    def _echoed(self, scores: Sequence[Scored]) -> list[Entry]:
        first = self._entry(self.prompt.ids[0], None, ())
        return [first, *(self._entry(s.id, s.logprob, s.top) for s in scores)]

    def _entry(self, token: int, logprob: float | None, top: Likely) -> Entry:
        at = self._at
        if self._text:
            at += self._text.waiting()
            self._at += len(self._text.push(token))
        return Entry(token, logprob, top[: self._asked.logprobs or 0], at)


@dataclass(frozen=True)
class Names:
    """How tokens are called in answers: by their text, or `token_id:5` (vLLM's way) if that was asked for or there is no text."""

    tokenizer: Tokenizer | None
    as_ids: bool

    def __call__(self, token: int) -> str:
        """The name."""
        return f"token_id:{token}" if self.as_ids or self.tokenizer is None else self.tokenizer.piece(token)

    def bytes(self, token: int) -> list[int] | None:
        """The text in UTF-8; None for a part of a character, and without a tokenizer."""
        text = self.tokenizer.piece(token) if self.tokenizer else UNFINISHED
        return None if UNFINISHED in text else list(text.encode())

    def likely(self, top: Iterable[tuple[int, float]]) -> dict[str, float]:
        """By name; of two tokens with one name the likelier counts."""
        found: dict[str, float] = {}
        for token, logprob in top:
            found.setdefault(self(token), logprob)
        return found
