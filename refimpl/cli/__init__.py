"""The command line, one file a command; `main` runs it."""

from .dispatch import main

__all__ = ["main"]
