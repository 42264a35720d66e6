"""Mapped pages that have been read count as memory of the process until they are given back."""

from __future__ import annotations

BUDGET = 1 << 26
"""Bytes that are read of mapped files before their pages are given back; what is read again then comes from the system's cache."""


class Pages:
    """Counts what is read of something, and lets it go (`let_go`, where it has that) when it is much."""

    def __init__(self, of: object) -> None:
        self._of, self._read = of, 0

    def read(self, n: int) -> None:
        """n bytes more have been read, and are no longer needed as they lie in the file."""
        self._read += n
        if self._read > BUDGET:
            self._read = 0
            getattr(self._of, "let_go", int)()
