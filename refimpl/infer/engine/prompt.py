"""log P(token i | tokens before) of a prompt, gathered while its pieces are run."""

from __future__ import annotations

from collections.abc import Sequence

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.infer.row import Scored


class PromptScores:
    """Of every token of a prompt but the first, whose log-probability no model knows; each with the n most likely."""

    def __init__(self, tokens: Sequence[int], n: int, vocabulary: int) -> None:
        whole = isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= vocabulary
        require(whole, f"prompt_logprobs is {n!r}; expected a whole number from 0 to the vocabulary's {vocabulary}")
        self._tokens, self._n = list(tokens), n
        self._found: dict[int, Scored] = {}

    def read(self, start: int, logits: Array) -> None:
        """A piece was run, perhaps once more.  logits (S, V) behind tokens start .. start + S."""
        for i, z in enumerate(logits[: len(self._tokens) - 1 - start], start + 1):
            self._found[i] = Scored.of(self._tokens[i], z, self._n)

    def all(self) -> tuple[Scored, ...]:
        """All of them, in order, when the whole prompt was read."""
        return tuple(self._found[i] for i in range(1, len(self._tokens)))
