"""The worker's tokens in asyncio: a feed is open while its client is there, and nothing of it is left afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from refimpl.infer.row import Token
from refimpl.infer.settings import Request

from .refusal import Refusal
from .worker import Event, Worker


@asynccontextmanager
async def feed(
    worker: Worker, requests: Sequence[Request], *, prompt_logprobs: int | None = None
) -> AsyncIterator[AsyncIterator[tuple[int, Token]]]:
    """(index, token) as they come, to the end of all requests; what is not over when the context is left is cancelled. SpecError or
    Refusal on entering if they are not taken, Refusal later if the engine fails.
    """
    loop, ticket = asyncio.get_running_loop(), object()
    events: asyncio.Queue[Event] = asyncio.Queue()  # at most max_tokens for each request

    def deliver(event: Event) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody listens
            loop.call_soon_threadsafe(events.put_nowait, event)

    try:
        await asyncio.wrap_future(worker.submit(ticket, requests, deliver, prompt_logprobs=prompt_logprobs))
        yield _tokens(events, len(requests))
    finally:
        worker.cancel(ticket)


async def _tokens(events: asyncio.Queue[Event], running: int) -> AsyncIterator[tuple[int, Token]]:
    while running:
        event = await events.get()
        if isinstance(event, Refusal):
            raise event
        running -= event[1].finish is not None
        yield event


async def watched(work: Coroutine[Any, Any, None], receive: Callable[[], Any]) -> None:
    """Run `work` until it is done or the client is gone (ASGI's http.disconnect); then it is cancelled, and has ended on return."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Callable[[], Any]) -> None:
    message: MutableMapping[str, Any] = {}
    while message.get("type") != "http.disconnect":
        message = await receive()
