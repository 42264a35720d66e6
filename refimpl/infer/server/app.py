"""The ASGI application (starlette) and the server it runs in (uvicorn); extra `serve`."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from refimpl.autograd.errors import SpecError, require

from .answers import Answer, ChatAnswer
from .asgi import Door, Endpoint, Reply
from .asked import chat, completion
from .refusal import Refusal
from .service import Service

SHUTDOWN, CONNECTIONS = 5, 4
"""Seconds that clients have to hear the end after an interrupt; open connections for each choice that may be written, beyond which
uvicorn turns people away (503)."""


def check_libraries() -> None:
    """SpecError unless the extra is installed."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    require(not missing, f"serving needs {' and '.join(missing)}: pip install 'deepseek-v3-refimpl[serve]'")


def create_app(service: Service) -> Any:
    """/v1/completions, /v1/chat/completions, /v1/models, /health. SpecError without the extra."""
    check_libraries()
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.worker.close)

    pages, door = Pages(service), Door(service.bounds.concurrency)
    routes = [
        Route("/v1/completions", Endpoint(service, door, completion, Answer), methods=["POST"]),
        Route("/v1/chat/completions", Endpoint(service, door, chat, ChatAnswer), methods=["POST"]),
        Route("/v1/models", pages.models),
        Route("/v1/models/{name:path}", pages.model),
        Route("/health", pages.health),
    ]
    return Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={HTTPException: pages.unknown, Exception: pages.bug}
    )


def listen(host: str, port: int, seconds: float) -> socket.socket:
    """A socket that clients may connect to; port 0 takes a free one. Where the system can (Linux), a connection whose client
    reads nothing for so long is given up by it.
    """
    require(0 <= port < 1 << 16, f"port {port}: expected 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise SpecError(f"cannot listen on {host}:{port}: {error}") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))
    return sock


def create_server(service: Service) -> Any:
    """uvicorn around the app; `.run(sockets=[...])` until it is interrupted, which ends all answers."""
    check_libraries()
    import uvicorn

    server: Any = uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="warning",
            access_log=False,
            limit_concurrency=CONNECTIONS * service.bounds.concurrency,
            timeout_graceful_shutdown=SHUTDOWN,
        )
    )
    wait = server.shutdown

    async def shutdown(sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(service.worker.close)  # who waits is told so, instead of being waited for
        await wait(sockets)

    server.shutdown = shutdown
    return server


class Pages:
    """Everything that is not an answer."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def health(self, _: Any) -> Reply:
        """What runs and what is free, at some moment; 503 when no requests are taken."""
        blocks, alive = self.service.engine.pages.blocks, self.service.worker.alive
        counts = {"choices": len(self.service.engine), "blocks": blocks.count, "blocks_free": blocks.free}
        return Reply(200 if alive else 503, {"status": "ok" if alive else "closing", **counts})

    async def models(self, _: Any) -> Reply:
        """The one that is here."""
        return Reply(200, {"object": "list", "data": [self._about()]})

    async def model(self, request: Any) -> Reply:
        """The same by its name."""
        name = request.path_params["name"]
        missing = Refusal(404, f"the model {name!r} does not exist", code="model_not_found")
        return Reply(200, self._about()) if name == self.service.name else Reply(404, missing.body())

    async def unknown(self, _: Any, error: Any) -> Reply:
        """No such page, no such method."""
        return Reply(error.status_code, Refusal(error.status_code, str(error.detail)).body())

    async def bug(self, _: Any, error: Exception) -> Reply:
        """Ours, not the client's; the log has the rest."""
        return Reply(500, Refusal(500, f"this is a bug of refimpl: {type(error).__name__}").body())

    def _about(self) -> dict[str, Any]:
        """OpenAI's object of a model, with vLLM's `max_model_len`."""
        s = self.service
        window = min(s.config.max_position_embeddings, s.held)
        about = {"object": "model", "created": s.created, "owned_by": "refimpl", "max_model_len": window}
        return {"id": s.name, **about}
