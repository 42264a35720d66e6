"""R 3.2: the communicator. Whatever is sent arrives, bit for bit, whatever order the ranks run in; what cannot work is
one error that says where every rank is.
"""

import contextlib
import inspect
import re
import threading
import time
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import SpecError, Tensor
from refimpl.layers.stage import observing
from refimpl.parallel_emulation.comm import Log, hub, spmd, wire
from refimpl.parallel_emulation.comm.communicator import Recv, Send, spans, split_into
from refimpl.spec_tests.cases import rank_programs
from refimpl.spec_tests.cases.rank_programs import DTYPES, PADDED, ROW, sample

MODES = ["buffered", "synchronous"]


def assert_same_bits(got, want):
    """Equal dtype, shape and fields, NaN payloads included; written without wire.digest."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if got.dtype.names:
        for name in got.dtype.names:
            assert_same_bits(got[name], want[name])
    else:
        assert got.tobytes() == want.tobytes()


def joined(parts):
    """The parts one after the other, without np.concatenate, which has its own idea of byte order."""
    raw = b"".join(part.tobytes() for part in parts)
    return np.frombuffer(raw, parts[0].dtype).reshape(-1, *parts[0].shape[1:])


def line_of(function, text):
    """`file.py:12 in function` for the line of its source that holds `text`."""
    lines, first = inspect.getsourcelines(function)
    number = first + next(i for i, line in enumerate(lines) if text in line)
    return f"test_comm.py:{number} in {function.__name__}"


def report(n, program, **options):
    with pytest.raises(SpecError) as caught:
        spmd(n, program, **options)
    return str(caught.value)


# ---- Bytes in, bytes out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("send_mode", MODES)
def test_every_call_moves_every_dtype_bit_for_bit(dtype, send_mode):
    """Catches a call that converts, canonicalises NaNs, or drops the fields of a structured row."""
    n = 4
    given_ = [sample(dtype, (8, 3), seed) for seed in range(n)]

    def program(comm):
        x, right, left = given_[comm.rank], (comm.rank + 1) % n, (comm.rank - 1) % n
        got = [comm.allgather(x), *comm.alltoallv(x, [2] * n), comm.broadcast(x, 2)]
        got += comm.exchange([(right, x), (right, x[0, 0])], [left, left])
        if comm.rank == 0:
            comm.send(x.T, 3)  # not contiguous
        return [*got, comm.recv(0) if comm.rank == 3 else None]

    for rank, (gathered, rows, counts, root, ring, scalar, last) in enumerate(spmd(n, program, send_mode=send_mode)):
        assert_same_bits(gathered, joined([x[None] for x in given_]))
        assert_same_bits(rows, joined([x[2 * rank : 2 * rank + 2] for x in given_]))
        assert_same_bits(root, given_[2])
        assert_same_bits(ring, given_[rank - 1])
        assert_same_bits(scalar, np.asarray(given_[rank - 1][0, 0]))
        assert counts.tolist() == [2] * n
        if rank == 3:
            assert_same_bits(last, np.ascontiguousarray(given_[0].T))


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(("<f4", (2, 3))).base, np.dtype([("a", ROW), ("b", "<i2", (2,))])])
def test_a_message_describes_itself(dtype):
    """Catches a bf16 that arrives as two void bytes (that is how dtype.str spells it) and a lost field offset."""
    x = np.zeros((2, 3), dtype) if dtype.names else sample(dtype, (2, 3), 5)
    got, label = wire.unpack(wire.pack(x, "größe"))
    assert label == "größe"
    assert_same_bits(got, x)
    assert wire.dtype_from_json(wire.dtype_to_json(dtype)) == dtype


@given(st.integers(1, 6), st.data())
@settings(max_examples=40, deadline=None)
def test_alltoallv_with_any_counts(n, data):
    """Catches a wrong offset where counts are uneven or zero.  Oracle: slices of Python lists."""
    counts = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=n, max_size=n))
    width = data.draw(st.integers(0, 3))
    names = [[f"{r}>{to}.{i}" for to in range(n) for i in range(counts[r][to])] for r in range(n)]

    def program(comm):
        rows = np.array(names[comm.rank], "S9")[:, None].repeat(width, axis=1)
        return comm.alltoallv(rows, counts[comm.rank])

    for to, (rows, received) in enumerate(spmd(n, program, seed=data.draw(st.none() | st.integers(0, 99)))):
        want = [f"{r}>{to}.{i}".encode() for r in range(n) for i in range(counts[r][to])]
        assert received.tolist() == [counts[r][to] for r in range(n)]
        assert rows.shape == (len(want), width)
        assert all(column.tolist() == want for column in rows.T)


def test_messages_of_a_pair_arrive_in_order_and_groups_do_not_mix():
    """Catches a hub that matches by arrival over all groups, as two splits of the same ranks would show."""

    def program(comm):
        twins = [comm.split(0), comm.split(0)]
        if comm.rank == 0:
            for i in range(3):
                twins[1].send(np.array([10 + i]), 1)
                twins[0].send(np.array([i]), 1)
            return None
        return [int(twins[t].recv(0)[0]) for t in (0, 1, 0, 1, 0, 1)]

    assert spmd(2, program)[1] == [0, 10, 1, 11, 2, 12]


def test_split_orders_by_key_then_rank():
    """Catches groups in rank order where the key says else, and a world rank lost in a split of a split."""

    def program(comm):
        half = comm.split(comm.rank % 2, -comm.rank)
        quarter = half.split(half.rank // 2, 0)
        return half.ranks, half.rank, quarter.ranks, quarter.world_rank

    found = spmd(8, program)
    assert [f[0] for f in found] == [(6, 4, 2, 0), (7, 5, 3, 1)] * 4
    assert [f[0][f[1]] for f in found] == [f[3] for f in found] == list(range(8))
    assert {f[2] for f in found} == {(6, 4), (2, 0), (7, 5), (3, 1)}


# ---- Order


@pytest.mark.parametrize("program", rank_programs.PROGRAMS, ids=lambda f: f.__name__)
def test_the_order_in_which_ranks_run_changes_nothing(program):
    """Catches a result, or a log, that depends on who comes first; also with sends that wait for their receivers."""

    def run(**options):
        log = Log()
        results = [wire.digest(r) for r in spmd(4, program, log=log, **options)]
        return results, [log.select(rank=r) for r in range(4)]

    modes = MODES if program is not rank_programs.groups else MODES[:1]  # that one sends before it receives
    want = run()
    assert want == run()
    assert all(run(seed=seed, send_mode=mode) == want for seed in range(3) for mode in modes)


def test_a_seed_does_change_the_order():
    """Catches a seed that permutes nothing, which would make the test above empty."""

    def order(seed):
        seen = []

        def program(comm):
            for _ in range(3):
                seen.append(comm.rank)
                comm.barrier()

        spmd(5, program, seed=seed)
        return seen

    assert order(None) == [0, 1, 2, 3, 4] * 3 and order(7) == order(7)
    assert len({tuple(order(seed)) for seed in range(5)}) == 5


def test_a_seed_lets_others_run_after_a_call_that_need_not_wait():
    """Catches a random order that only ever changes where ranks block: a buffered send is a point to go on elsewhere."""

    def together(seed):
        seen = []

        def program(comm):
            seen.append(comm.rank)
            comm.send(np.zeros(1), (comm.rank + 1) % comm.size)
            seen.append(comm.rank)
            comm.recv((comm.rank - 1) % comm.size)

        spmd(5, program, seed=seed)
        return sum(a == b for a, b in zip(seen[::2], seen[1::2], strict=True))

    assert together(None) == 5 and min(together(seed) for seed in range(5)) < 5


def test_one_rank_runs_at_a_time():
    """Catches two live threads: a plain read-modify-write of shared memory would lose counts."""
    live, worst = [0], [0]

    def program(comm):
        for _ in range(20):
            live[0] += 1
            worst[0] = max(worst[0], live[0])
            time.sleep(1e-5)  # invites another thread in
            live[0] -= 1
            comm.barrier()

    spmd(6, program)
    assert worst == [1]


# ---- Deadlocks


def ring_of_receives(comm):
    comm.recv((comm.rank + 1) % comm.size, "token")


def mixed(comm):
    pair = comm.split(comm.rank // 2)
    if comm.rank == 0:
        pair.recv(1, "grad")
    elif comm.rank == 1:
        comm.alltoallv(np.zeros((4, 3), np.float32), [1] * 4, "dispatch")
    elif comm.rank == 2:
        pair.exchange([Send(1, np.ones(2))], [Recv(1)], "swap")
    else:
        return


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_deadlock_names_every_rank_with_call_group_peer_and_line(seed):
    """Catches a hang, and a report that leaves one rank out."""
    text = report(4, mixed, seed=seed, send_mode="synchronous")
    assert text.splitlines()[0] == "deadlock: no rank can go on"
    at = {name: line_of(mixed, name) for name in ("recv", "alltoallv", "exchange")}
    assert sorted(text.splitlines()[1:]) == [
        f"  rank 0: recv 'grad' on ranks 0-1, waits to receive from rank 1, at {at['recv']}",
        f"  rank 1: alltoallv 'dispatch' of float32[3] on ranks 0-3, waits for ranks 0, 2-3, at {at['alltoallv']}",
        "  rank 2: exchange 'swap' on ranks 2-3, waits to send to rank 3 and to receive from rank 3, "
        f"at {at['exchange']}",
        "  rank 3: has returned",
    ]


def test_a_circle_of_receives_is_a_deadlock_and_ranks_in_step_share_a_line():
    """Catches a report of 2048 lines where ranks differ in the peer only by necessity."""
    text = report(5, ring_of_receives)
    for rank in range(5):
        assert f"rank {rank}: recv 'token' on ranks 0-4, waits to receive from rank {(rank + 1) % 5}" in text
    together = report(2048, lambda comm: comm.barrier("all") if comm.rank else None)
    assert (
        len(together.splitlines()) == 3 and "ranks 1-2047: barrier 'all' on ranks 0-2047, waits for rank 0" in together
    )


def test_a_collective_of_the_library_is_reported_with_its_caller():
    """Catches a report that only says collectives.py, where the reader looks for his own line."""
    from refimpl.parallel_emulation.collectives import ring_all_reduce

    def program(comm):
        return None if comm.rank == 2 else ring_all_reduce(comm, np.ones(4))  # here

    assert re.search(rf"at collectives.py:\d+ in \w+, called at {line_of(program, '# here')}", report(3, program))


def test_synchronous_sends_find_what_only_buffers_save():
    """Catches the classic: both send first.  Buffered it works; the exchange that it should be works in both modes."""

    def both_send_first(comm):
        comm.send(np.array([comm.rank]), 1 - comm.rank)
        return int(comm.recv(1 - comm.rank)[0])

    def exchanged(comm):
        return int(comm.exchange([(1 - comm.rank, np.array([comm.rank]))], [1 - comm.rank])[0][0])

    assert spmd(2, both_send_first) == [1, 0]
    text = report(2, both_send_first, send_mode="synchronous")
    assert "deadlock" in text and "rank 0: send on ranks 0-1, waits to send to rank 1" in text
    assert [spmd(2, exchanged, send_mode=mode) for mode in MODES] == [[1, 0]] * 2


def test_a_rank_that_returns_early_is_named():
    """Catches a run that ends well although some ranks still wait."""
    text = report(3, rank_programs.returns_early)
    assert "rank 1: has returned" in text and "ranks 0, 2: barrier 'without 1' on ranks 0-2, waits for rank 1" in text


def test_a_message_that_nobody_receives_is_an_error():
    """Catches a schedule whose last send has no receive: buffered, it would look right."""
    text = report(2, lambda comm: comm.send(np.ones(2), 1, "late") if comm.rank == 0 else None)
    assert text == "messages were sent and never received\n  from rank 0 to rank 1, label 'late'"


# ---- Calls that do not fit together


def differ(*calls):
    """A program in which rank r makes the r-th call."""
    return lambda comm: calls[comm.rank](comm)


MISMATCHES = {
    "call": (lambda c: c.allgather(np.ones(3)), lambda c: c.barrier()),
    "label": (lambda c: c.barrier("a"), lambda c: c.barrier("b")),
    "dtype": (lambda c: c.allgather(np.ones(3)), lambda c: c.allgather(np.ones(3, np.float32))),
    "shape": (lambda c: c.allgather(np.ones(3)), lambda c: c.allgather(np.ones(4))),
    "root": (lambda c: c.broadcast(np.ones(3), 0), lambda c: c.broadcast(np.ones(3), 1)),
}
ROWS = (lambda c: c.alltoallv(np.ones((2, 3)), [1, 1]), lambda c: c.alltoallv(np.ones((2, 4)), [1, 1]))


@pytest.mark.parametrize(("what", "calls"), [*MISMATCHES.items(), ("shape", ROWS)])
def test_a_collective_on_which_members_disagree(what, calls):
    """Catches reading one rank's bytes in another's shape.  The error comes at once and names both."""
    text = report(2, differ(*calls))
    assert text.startswith("rank 1 calls ") and f"while rank 0 is in {'barrier' if what == 'label' else ''}" in text
    assert text.splitlines()[0].endswith(f": another {what}") and text.count("test_comm.py") >= 2


def test_another_group_is_a_deadlock_that_shows_both_groups():
    """Catches two groups with the same members taken for one: in MPI, too, they never meet."""

    def program(comm):
        group = comm.split(0)
        (comm if comm.rank else group).barrier("meet")

    text = report(2, program)
    assert "rank 0: barrier 'meet' on ranks 0-1, waits for rank 1" in text
    assert "rank 1: barrier 'meet' on ranks 0-1, waits for rank 0" in text

    def smaller(comm):
        pair = comm.split(comm.rank // 2)
        (comm if comm.rank == 3 else pair).barrier()

    assert "rank 2: barrier on ranks 2-3, waits for rank 3" in report(4, smaller)


@pytest.mark.parametrize(
    ("want", "complaint"),
    [
        (Recv(0, "other"), "is labelled 'row', the receiver expects 'other'"),
        (Recv(0, "row", np.ones(4)), "is float64[3], the receiver expects float64[4]"),
        (Recv(0, "row", np.ones(3, ml_dtypes.bfloat16)), "is float64[3], the receiver expects bfloat16[3]"),
    ],
)
@pytest.mark.parametrize("receiver_first", [True, False])
def test_a_message_other_than_expected(want, complaint, receiver_first):
    """Catches an activation taken for a gradient: without tags, order is all that matches messages."""

    def program(comm):
        if comm.rank == receiver_first:
            comm.barrier()
        if comm.rank == 0:
            comm.send(np.ones(3), 1, "row")
        else:
            comm.exchange([], [want])
        if comm.rank != receiver_first:
            comm.barrier()

    text = report(2, program)
    assert "deadlock" in text or f"the message from rank 0 to rank 1 {complaint}" in text
    simple = differ(lambda c: c.send(np.ones(3), 1, "row"), lambda c: c.exchange([], [want]))
    assert f"the message from rank 0 to rank 1 {complaint}" in report(2, simple)
    assert f"the message from rank 0 to rank 1 {complaint}" in report(2, simple, seed=3)


# ---- Ranks that fail


def test_an_exception_keeps_its_type_traceback_and_ends_the_others():
    """Catches a swallowed error, a wrapped type, ranks left running, and `finally` blocks that do not run."""
    cleaned, before = [], threading.active_count()

    def program(comm):
        try:
            with contextlib.suppress(Exception):  # a rank being ended must not be able to go on by accident
                if comm.rank != 2:
                    comm.barrier("waiting")
            if comm.rank == 2:
                raise KeyError("no expert 7")
            comm.barrier("unreachable")
        finally:
            cleaned.append(comm.rank)
            if comm.rank == 0:
                comm.barrier("waiting")  # a rank that is being ended does not begin to wait again

    with pytest.raises(KeyError, match="no expert 7") as caught:
        spmd(4, program)
    assert "raise KeyError" in str(caught.traceback[-1].statement)
    (note,) = caught.value.__notes__
    assert note.startswith("rank 2 of 4 raised this; the others then:\n  ranks 0-1: barrier 'waiting' on ranks 0-3")
    assert "rank 3: has not started" in note
    assert sorted(cleaned) == [0, 1, 2] and threading.active_count() == before


def test_an_interrupt_ends_the_run(monkeypatch):
    """Catches Ctrl-C leaving n threads behind."""
    real = hub.Hub._wait_for_end

    class Interrupted:
        def __init__(self, lock):
            self.lock, self.first = lock, True

        def acquire(self):
            if self.first:
                self.first = False
                raise KeyboardInterrupt
            self.lock.acquire()

        def release(self):
            self.lock.release()

    def interrupted(self):
        self.end = Interrupted(self.end)
        real(self)

    monkeypatch.setattr(hub.Hub, "_wait_for_end", interrupted)
    before = threading.active_count()

    def forever(comm):
        while True:
            comm.barrier()

    with pytest.raises(KeyboardInterrupt):
        spmd(3, forever)
    time.sleep(0.2)  # the threads' last instructions
    assert threading.active_count() == before


def test_no_rank_holds_up_the_end_of_the_process():
    """Catches a second Ctrl-C after which Python still waits for a rank that computes for ever."""
    assert spmd(2, lambda comm: threading.current_thread().daemon) == [True, True]


def test_a_machine_without_threads_left_says_so(monkeypatch):
    """Catches threads that sleep for ever because a later one could not be started."""
    real, before = hub._start, threading.active_count()

    def limited(body, name, size):
        if name == "rank 3":
            raise RuntimeError("can't start new thread")
        return real(body, name, size)

    monkeypatch.setattr(hub, "_start", limited)
    with pytest.raises(SpecError, match="5 ranks need a thread each, this machine started 3"):
        spmd(5, lambda comm: comm.barrier())
    assert threading.active_count() == before


# ---- No shared memory


def test_changing_what_was_sent_before_it_arrives_is_an_error():
    """Catches a program that a copying simulator forgives and a real engine, sending from that memory, does not."""

    def program(comm, late):
        if comm.rank == 0:
            x = np.ones(3)
            comm.send(x, 1, "w")
            if late:
                comm.barrier()
            x += 1
            if not late:
                comm.barrier()
            return None
        if late:
            y = comm.recv(0, "w")
            comm.barrier()
            return y
        comm.barrier()
        return comm.recv(0, "w")

    with pytest.raises(
        SpecError, match=r"rank 0 changed the array it sent to rank 1 \(label 'w'\) before the receiver"
    ):
        spmd(2, program, False)
    assert spmd(2, program, True)[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype("c16")], ids=str)
def test_what_stays_as_it_was_is_not_reported(dtype):
    """Catches NaNs, or the padding of an aligned row, taken for a change."""

    def program(comm):
        x = sample(dtype, (5, 2), 3)
        comm.send(x[:, 1], 1) if comm.rank == 0 else None
        comm.barrier()
        return comm.recv(0) if comm.rank else None

    assert_same_bits(spmd(2, program)[1], np.ascontiguousarray(sample(dtype, (5, 2), 3)[:, 1]))
    assert PADDED in DTYPES


def test_results_are_fresh():
    """Catches ranks that hold one array together: each writes into everything it has, nobody else may notice."""

    def program(comm):
        n, x = comm.size, np.full((comm.size, 2), float(comm.rank))
        ring = ((comm.rank + 1) % n, (comm.rank - 1) % n)
        got = [comm.allgather(x), comm.alltoallv(x, [1] * n)[0], comm.broadcast(x if comm.rank == 0 else None)]
        got += comm.exchange([(ring[0], x)], [ring[1]])
        got += comm.split(0).alltoallv(x, [1] * n)
        want = [np.array(g) for g in got]
        comm.barrier()
        for g in got:
            g[...] = -1 - comm.rank
        comm.barrier()
        assert all((g == -1 - comm.rank).all() for g in got) and (x == comm.rank).all()
        return want

    assert len({wire.digest(r[0]) for r in spmd(3, program, seed=5)}) == 1


class Pair(NamedTuple):
    first: np.ndarray
    second: int


def test_arguments_are_private():
    """Catches a rank that changes the others' weights, lists or random numbers through its arguments."""
    x, rng = np.zeros(3), np.random.default_rng(0)

    def program(comm, x, tree, leaf, rng):
        for array in (x, tree["w"][0], tree["pair"].first, leaf.data):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
        tree["w"].append(comm.rank)
        tree["mine"] = comm.rank
        comm.barrier()
        return len(tree["w"]), float(rng.random()), leaf

    tree = {"w": [x], "pair": Pair(x, 0)}
    found = spmd(4, program, x, tree, Tensor(x), rng)
    assert [f[0] for f in found] == [2] * 4 and len({f[1] for f in found}) == 1 and len({f[2] for f in found}) == 4
    assert list(tree) == ["w", "pair"] and x.flags.writeable and rng.random() == found[0][1]


