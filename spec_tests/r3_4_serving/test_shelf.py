"""What is used most stays, what comes next is read ahead: the cache and the thread behind weights from disk (R 3.4)."""

import threading

import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.checkpoint import Rows
from refimpl.checkpoint.buffers import LARGE, Buffers
from refimpl.infer.from_disk import Hot, Shelf


def rows_of(n):
    return Rows(0, np.zeros(n, np.uint8), None)


def test_the_colder_make_room_the_coldest_first():
    """Catches a rule by age, which never hits when layers come in a circle, and newcomers that displace what is as hot."""
    hot = Hot(10)
    for name, size in (("a", 4), ("b", 4), ("c", 4)):
        hot.get((name, 0))
        hot.offer((name, 0), rows_of(size))
    assert [k for k, _ in hot.held] == ["a", "b"]  # c is as cold as they are
    for key in "acc":
        hot.get((key, 0))
    hot.offer(("c", 0), rows_of(4))  # used three times; a twice, b once
    assert [k for k, _ in hot.held] == ["a", "c"] and hot.size == 8
    for _ in range(9):
        hot.get(("d", 0))
    hot.offer(("d", 0), rows_of(11))  # never fits
    assert hot.size == 8
    hot.offer(("d", 0), rows_of(7))  # needs both places
    assert [k for k, _ in hot.held] == ["d"] and hot.size == 7
    cold = Hot(0)
    cold.get(("a", 0))
    cold.offer(("a", 0), rows_of(1))
    assert not cold.held


def test_the_budget_holds_whatever_comes():
    """Catches sizes that are counted wrongly; and nothing hot goes for something colder."""
    rng, hot = np.random.default_rng(0), Hot(100)
    sizes = rng.integers(1, 40, 30)
    for i in rng.zipf(1.5, 2000) % 30:
        key, before = (str(i), 0), dict(hot.held)
        if hot.get(key) is None:
            hot.offer(key, rows_of(int(sizes[i])))
        assert hot.size == sum(r.nbytes for r in hot.held.values()) <= 100
        assert all(hot.uses[gone] < hot.uses[key] for gone in before.keys() - hot.held.keys())


def test_reading_ahead_is_done_by_the_thread_in_order_and_not_too_far():
    """Catches a thread that reads nothing, reads on without end, or in another order; and one that outlives its use."""
    keys = [(name, 0) for name in "abcdef"]
    started, done, by = {k: threading.Event() for k in keys}, [], {}

    def read(key):
        by[key] = threading.current_thread().name
        started[key].set()
        done.append(key)
        return rows_of(10)

    with Shelf(read, Hot(0), ahead=20) as shelf:
        shelf.begin(keys)
        assert started[keys[1]].wait(60)
        for i, key in enumerate(keys):
            assert started[keys[min(i + 1, 5)]].wait(60)
            assert len(done) <= i + 2  # two wait to be used, no third is begun
            assert shelf.get(key).nbytes == 10
    assert done == keys and set(by.values()) == {"read-ahead"}
    assert "read-ahead" not in [t.name for t in threading.enumerate()]


def test_a_new_pass_forgets_what_was_announced():
    """Catches chunks of an interrupted pass read, or kept, for ever."""
    entered, go = threading.Event(), threading.Event()
    read_keys = []

    def read(key):
        read_keys.append(key)
        if key == ("old", 0):
            entered.set()
            assert go.wait(60)
        return rows_of(10)

    with Shelf(read, Hot(0), ahead=100) as shelf:
        shelf.begin([("old", 0), ("older", 0)])
        assert entered.wait(60)
        shelf.begin([("new", 0)])
        go.set()
        shelf.get(("new", 0))
        shelf.get(("old", 0))
    assert sorted(read_keys) == [("new", 0), ("old", 0), ("old", 0)]


def test_what_is_being_read_is_waited_for():
    """Catches a chunk read twice at the same time: whoever needs what the thread is reading just now gets that."""
    entered, go, count = threading.Event(), threading.Event(), []

    def read(key):
        count.append(key)
        entered.set()
        assert go.wait(60)
        return rows_of(10)

    class Asked(Hot):
        def get(self, key):
            go.set()  # the thread's read ends now that it is asked for; it cannot be handed over before `get` waits
            return super().get(key)

    with Shelf(read, Asked(0), ahead=100) as shelf:
        shelf.begin([("a", 0)])
        assert entered.wait(60)
        shelf.get(("a", 0))
    assert count == [("a", 0)]


def test_an_error_comes_to_who_needs_the_rows():
    """Catches errors that die with the thread, or a wait for rows that never come."""

    def read(key):
        raise SpecError(f"no {key[0]}")

    with Shelf(read, Hot(0), ahead=100) as shelf:
        shelf.begin([("a", 0)])
        with pytest.raises(SpecError, match="no a"):
            shelf.get(("a", 0))
        assert not [t for t in threading.enumerate() if t.name == "read-ahead" and not t.is_alive()]


def test_what_comes_out_of_turn_is_read_at_once():
    """Catches a wait for a thread that has no room: everything announced stays unused, and something else is needed."""
    with Shelf(lambda key: rows_of(10), Hot(0), ahead=1) as shelf:
        shelf.begin([("a", 0), ("b", 0)])
        assert shelf.get(("z", 0)).nbytes == 10


def test_memory_of_what_was_dropped_serves_the_next_of_its_size_and_no_one_else():
    """Catches chunks that are overwritten while a part of them is in use, memory held for every size that ever came, and none that
    is used again: then each chunk's pages are taken and cleared anew."""
    buffers = Buffers()

    def place(a):
        return a.__array_interface__["data"][0]

    first = buffers.new((4, LARGE), np.dtype(np.uint8))
    part, at = first[2:], place(first)
    part[:] = 7
    del first
    second = buffers.new((4, LARGE), np.dtype(np.uint8))
    second[:] = 1
    assert (part == 7).all() and place(second) != at
    del part
    third = buffers.new((LARGE,), np.dtype(np.float32))  # as many bytes
    assert place(third) == at
    del second, third
    assert len(buffers._free) == 1
    other = buffers.new((5, LARGE), np.dtype(np.uint8))
    assert not buffers._free and other.shape == (5, LARGE)
