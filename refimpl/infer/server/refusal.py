"""What a client is told when it does not get what it asked for, in OpenAI's shape of errors."""

from __future__ import annotations

from typing import Any

KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
"""`type` by status; the others are the request's fault."""


class Refusal(Exception):
    """An HTTP status and the reason; `param` is the field that is to blame, `code` a name for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(condition: object, message: str, param: str | None = None) -> None:
    """Refuse with 400 unless the condition holds."""
    if not condition:
        raise Refusal(400, message, param=param)
