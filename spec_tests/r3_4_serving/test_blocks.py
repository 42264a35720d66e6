"""R 3.4: the paged cache's books. Random schedules against an oracle that keeps the memory itself and counts everything anew."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from refimpl import SpecError
from refimpl.infer.engine import Blocks


class Books(RuleBasedStateMachine):
    """Sequences begin, grow and leave; `memory` is what a device would hold, one token a place."""

    @initialize(count=st.integers(3, 9), size=st.integers(1, 4))
    def start(self, count, size):
        self.blocks, self.size, self.count = Blocks(count, size), size, count
        self.memory = np.full((count, size), -1)
        self.live = []  # (tokens, table)

    def place(self, tokens, table, start, stop):
        """Write tokens start..stop as an engine does: room, copies, contents, and only then the index."""
        for old, new in self.blocks.reserve(table, start, stop):
            self.memory[new] = self.memory[old]
        for i in range(start, stop):
            self.memory[table[i // self.size], i % self.size] = tokens[i]
        for i in range(start // self.size, stop // self.size):
            self.blocks.commit(table, i, tokens[i * self.size : (i + 1) * self.size])

    def known(self):
        """Every beginning of a text that may be found, by following each block to its root."""
        found = []
        for block in self.blocks.keys:
            text, at = (), block
            while at != -1:
                before, own = self.blocks.keys[at]
                text, at = own + text, before
            found.append(text)
        return found

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def begin(self, tokens):
        b = self.blocks
        table, n = b.match(tokens)
        longest = max(
            (
                sum(1 for i in range(min(len(t), len(tokens) - 1)) if t[: i + 1] == tuple(tokens[: i + 1]))
                for t in self.known()
            ),
            default=0,
        )
        assert n == longest and len(table) == -(-n // self.size)
        assert [int(self.memory[table[i // self.size], i % self.size]) for i in range(n)] == tokens[:n]
        if b.idle(table) + b.needed(len(tokens)) - n // self.size > b.free:
            return
        b.share(table)
        self.place(tokens, table, n, len(tokens))
        self.live.append((tokens, table))

    @precondition(lambda self: self.live)
    @rule(i=st.integers(0, 99), more=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def grow(self, i, more):
        tokens, table = self.live[i % len(self.live)]
        start, stop = len(tokens), len(tokens) + len(more)
        free, missing = self.blocks.free, self.blocks.missing(table, start, stop)
        if missing > free:
            return
        tokens += more
        blocks = len(table)
        self.place(tokens, table, start, stop)
        assert len(table) - blocks == missing

    @precondition(lambda self: self.live)
    @rule(i=st.integers(0, 99))
    def leave(self, i):
        _, table = self.live.pop(i % len(self.live))
        self.blocks.release(table)

    @invariant()
    def nothing_leaks_and_nobody_reads_another_s_tokens(self):
        if not hasattr(self, "blocks"):
            return
        b = self.blocks
        held = [block for _, table in self.live for block in table]
        assert b.refs == [held.count(i) for i in range(self.count)]
        assert b.free == self.count - len(set(held))
        for tokens, table in self.live:
            assert [int(self.memory[table[i // self.size], i % self.size]) for i in range(len(tokens))] == tokens
            assert len(table) == -(-len(tokens) // self.size)
        for text in self.known():
            assert len(text) % self.size == 0
        assert len(set(self.known())) == len(b.keys), "the same text may be found twice"


class TestBooks(Books.TestCase):
    """Catches a block freed while somebody reads it, freed twice or never, a write into a shared block, a key that outlives its
    content, a match that is too long or too short, an eviction of a block that others follow on."""

    settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def fill(blocks, tokens):
    table, n = blocks.match(tokens)
    blocks.share(table)
    copies = blocks.reserve(table, n, len(tokens))
    for i in range(n // blocks.size, len(tokens) // blocks.size):
        blocks.commit(table, i, tokens[i * blocks.size : (i + 1) * blocks.size])
    return table, n, copies


def test_a_block_that_agrees_in_part_is_copied_on_write():
    """Catches a shared block written in place, a copy in the wrong direction, a copy where nobody else looks."""
    blocks = Blocks(8, 4)
    first, _, none = fill(blocks, [1, 2, 3, 4, 5, 6, 7, 8])
    second, n, copies = fill(blocks, [1, 2, 3, 4, 5, 6, 9])
    assert none == [] and n == 6 and copies == [(first[1], second[1])]
    assert second[0] == first[0] and second[1] != first[1]
    assert [blocks.refs[b] for b in (*first, second[1])] == [2, 1, 1]
    assert blocks.reserve(second, 7, 8) == []  # its own by now


def test_the_block_unused_longest_goes_first_and_tails_before_heads():
    """Catches first-in-first-out eviction, clean blocks left while content is lost, a head evicted under its tail."""
    blocks = Blocks(5, 2)
    a, _, _ = fill(blocks, [1, 2, 3, 4])
    b, _, _ = fill(blocks, [5, 6, 7, 8])
    blocks.release(a)
    blocks.release(b)
    assert blocks.free == 5 and set(blocks.keys) == {*a, *b}
    blocks.share(a[:1])  # used again: now the youngest
    blocks.release(a[:1])
    taken = []
    blocks.reserve(taken, 0, 10)
    assert taken == [4, a[1], b[1], b[0], a[0]]


def test_equal_blocks_become_one():
    """Catches the same prompt kept twice when two requests with it run side by side."""
    blocks = Blocks(6, 2)
    tables = [[], []]
    for t in tables:
        blocks.reserve(t, 0, 3)
    for t in tables:
        blocks.commit(t, 0, [7, 7])
    assert tables[0][0] == tables[1][0] and tables[0][1] != tables[1][1]
    assert blocks.refs[tables[0][0]] == 2 and blocks.free == 3


def test_sizes_that_make_no_cache():
    """Catches a cache of nothing."""
    for count, size in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(SpecError, match="expected at least one of one"):
            Blocks(count, size)
