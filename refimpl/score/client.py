"""A client for one server: JSON there and back, in bounded time, with bounded retries. Nothing but the standard library."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from refimpl.autograd.errors import SpecError, require

LARGEST = 1 << 28
"""Bytes of a reply."""
_SAID = 300
"""Characters of a server's complaint that are repeated."""


class Unreachable(SpecError):
    """Nobody answered, or not to the end."""


class Refused(SpecError):
    """The server answered, and not with what was asked for."""


@dataclass(frozen=True)
class Client:
    """`post(path, body)` on the server at `url`. A request takes at most `timeout` seconds; after a broken connection or the
    statuses 429 and 5xx it is made again, `retries` times, each after twice the pause.
    """

    url: str
    timeout: float = 60.0
    retries: int = 2
    headers: Mapping[str, str] = field(default_factory=dict)
    pause: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        require(_is_http(self.url), f"{self.url!r}; expected http://HOST:PORT")
        require(self.timeout > 0 and self.retries >= 0, "the timeout must be positive, retries not negative")

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return self._asked("GET", path, None, self.retries)

    def post(self, path: str, body: Mapping[str, Any], *, retries: int | None = None) -> Any:
        """The JSON that the server answers. Refused for another status than 200, or no JSON; Unreachable where it does not
        answer.
        """
        return self._asked("POST", path, json.dumps(body).encode(), self.retries if retries is None else retries)

    def _asked(self, method: str, path: str, body: bytes | None, retries: int) -> Any:
        for left in range(retries, -1, -1):
            try:
                status, said = self._once(method, path, body)
            except TimeoutError:
                raise Unreachable(
                    f"{self.url}{path}: no answer within {self.timeout:g} s; --timeout waits longer"
                ) from None
            except (OSError, HTTPException) as error:
                if not left:
                    raise Unreachable(f"{self.url}{path}: {error or type(error).__name__}") from None
            else:
                if status == 200:
                    return self._read(path, said)
                if not left or not (status == 429 or status >= 500):
                    text = said.decode(errors="replace")[:_SAID]
                    raise Refused(f"{self.url}{path}: status {status}: {' '.join(text.split())}")
            self.pause(0.5 * 2.0 ** (retries - left))
        raise AssertionError("the last try returns or raises")

    def _read(self, path: str, said: bytes) -> Any:
        try:
            return json.loads(said)
        except (ValueError, RecursionError) as error:
            raise Refused(f"{self.url}{path}: the answer is no JSON: {error}") from None

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Status and body; TimeoutError when the time is over, however much has come."""
        parts, end = urlsplit(self.url), time.monotonic() + self.timeout
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        assert parts.hostname
        connection = kind(parts.hostname, parts.port, timeout=self.timeout)
        try:
            own = {"Content-Type": "application/json", "Accept": "application/json"}
            connection.request(method, parts.path.rstrip("/") + path, body, own | dict(self.headers))
            wire, reply = connection.sock, connection.getresponse()
            return reply.status, self._body(reply, wire, end)
        finally:
            connection.close()

    def _body(self, reply: Any, wire: socket.socket | None, end: float) -> bytes:
        found = bytearray()
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if wire is not None and wire.fileno() >= 0:
                wire.settimeout(left)
            part = reply.read1(1 << 16)
            if not part:
                return bytes(found)
            found += part
            require(len(found) <= LARGEST, f"{self.url}: an answer of more than {LARGEST >> 20} MiB")


def _is_http(url: str) -> bool:
    """Whether a URL has http's scheme, a host, and a port that is one if any."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        return False
