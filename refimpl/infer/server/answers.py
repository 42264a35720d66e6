"""OpenAI's objects: completions and chat, whole or in chunks; and vLLM's `prompt_logprobs`, `token_ids`, `prompt_token_ids`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from refimpl.infer.row import Scored, Token

from .asked import Asked
from .piece import Choice, Entry, Names, Piece
from .service import Service

Object = dict[str, Any]


class Answer:
    """One request's answer on its way; /v1/completions, and what chat has in common with it."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, asked: Asked) -> None:
        self.asked, self.names = asked, Names(service.tokenizer, asked.as_ids)
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        self._writers = [Choice(asked, i) for i in range(len(asked.choices))]
        self._pieces = [Piece() for _ in asked.choices]

    def add(self, choice: int, token: Token) -> Piece:
        """A token came; what it adds."""
        piece = self._writers[choice].piece(token)
        self._pieces[choice].join(piece)
        return piece

    def whole(self) -> Object:
        """The answer when all has come."""
        choices = [{"index": i, **self.choice(p), **self._vllm(i, p)} for i, p in enumerate(self._pieces)]
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": self._usage()}

    def opening(self) -> Iterator[Object]:
        """Chunks before any token."""
        yield from ()

    def chunk(self, choice: int, piece: Piece) -> Object:
        """A piece of the stream."""
        ids = {"token_ids": piece.ids} if self.asked.token_ids else {}
        return self._chunk([{"index": choice, **self.delta(piece), **ids}])

    def closing(self) -> Iterator[Object]:
        """Chunks after all tokens: usage, if asked for."""
        if self.asked.usage:
            yield {**self._chunk([]), "usage": self._usage()}

    def choice(self, piece: Piece) -> Object:
        """A whole choice."""
        logprobs = None if self.asked.logprobs is None else self._logprobs(piece.entries)
        return {"text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def delta(self, piece: Piece) -> Object:
        """The same of a part."""
        return self.choice(piece)

    def _chunk(self, choices: Sequence[Object]) -> Object:
        usage = {"usage": None} if self.asked.usage else {}
        return {**self._head, "object": self.chunk_kind, "choices": list(choices), **usage}

    def _logprobs(self, entries: Sequence[Entry]) -> Object:
        top = [None if e.logprob is None else self.names.likely([*e.top, (e.id, e.logprob)]) for e in entries]
        return {
            "tokens": [self.names(e.id) for e in entries],
            "token_logprobs": [e.logprob for e in entries],
            "top_logprobs": top if self.asked.logprobs else None,
            "text_offset": [e.offset for e in entries],
        }

    def _vllm(self, choice: int, piece: Piece) -> Object:
        found: Object = {}
        if self.asked.token_ids:
            found |= {"token_ids": piece.ids, "prompt_token_ids": list(self.asked.prompt(choice).ids)}
        if self.asked.prompt_logprobs is not None:
            found["prompt_logprobs"] = [None, *(self._prompt_logprobs(s) for s in piece.prompt)]
        return found

    def _prompt_logprobs(self, s: Scored) -> Object:
        """{id: {logprob, rank, decoded_token}} of the likeliest and of the token that was there."""
        likely = [(t, p, i) for i, (t, p) in enumerate(s.top[: self.asked.prompt_logprobs], 1)]
        return {
            str(t): {"logprob": p, "rank": rank, "decoded_token": self.names(t)}
            for t, p, rank in [(s.id, s.logprob, s.rank), *likely]
        }

    def _usage(self) -> Object:
        prompt, new = sum(len(p.ids) for p in self.asked.prompts), sum(len(p.ids) for p in self._pieces)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class ChatAnswer(Answer):
    """/v1/chat/completions."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self) -> Object:
        """The answer; vLLM has the prompt's log-probabilities beside the choices, since there is one prompt."""
        found = super().whole()
        prompts = [c.pop("prompt_logprobs", None) for c in found["choices"]]
        return found if prompts[0] is None else {**found, "prompt_logprobs": prompts[0]}

    def opening(self) -> Iterator[Object]:
        """Who speaks."""
        for i in range(len(self.asked.choices)):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}])

    def choice(self, piece: Piece) -> Object:
        """A whole choice."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"message": message, "logprobs": self._content(piece), "finish_reason": piece.finish}

    def delta(self, piece: Piece) -> Object:
        """The same of a part."""
        return {"delta": {"content": piece.text}, "logprobs": self._content(piece), "finish_reason": piece.finish}

    def _content(self, piece: Piece) -> Object | None:
        if self.asked.logprobs is None:
            return None
        entries = [
            {**self._named(e.id, e.logprob), "top_logprobs": [self._named(*t) for t in e.top]} for e in piece.entries
        ]
        return {"content": entries, "refusal": None}

    def _named(self, token: int, logprob: float | None) -> Object:
        return {"token": self.names(token), "logprob": logprob, "bytes": self.names.bytes(token)}
