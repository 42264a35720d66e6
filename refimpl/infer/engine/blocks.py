"""Which block of the cache belongs to whom: tables, reference counts, prefixes found again, copies on write, eviction.

Bookkeeping alone, no arrays. A block holds `size` tokens. Full blocks are found again by what they hold: the key is (the block
before, the block's own tokens), compared exactly, so nothing is ever found by a colliding hash. A block that nobody uses keeps
its content until its place is needed; the one unused longest goes first. Tables are given back from their end, so a block is
always evicted before the one it follows on, and a key never names a block with another content.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import takewhile
from typing import TypeAlias

from refimpl.autograd.errors import require

Key: TypeAlias = tuple[int, tuple[int, ...]]
"""The block before (ROOT if none), the tokens."""
ROOT = -1
Copy: TypeAlias = tuple[int, int]
"""(from, to): contents to be copied before anything is written."""


class Blocks:
    """`count` blocks of `size` tokens each."""

    def __init__(self, count: int, size: int) -> None:
        require(count >= 1 and size >= 1, f"{count} blocks of {size} tokens; expected at least one of one")
        self.count, self.size = count, size
        self.refs = [0] * count  # tables that hold the block
        self.keys: dict[int, Key] = {}  # block -> what it is found by; only full ones that were computed
        self._found: dict[Key, int] = {}
        self._after: dict[int, list[int]] = {}  # block -> those in `keys` that follow on it
        self._clean = deque(range(count))
        self._idle: OrderedDict[int, None] = OrderedDict()  # in no table, but with a key; unused longest first

    @property
    def free(self) -> int:
        """Blocks in no table."""
        return len(self._clean) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """ceil(tokens / size)."""
        return -(-tokens // self.size)

    def match(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The longest beginning of `tokens` that is here -> its blocks, how many tokens. The last block may agree in part. The last
        token never counts: it has to be run, for its logits.
        """
        table, n, most = list[int](), 0, len(tokens) - 1
        while n + self.size <= most:
            block = self._found.get((table[-1] if table else ROOT, tuple(tokens[n : n + self.size])))
            if block is None:
                break
            table.append(block)
            n += self.size
        rest = tokens[n : min(most, n + self.size)]
        part, block = max(
            ((_common(self.keys[b][1], rest), -b) for b in self._after.get(table[-1] if table else ROOT, ())),
            default=(0, 0),
        )
        return ([*table, -block], n + part) if part else (table, n)

    def idle(self, table: Sequence[int]) -> int:
        """How many of these are in no table."""
        return sum(not self.refs[b] for b in table)

    def share(self, table: Sequence[int]) -> None:
        """One more table holds these."""
        for b in table:
            if not self.refs[b]:
                del self._idle[b]
            self.refs[b] += 1

    def missing(self, table: Sequence[int], start: int, stop: int) -> int:
        """Free blocks that `reserve` would take."""
        at = start // self.size
        copies = at < len(table) and start < stop and not self._own(table[at])
        return max(0, self.needed(stop) - len(table)) + copies

    def reserve(self, table: list[int], start: int, stop: int) -> list[Copy]:
        """Make places start..stop of a table writable: a block that others see or may find is left to them and copied, new ones are
        added at the end.
        """
        assert self.missing(table, start, stop) <= self.free, "the caller makes room first"
        copies, at = [], start // self.size
        if at < len(table) and start < stop and not self._own(table[at]):
            old, table[at] = table[at], self._take()
            copies.append((old, table[at]))
            self.release([old])
        while len(table) < self.needed(stop):
            table.append(self._take())
        return copies

    def commit(self, table: list[int], index: int, tokens: Sequence[int]) -> None:
        """Block `index` of a table now holds these `size` tokens and may be found. If another holds the same, that one is used and
        this one given back.
        """
        assert len(tokens) == self.size
        block, key = table[index], (table[index - 1] if index else ROOT, tuple(tokens))
        known = self._found.setdefault(key, block)
        if known == block:
            self.keys[block] = key
            self._after.setdefault(key[0], []).append(block)
        else:
            self.share([known])
            table[index] = known
            self.release([block])

    def release(self, table: Sequence[int]) -> None:
        """A table holds these no longer; its end first."""
        for b in reversed(table):
            self.refs[b] -= 1
            assert self.refs[b] >= 0, f"block {b} was given back twice"
            if not self.refs[b]:
                if b in self.keys:
                    self._idle[b] = None
                else:
                    self._clean.append(b)

    def _own(self, block: int) -> bool:
        """Whether one table alone holds it and nobody may find it."""
        return self.refs[block] == 1 and block not in self.keys

    def _take(self) -> int:
        block = self._clean.popleft() if self._clean else self._evict()
        self.refs[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        assert not self._after.get(block), "what follows on a block goes before it"
        key = self.keys.pop(block)
        del self._found[key]
        self._after[key[0]].remove(block)
        if not self._after[key[0]]:
            del self._after[key[0]]
        return block


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
