"""Tokens to text while they come: whole characters only, and never a part of a stop text."""

from __future__ import annotations

from .settings import Decode

UNFINISHED = "\ufffd"
"""What a decoder gives for the first bytes of a character whose last ones have not come yet."""


class TextStream:
    """Feed tokens, get the text that is certain by now; `stopped` once a stop text has come, which is not part of the text."""

    def __init__(self, decode: Decode, stop: tuple[str, ...] = ()) -> None:
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []  # those decoded together: the last ones given out, then the pending ones
        self._given = 0  # of these, how many were given out
        self._held = ""  # text that may be the beginning of a stop text
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes certain, possibly none."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(UNFINISHED):
            return ""
        return self._release(text)

    def waiting(self) -> int:
        """How many whole characters are not given out yet because the token that ended them also began another."""
        return len(self._decode(self._ids).rstrip(UNFINISHED)) - len(self._decode(self._ids[: self._given]))

    def finish(self) -> str:
        """The rest: what was held back, and bytes that made no character."""
        text = self._release(self._decode(self._ids))
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _release(self, text: str) -> str:
        # Decoded together with the tokens before, because a tokenizer may treat the first word of a text in another way.
        new = text[len(self._decode(self._ids[: self._given])) :]
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        self._held += new
        at = min((i for s in self._stop if (i := self._held.find(s)) >= 0), default=None)
        if at is not None:
            self.stopped = True
            return self._held[:at]
        keep = max((n for s in self._stop for n in range(len(s)) if self._held.endswith(s[:n])), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text
