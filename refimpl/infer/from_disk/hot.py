"""A cache of what is used most often, by a budget in bytes."""

from __future__ import annotations

from collections import Counter

from refimpl.checkpoint import Rows

Key = tuple[str, int]
"""A chunk: the tensor's name, and its first row."""


class Hot:
    """Key -> rows. What is full takes a newcomer only in place of colder ones: each used less often than it, the coldest first.

    Layers are gone through in a circle. The usual rule, out with what was used longest ago, would drop each chunk shortly before
    its turn and never hit; here what every token needs settles first, then the experts that are chosen most.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.size = budget, 0
        self.held: dict[Key, Rows] = {}
        self.uses: Counter[Key] = Counter()

    def get(self, key: Key) -> Rows | None:
        """The rows, if they are held; either way this was a use."""
        self.uses[key] += 1
        return self.held.get(key)

    def offer(self, key: Key, rows: Rows) -> None:
        """Hold these rows if there is room, or if there is among colder ones. Of equally cold ones the one held longest goes."""
        need, out = self.size + rows.nbytes - self.budget, []
        if need > 0:
            for other in sorted(self.held, key=self.uses.__getitem__):
                if need <= 0 or self.uses[other] >= self.uses[key]:
                    break
                out.append(other)
                need -= self.held[other].nbytes
        if need > 0:
            return
        for other in out:
            self.size -= self.held.pop(other).nbytes
        self.held[key] = rows
        self.size += rows.nbytes
