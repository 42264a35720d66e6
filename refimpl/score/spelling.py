"""Tokens as text, for servers that take no ids: only where the text says exactly these tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refimpl.autograd.errors import SpecError
from refimpl.infer.tokenizer import Tokenizer

from .replies import Words


@dataclass(frozen=True)
class Spelling:
    """A tokenizer, or none and why; what tokens are called in replies, and which have no name of their own: single bytes."""

    tokenizer: Tokenizer | None
    words: Words
    why: str = ""
    unnamed: frozenset[int] = frozenset()

    @classmethod
    def of(cls, folder: Path, vocabulary: int) -> Spelling:
        """By the tokenizer.json beside a case; where there is none, or no library to read it, ids alone."""
        try:
            tokenizer = Tokenizer.open(folder)
        except SpecError as error:
            return cls(None, Words(), f"prompts as text: {error}")
        texts = [tokenizer.decode([i]) for i in range(vocabulary)]
        count = Counter(texts)
        named = {t: i for i, t in enumerate(texts) if count[t] == 1 and t}
        return cls(tokenizer, Words(named), unnamed=frozenset(range(vocabulary)) - frozenset(named.values()))

    def readable(self, tokens: Sequence[int]) -> bool:
        """Whether a text gives exactly these tokens, and so does each of its beginnings."""
        t = self.tokenizer
        return t is not None and all(
            t.encode(t.decode(tokens[:n])) == list(tokens[:n]) for n in range(1, len(tokens) + 1)
        )

    def text(self, tokens: Sequence[int]) -> str:
        """The text."""
        assert self.tokenizer is not None
        return self.tokenizer.decode(tokens)