def test_observers_of_the_caller_stand_around_every_rank_and_stay_private():
    """Catches a precision plan that is silently dropped in the ranks, and one rank's observer seen by another."""
    from refimpl.layers import STAGES

    norm = STAGES["attn_norm"]
    calls = []

    def note(stage, run, *args, **static):
        calls.append(stage.name)
        return run(*args, **static)

    def program(comm):
        x, own = np.ones((1, 2, 4), np.float32), []
        with observing(lambda stage, run, *a, **s: (own.append(comm.rank), run(*a, **s))[1]):
            comm.barrier()
            norm(x, np.ones(4, np.float32), eps=1e-6)
            comm.barrier()
        return own

    with observing(note):
        assert spmd(3, program) == [[0], [1], [2]]
    assert calls == ["attn_norm"] * 3


def test_a_run_inside_a_rank():
    """Catches hidden state: a run inside a run is just a call."""
    assert spmd(2, lambda comm: spmd(3, lambda inner: int(inner.allgather(comm.rank + inner.rank).sum()))) == [
        [3, 3, 3],
        [6, 6, 6],
    ]


# ---- Bad input


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda c: c.alltoallv(np.ones(3), [1, 1]), r"counts \[1, 1\] must be >= 0 and add up to 3"),
        (lambda c: c.alltoallv(np.ones(3), [4, -1]), "must be >= 0"),
        (lambda c: c.alltoallv(np.ones(3), [3]), "expected 2 whole numbers"),
        (lambda c: c.alltoallv(np.ones(3), [1.5, 1.5]), "expected 2 whole numbers"),
        (lambda c: c.alltoallv(np.float64(3), [0, 1]), "leading axis"),
        (lambda c: c.send(np.ones(3), 2), "send with rank 2 of a group of 2"),
        (lambda c: c.recv(-1), "recv with rank -1 of a group of 2"),
        (lambda c: c.broadcast(np.ones(3), 5), "broadcast from rank 5"),
        (lambda c: c.broadcast(None, c.rank), "NoneType is not a NumPy array"),
        (lambda c: c.allgather(np.array([{}])), "dtype object has no bytes"),
        (lambda c: c.allgather("text"), "str is not a NumPy array"),
        (lambda c: c.allgather(Tensor(np.ones(3))), "a Tensor does not travel"),
        (lambda c: split_into(c, [[0, 1], [1]]), "groups overlap in ranks 1"),
        (lambda c: split_into(c, [[0]]), r"groups hold 0, not ranks 0-1"),
        (lambda c: wire.digest(c), "may hold arrays, numbers and strings, not SimComm"),
    ],
)
def test_bad_input_is_refused(call, complaint):
    """Catches bad input that travels on and becomes someone else's puzzle."""
    with pytest.raises(SpecError, match=complaint):
        spmd(2, call)


