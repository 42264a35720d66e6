"""Two-level errors: what is wrong with the values, then where it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SpecError(ValueError):
    """The input violates the specification (our own bugs are `assert`s instead)."""


@contextmanager
def where(context: str) -> Iterator[None]:
    """Add a line saying where: `shape (2,), expected (3,)` / `  while loading model.norm.weight`."""
    try:
        yield
    except SpecError as error:
        raise type(error)(f"{error}\n  {context}") from error.__cause__


def require(condition: object, message: str) -> None:
    """Raise SpecError(message) unless the condition holds."""
    if not condition:
        raise SpecError(message)
