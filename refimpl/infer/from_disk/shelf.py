"""Chunks of weights between disk and use: those that are hot stay, those that come next are read ahead in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import TracebackType

from refimpl.checkpoint import Rows

from .hot import Hot, Key


class Shelf:
    """`get(key)`: a chunk's rows from the cache, from those read ahead, or read now. `with` begins and ends the thread.

    The thread reads what was announced, in that order, while less than `ahead` bytes wait to be used. A read that fails there is
    made again by whoever needs the rows: the error then comes where it belongs.
    """

    def __init__(self, read: Callable[[Key], Rows], hot: Hot, *, ahead: int) -> None:
        self.read, self.hot, self.ahead = read, hot, ahead
        self.coming: list[Key] = []
        self._ready: dict[Key, Rows] = {}
        self._reading: Key | None = None
        self._pass = 0
        self._closed = True
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def get(self, key: Key) -> Rows:
        """The chunk; what the thread is reading just now is waited for."""
        with self._changed:
            if key in self.coming:
                self.coming.remove(key)
            found = self.hot.get(key)
            if found is not None:
                return found
            self._changed.wait_for(lambda: self._reading != key)
            found = self._ready.pop(key, None)
            self._changed.notify_all()
        if found is None:
            found = self.read(key)
        with self._changed:
            self.hot.offer(key, found)
        return found

    def begin(self, keys: Iterable[Key]) -> None:
        """A pass begins: these chunks come, in this order, and nothing else that was announced before."""
        with self._changed:
            self.coming, self._ready = list(keys), {}
            self._pass += 1
            self._changed.notify_all()

    def insert(self, keys: Iterable[Key], behind: Callable[[Key], bool]) -> None:
        """These come, too, behind the leading ones that fulfil `behind`."""
        with self._changed:
            at = next((i for i, key in enumerate(self.coming) if not behind(key)), len(self.coming))
            self.coming[at:at] = keys
            self._changed.notify_all()

    def __enter__(self) -> Shelf:
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed, self.coming, self._ready = True, [], {}
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()  # at most one chunk's reading

    def _work(self) -> None:
        while (due := self._next()) is not None:
            key, began = due
            try:
                rows = self.read(key)
            except Exception:
                rows = None
            with self._changed:
                self._reading = None
                if rows is not None and began == self._pass and not self._closed:
                    self._ready[key] = rows
                self._changed.notify_all()

    def _next(self) -> tuple[Key, int] | None:
        """The next chunk to read, when there is room for it; None when it is over."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or (self.coming and self._room()))
                if self._closed:
                    return None
                key = self.coming.pop(0)
                if key not in self.hot.held and key not in self._ready:
                    self._reading = key
                    return key, self._pass

    def _room(self) -> bool:
        return sum(rows.nbytes for rows in self._ready.values()) < self.ahead