@pytest.mark.parametrize(
    ("n", "options", "complaint"), [(0, {}, "at least one rank"), (2, {"send_mode": "fast"}, "send_mode is 'buffered'")]
)
def test_bad_runs_are_refused(n, options, complaint):
    """Catches a run of nobody."""
    with pytest.raises(SpecError, match=complaint):
        spmd(n, lambda comm: None, **options)


# ---- The log


def test_the_log_holds_every_call_with_bytes_per_peer():
    """Catches bytes to oneself counted as traffic, and calls without bytes left out."""

    def program(comm):
        comm.barrier("start")
        pair = comm.split(comm.rank // 2, 0, "pairs")
        pair.allgather(np.ones(3, np.float32), "g")
        rows = np.ones((comm.rank + 3, 5), ml_dtypes.bfloat16)
        comm.alltoallv(rows, [1, 0, 2, comm.rank], "a")
        comm.broadcast(np.ones(7, np.uint8) if comm.rank == 1 else None, 1, "b")
        if comm.rank == 2:
            comm.exchange([Send(3, np.ones(2)), Send(3, np.ones(1)), Send(2, np.ones(9))], [2], "x")
        if comm.rank == 3:
            comm.recv(2, "x")
            comm.recv(2, "x")

    log = Log()
    spmd(4, program, log=log, seed=4)
    everyone, mine = (0, 1, 2, 3), log.select(rank=2)
    assert [tuple(r) for r in mine] == [
        (2, "barrier", "start", everyone, ()),
        (2, "split", "pairs", everyone, ()),
        (2, "allgather", "g", (2, 3), ((3, 12),)),
        (2, "alltoallv", "a", everyone, ((0, 10), (3, 20))),
        (2, "broadcast", "b", everyone, ()),
        (2, "exchange", "x", everyone, ((3, 16), (3, 8))),
    ]
    assert log.select(rank=1, label="b")[0].sent == ((0, 7), (2, 7), (3, 7))
    assert log.calls(rank=3, op="recv") == 2 and log.bytes(op="exchange") == 24
    want = [[0, 0, 20, 0], [10, 0, 20, 10], [10, 0, 0, 20], [10, 0, 20, 0]]
    assert log.matrix(4, label="a").tolist() == want
    assert log.bytes(label="a") == sum(map(sum, want))


# ---- Size


@pytest.mark.slow
def test_2048_ranks_run_a_small_mixture_of_experts_step():
    """Catches a hub whose cost or memory grows beyond the n x n counts that the step itself has."""
    n, width = 2048, 8

    def step(comm):
        x = np.full((4, width), comm.rank, np.float32)
        to = np.sort((comm.rank * 7 + np.arange(4) * 501) % n)
        counts = np.bincount(to, minlength=n)
        rows, received = comm.alltoallv(x, counts, "dispatch")
        back, _ = comm.alltoallv(rows * 2, received, "combine")
        (left,) = comm.exchange([((comm.rank + 1) % n, x[0])], [(comm.rank - 1) % n], "ring")
        comm.barrier()
        return len(rows), back, left[0]

    log = Log()
    found = spmd(n, step, log=log)
    assert sum(f[0] for f in found) == 4 * n
    assert all((f[1] == 2 * rank).all() and f[2] == (rank - 1) % n for rank, f in enumerate(found))
    to_self = sum((rank * 7 + k * 501) % n == rank for rank in range(n) for k in range(4))
    assert log.bytes(label="dispatch") == (4 * n - to_self) * width * 4


@given(st.sets(st.integers(0, 30), min_size=1))
def test_spans_say_the_same_in_short(ranks):
    """Catches a range that swallows or drops its last rank.  Oracle: read the text back."""
    parts = [part.split("-") for part in spans(sorted(ranks)).split(", ")]
    assert {r for part in parts for r in range(int(part[0]), int(part[-1]) + 1)} == ranks
