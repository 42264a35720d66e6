"""One answer over ASGI: a place among those being answered, the body within its bounds, the fields, the tokens as they come.

It ends with the answer, when the client goes, or when it reads nothing for too long; however it ends, `feed` cancels what is left.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from refimpl.autograd.errors import SpecError

from .answers import Answer
from .asked import Asked
from .feed import feed, watched
from .refusal import Refusal
from .service import Bounds, Service

Scope: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Any]
Send: TypeAlias = Callable[[Any], Any]

WORTH_HEARING = 8
"""A body this many times too large is read to its end before it is refused, since who is still sending hears nothing."""


class Gone(Exception):
    """The client is no longer there, or behaves as if it were not."""


class Reply:
    """A status and an object as JSON, in ASCII, so that whatever a client sent can be quoted."""

    def __init__(self, status: int, content: Any) -> None:
        self.status, self.body = status, json.dumps(content).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(self.body)).encode())]
        head += [(b"retry-after", b"1")] if self.status == 429 else []
        await send({"type": "http.response.start", "status": self.status, "headers": head})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else self.body})


class Door:
    """Lets so many HTTP requests in as may be answered at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.inside = most, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, or Refusal."""
        if self.inside >= self.most:
            raise Refusal(
                429, f"{self.inside} requests are being answered; try again later", code="rate_limit_exceeded"
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


class Endpoint:
    """A way to read a body and a way to write its answer."""

    def __init__(
        self, service: Service, door: Door, read: Callable[[Service, bytes], Asked], answer: type[Answer]
    ) -> None:
        self.service, self.door, self.read, self.answer = service, door, read, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A POST."""
        patient = _patient(send, self.service.bounds.seconds)
        try:
            with self.door():
                body = await _body(scope, receive, self.service.bounds)
                asked = await asyncio.to_thread(self.read, self.service, body)
                await watched(self._answer(asked, patient, scope), receive)
        except Refusal as refusal:
            await Reply(refusal.status, refusal.body())(scope, receive, send)
        except SpecError as error:
            await Reply(400, Refusal(400, str(error)).body())(scope, receive, send)
        except Gone:
            pass

    async def _answer(self, asked: Asked, send: Send, scope: Scope) -> None:
        """Refused before anything is sent, or answered."""
        answer, worker = self.answer(self.service, asked), self.service.worker
        async with feed(worker, asked.choices, prompt_logprobs=asked.scored) as tokens:
            if asked.stream:
                await self._stream(answer, tokens, send)
                return
            async for choice, token in tokens:
                answer.add(choice, token)
        await Reply(200, answer.whole())(scope, lambda: None, send)

    async def _stream(self, answer: Answer, tokens: Any, send: Send) -> None:
        """Server-sent events: an object each, then [DONE]; or an error, and no [DONE]."""
        head = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        try:
            for chunk in answer.opening():
                await send(_event(chunk))
            async for choice, token in tokens:
                await send(_event(answer.chunk(choice, answer.add(choice, token))))
            for chunk in answer.closing():
                await send(_event(chunk))
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        except Refusal as refusal:
            await send(_event(refusal.body(), last=True))


def _event(content: Any, *, last: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {json.dumps(content)}\n\n".encode(), "more_body": not last}


def _patient(send: Send, seconds: float) -> Send:
    """`send`, until the client has read nothing for so long."""

    async def patient(message: Any) -> None:
        try:
            async with asyncio.timeout(seconds):
                await send(message)
        except TimeoutError:
            raise Gone from None

    return patient


async def _body(scope: Scope, receive: Receive, bounds: Bounds) -> bytes:
    """The whole body. Refusal for one of another type, too large, or that stops coming."""
    kinds = [v for k, v in scope["headers"] if k == b"content-type"]
    if not kinds or kinds[0].split(b";")[0].strip().lower() != b"application/json":
        raise Refusal(
            415, "the body must be of type application/json"
        )  # which no page of another site can send unasked
    body, size, more = bytearray(), 0, True
    while more:
        try:
            async with asyncio.timeout(bounds.seconds):
                message = await receive()
        except TimeoutError:
            raise Refusal(408, f"nothing came for {bounds.seconds:g} seconds") from None
        if message["type"] == "http.disconnect":
            raise Gone
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size <= bounds.body:
            body += part
        more = more and size <= WORTH_HEARING * bounds.body
    if size > bounds.body:
        raise Refusal(413, f"the body is longer than {bounds.body} bytes")
    return bytes(body)
