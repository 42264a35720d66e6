"""What a request asks for: prompt, sampler, limits; checked when made. And the distribution its sampler draws from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from refimpl.autograd.errors import require, where
from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config

from .distribution import min_p, repetition, softmax, top_k, top_p
from .draws import Draw, seeded

Decode: TypeAlias = Callable[[Sequence[int]], str]
"""Token ids -> their text."""


PENALTIES = (0.01, 100)
"""Repetition penalties far outside make logits infinite, and of these no distribution."""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _id(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


@dataclass(frozen=True)
class Settings:
    """How to sample and when to stop. SpecError for what no sampler can do.

    `temperature` 0 is greedy. `top_k` None, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 do nothing. `max_tokens` None goes on
    to the end of the window. `eos`: ids after which a row ends. `stop`: texts before which it ends (they need a `Decode`).
    `logprobs`: how many of the most likely tokens to report beside each one.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    eos: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int = 0

    def __post_init__(self) -> None:
        numbers = ("temperature", "top_p", "min_p", "repetition_penalty")
        for name in numbers:
            value = getattr(self, name)
            require(_real(value), f"{name} is {value!r}; expected a finite number")
        require(self.temperature >= 0, f"temperature is {self.temperature}; 0 is greedy, less has no meaning")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}; expected above 0, at most 1 (1: all tokens)")
        require(0 <= self.min_p <= 1, f"min_p is {self.min_p}; expected 0 (all tokens) to 1")
        least, most = PENALTIES
        said = f"repetition_penalty is {self.repetition_penalty}; expected {least} to {most}"
        require(least <= self.repetition_penalty <= most, said)
        for name, least in (("top_k", 1), ("max_tokens", 1), ("seed", 0), ("logprobs", 0)):
            value = getattr(self, name)
            optional = value is None and name in ("top_k", "max_tokens")
            require(
                optional or (_whole(value) and value >= least),
                f"{name} is {value!r}; expected a whole number from {least}",
            )
        texts = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        require(texts, f"stop is {self.stop!r}; expected a tuple of texts, none empty")
        require(
            isinstance(self.eos, tuple) and all(map(_whole, self.eos)), f"eos is {self.eos!r}; expected a tuple of ids"
        )

    def distribution(self, logits: Array, context: Collection[int]) -> Array:
        """What the next token is drawn from: penalty, temperature, top-k, top-p, min-p, in this order (transformers').  logits
        (V,), context: the tokens so far -> (V,).
        """
        p = softmax(repetition(logits, set(context), self.repetition_penalty), self.temperature)
        if self.top_k is not None:
            p = top_k(p, self.top_k)
        if self.top_p < 1:
            p = top_p(p, self.top_p)
        return min_p(p, self.min_p) if self.min_p > 0 else p


@dataclass(frozen=True)
class Request:
    """A prompt of token ids, its settings, where its draws come from (default: `settings.seed`), what makes text of tokens."""

    prompt: Sequence[int]
    settings: Settings = Settings()
    draw: Draw | None = None
    decode: Decode | None = None

    def draws(self) -> Draw:
        """The draws given, or new ones from the seed."""
        return self.draw or seeded(self.settings.seed)

    def check(self, c: Config) -> int:
        """How many tokens may come. SpecError for what the model of this config cannot take."""
        s, window = self.settings, c.max_position_embeddings
        with where("in the prompt"):
            _check_prompt(list(self.prompt), c)
        room = window - len(self.prompt)
        said = f"after {len(self.prompt)} tokens the window (max_position_embeddings={window}) has room for {room}"
        require(s.max_tokens is None or s.max_tokens <= room, f"max_tokens is {s.max_tokens}; {said}")
        for name, most in (("top_k", s.top_k), ("logprobs", s.logprobs)):
            require((most or 0) <= c.vocab_size, f"{name} is {most}; the vocabulary has {c.vocab_size} tokens")
        outside = [t for t in s.eos if not 0 <= t < c.vocab_size]
        require(not outside, f"eos {outside} is outside the vocabulary of {c.vocab_size} tokens")
        require(not s.stop or self.decode, "stop texts need a tokenizer to find them with; give decode=")
        return room if s.max_tokens is None else s.max_tokens


def _check_prompt(ids: list[Any], c: Config) -> None:
    require(ids, "no tokens; expected at least one, such as the begin-of-sentence token")
    for i, t in enumerate(ids):
        known = _id(t) and 0 <= t < c.vocab_size
        require(known, f"token id {t!r} at {i}: outside 0..{c.vocab_size - 1} (vocab_size={c.vocab_size})")
    window = c.max_position_embeddings
    said = f"{len(ids)} tokens; the window (max_position_embeddings={window}) must have room for one more"
    require(len(ids) < window, said)
