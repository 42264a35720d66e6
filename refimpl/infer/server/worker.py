"""One thread owns the engine; everybody else hands it commands, which it obeys between steps, in order.

So the engine needs no locks, a step is never interrupted, and a request is cancelled at the latest one step after it was asked for.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeAlias

from refimpl.infer.engine import Engine
from refimpl.infer.row import Token
from refimpl.infer.settings import Request

from .refusal import Refusal

Event: TypeAlias = tuple[int, Token] | Refusal
"""A token of the i-th request of a ticket, or the end of them all."""
Deliver: TypeAlias = Callable[[Event], None]
"""Called in the worker's thread; must not block."""
CLOSING = "the server is closing"


class Worker:
    """Runs an engine while it has requests. `most`: requests it takes at a time; more are refused, none wait unseen."""

    def __init__(self, engine: Engine, *, most: int) -> None:
        self.engine, self.most = engine, most
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sinks: dict[int, tuple[object, int, Deliver]] = {}  # engine's number -> ticket, index, where tokens go
        self._open, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="refimpl-engine", daemon=True)

    def start(self) -> None:
        """Begin; once."""
        self._open = True
        self._thread.start()

    def close(self) -> None:
        """Give up what is running and wait for the thread's end."""
        with self._lock:
            self._open = False
            self._commands.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._open and self._thread.is_alive()

    def submit(
        self, ticket: object, requests: Sequence[Request], deliver: Deliver, *, prompt_logprobs: int | None = None
    ) -> Future[None]:
        """Requests that live and end together. The future: SpecError or Refusal if they are not taken, none of them then."""
        future: Future[None] = Future()

        def command() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    self._take(ticket, requests, deliver, prompt_logprobs)
                except Exception as error:
                    future.set_exception(error)
                else:
                    future.set_result(None)

        with self._lock:
            if not self._open:
                raise Refusal(503, CLOSING)
            self._commands.put(command)
        return future

    def cancel(self, ticket: object) -> None:
        """Give up what is left of a ticket, submitted before or never; nothing of it is delivered once that is obeyed."""
        self._commands.put(lambda: self._drop(ticket))

    def _take(self, ticket: object, requests: Sequence[Request], deliver: Deliver, prompt_logprobs: int | None) -> None:
        if not self._open:
            raise Refusal(503, CLOSING)
        if len(self.engine) + len(requests) > self.most:
            said = f"{len(self.engine)} choices are being written, {len(requests)} more would exceed {self.most}"
            raise Refusal(429, f"{said}; try again later", code="rate_limit_exceeded")
        for i, number in enumerate(self.engine.submit_all(requests, prompt_logprobs=prompt_logprobs)):
            self._sinks[number] = (ticket, i, deliver)

    def _drop(self, ticket: object) -> None:
        for number in [n for n, (owner, *_) in self._sinks.items() if owner is ticket]:
            del self._sinks[number]
            self.engine.cancel(number)

    def _run(self) -> None:
        try:
            self._obey()
        finally:  # by a bug too: nobody is left waiting
            with self._lock:
                self._open = False
            self._end(Refusal(503, CLOSING))
            while not self._commands.empty():
                if command := self._commands.get():
                    command()

    def _obey(self) -> None:
        while True:
            try:
                command = self._commands.get(block=not len(self.engine))
            except queue.Empty:
                self._step()
                continue
            if command is None:
                return
            command()

    def _step(self) -> None:
        try:
            tokens = self.engine.step(more=False)
        except Exception as error:  # one step runs for all, so it fails for all; the engine is empty then, and whole
            self._end(Refusal(500, f"the step failed: {type(error).__name__}: {error}"))
            return
        for token in tokens:
            _, i, deliver = self._sinks.pop(token.row) if token.finish else self._sinks[token.row]
            deliver((i, token))

    def _end(self, why: Refusal) -> None:
        """All requests are over."""
        for number, (_, _, deliver) in self._sinks.items():
            self.engine.cancel(number)
            deliver(why)
        self._sinks.clear()
