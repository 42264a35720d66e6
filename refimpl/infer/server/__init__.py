"""The server: OpenAI's completions and chat over the batching engine, an oracle for other engines' clients and test suites."""

from .app import check_libraries, create_app, create_server, listen
from .refusal import Refusal
from .service import Bounds, Service
from .worker import Worker

__all__ = ["Bounds", "Refusal", "Service", "Worker", "check_libraries", "create_app", "create_server", "listen"]
