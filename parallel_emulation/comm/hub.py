"""The simulator's engine room: one thread per rank of which exactly one runs, and the calls in which ranks meet.

The baton: a rank that has to wait hands it to the next ready rank and sleeps. So nothing here needs a lock, the order
of events is a function of the program (and of the seed), and "nobody is ready" is a deadlock, seen at once.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np

from refimpl.autograd import Array, SpecError

from .communicator import Meta, Recv, Send, disagreement, mismatch
from .log import Log, Record
from .mailbox import Group, Message, Ticket, same_bytes
from .report import frames_of_threads, joined_text, source_line, table, ticket_text


class Cancelled(BaseException):
    """Unwinds a rank because another one failed; no program should catch it."""


class Hub:
    """Runs n ranks in turn and lets them meet."""

    def __init__(self, n: int, *, seed: int | None, synchronous: bool, log: Log | None) -> None:
        self.n, self.synchronous, self.log = n, synchronous, log
        self.rng = None if seed is None else random.Random(seed)
        self.ready: deque[int] = deque(range(n))
        self.batons = [_locked() for _ in range(n)]
        self.end = _locked()
        self.failure: BaseException | None = None  # what the run will raise
        self.interrupted = False  # set from outside: end at the next call
        self.threads = [0] * n  # identifiers, 0 before the start
        self.finished = [False] * n
        self.waiting: list[tuple[Meta, Group] | Ticket | None] = [None] * n
        self.results: list[Any] = [None] * n  # of the call a rank waits in; at last of its program
        self.on_the_way: dict[Message, None] = {}  # buffered and not received
        self.world = Group(tuple(range(n)))

    # ---- Baton

    def run(self, bodies: Sequence[Callable[[], Any]], stack_size: int) -> list[Any]:
        """Run one body per rank, each in its own thread; returns their results when all threads have ended."""
        threads = []
        for rank, body in enumerate(bodies):
            try:
                threads.append(_start(partial(self.run_rank, rank, body), f"rank {rank}", stack_size))
            except RuntimeError as error:
                self.failure = SpecError(f"{self.n} ranks need a thread each, this machine started {rank}")
                self.failure.__cause__ = error
                self.ready = deque(range(rank))
                break
        if (first := self._next()) is not None:
            self.batons[first].release()
            self._wait_for_end()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        return self.results

    def _wait_for_end(self) -> None:
        try:
            self.end.acquire()
        except BaseException:
            self.interrupted = True  # the running rank ends the run at its next call
            self.end.acquire()
            raise

    def run_rank(self, me: int, body: Callable[[], Any]) -> None:
        """The life of one rank's thread: wait for the baton, run, hand it on for good."""
        self.batons[me].acquire()
        try:
            if self.failure is None:
                self.threads[me] = threading.get_ident()
                self.results[me] = body()
        except Cancelled:
            pass
        except BaseException as error:
            if self.failure is None:
                self.waiting[me] = None
                error.add_note(f"rank {me} of {self.n} raised this; the others then:\n{self.table(skip=me)}".rstrip())
                self._cancel(me, error)
        self._finish(me)

    def _finish(self, me: int) -> None:
        self.finished[me] = True
        if not self.ready and self.failure is None:
            if not all(self.finished):
                self._cancel(me, SpecError(f"deadlock: no rank can go on\n{self.table()}"))
            elif self.on_the_way:
                self.failure = SpecError("messages were sent and never received\n" + self._undelivered())
        after = self._next()
        (self.end if after is None else self.batons[after]).release()

    def _next(self) -> int | None:
        if not self.ready:
            return None
        if self.rng is not None:
            self.ready.rotate(-self.rng.randrange(len(self.ready)))
        return self.ready.popleft()

    def _sleep(self, me: int) -> None:
        """Hand the baton on and come back when someone has made `me` ready and its turn has come."""
        after = self._next()
        if after is None:
            self.fail(me, "deadlock: no rank can go on")
        if after != me:
            self.batons[after].release()
            self.batons[me].acquire()
        if self.failure is not None:
            raise Cancelled
        if self.interrupted:
            self.fail(me, "interrupted")

    def fail(self, me: int, what: str) -> NoReturn:
        """End the run with an error that says what every rank is doing."""
        if self.failure is None:
            self._cancel(me, SpecError(f"{what}\n{self.table()}"))
        raise Cancelled

    def _cancel(self, me: int, failure: BaseException) -> None:
        self.failure = failure
        self.ready = deque([r for r in range(self.n) if r != me and not self.finished[r]])

    # ---- Collectives

    def join(self, group: Group, rank: int, meta: Meta, brought: Any, meet: Callable[..., Sequence[Any]]) -> Any:
        """Wait for all members; the last one computes with meet(log, group, meta, brought by each) what each gets."""
        me = group.ranks[rank]
        self._check_alive()
        if not group.posted:
            group.meta = meta
        assert group.meta is not None
        group.posted[rank] = brought
        self.waiting[me] = (meta, group)
        if meta != group.meta:
            first = group.ranks[next(iter(group.posted))]
            differs = disagreement(group.meta, meta)
            self.fail(me, f"rank {me} calls {meta} while rank {first} is in {group.meta}: another {differs}")
        if len(group.posted) == len(group.ranks):
            posted = [group.posted[i] for i in range(len(group.ranks))]
            group.posted.clear()
            for world_rank, got in zip(group.ranks, meet(self.log, group, meta, posted), strict=True):
                self.results[world_rank] = got
            self.ready.extend(group.ranks)
        self._sleep(me)
        self.waiting[me] = None
        got, self.results[me] = self.results[me], None
        return got

    # ---- Point to point

    def exchange(self, group: Group, rank: int, meta: Meta, sends: list[Send], recvs: list[Recv]) -> list[Array]:
        """Post everything, wait for the receives, and in synchronous mode for the sends."""
        me = group.ranks[rank]
        self._check_alive()
        ticket = Ticket(me, meta, group, [None] * len(recvs), len(recvs) + len(sends) * self.synchronous)
        self.waiting[me] = ticket
        if self.log is not None:
            sent = tuple([(group.ranks[s.to], s.x.nbytes) for s in sends if s.to != rank])
            self.log.add(Record(me, *meta[:2], group.ranks, sent))
        for send in sends:
            assert send.label is not None
            message = Message(ticket, group.ranks[send.to], send.label, np.array(send.x, order="C"), send.x)
            self._post_send(group, (rank, send.to), message)
        for i, recv in enumerate(recvs):
            self._post_recv(group, (recv.source, rank), ticket, i, recv)
        if ticket.missing:
            ticket.asleep = True
            self._sleep(me)
        elif self.rng is not None:  # a seeded run may also go on with another rank where nobody has to wait
            self.ready.append(me)
            self._sleep(me)
        self.waiting[me] = None
        return ticket.out

    def _post_send(self, group: Group, pair: tuple[int, int], message: Message) -> None:
        if expected := group.recvs.get(pair):
            self._match(message.ticket.owner, message, *expected.popleft())
        else:
            group.sends.setdefault(pair, deque()).append(message)
            self.on_the_way[message] = None

    def _post_recv(self, group: Group, pair: tuple[int, int], ticket: Ticket, i: int, recv: Recv) -> None:
        if sent := group.sends.get(pair):
            message = sent.popleft()
            del self.on_the_way[message]
            if not self.synchronous and not same_bytes(message.data, message.original):
                what = f"rank {message.ticket.owner} changed the array it sent to rank {message.to} (label"
                what += f" {message.label!r}) before the receiver had it; a real engine sends from that memory"
                self.fail(ticket.owner, what)
            self._match(ticket.owner, message, ticket, i, recv)
        else:
            group.recvs.setdefault(pair, deque()).append((ticket, i, recv))

    def _match(self, me: int, message: Message, ticket: Ticket, i: int, recv: Recv) -> None:
        if complaint := mismatch(message.label, message.data, recv):
            pair = f"from rank {message.ticket.owner} to rank {ticket.owner}"
            self.fail(me, f"the message {pair} {complaint}")
        ticket.out[i] = message.data
        self._one_less(ticket)
        if self.synchronous:
            self._one_less(message.ticket)

    def _one_less(self, ticket: Ticket) -> None:
        ticket.missing -= 1
        if not ticket.missing and ticket.asleep:
            self.ready.append(ticket.owner)

    # ---- Reports

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise Cancelled  # a `finally` of a rank that is being unwound

    def table(self, skip: int | None = None) -> str:
        """What every rank is doing, one line for ranks that do the same."""
        frames = frames_of_threads()
        return table({r: self._doing(r, frames.get(self.threads[r])) for r in range(self.n) if r != skip})

    def _doing(self, r: int, frame: Any) -> str:
        call = self.waiting[r]
        if self.finished[r]:
            return "has returned"
        if call is None:
            return "has not started" if not self.threads[r] else "is computing"
        if isinstance(call, Ticket):
            return ticket_text(call.meta, call.group.ranks, *call.open_ends()) + source_line(frame)
        meta, group = call
        return joined_text(meta, group.ranks, group.absent()) + source_line(frame)

    def _undelivered(self) -> str:
        return "\n".join([f"  from rank {m.ticket.owner} to rank {m.to}, label {m.label!r}" for m in self.on_the_way])


def _start(body: Callable[[], None], name: str, stack_size: int) -> threading.Thread:
    before = threading.stack_size(stack_size)
    try:
        thread = threading.Thread(target=body, name=name, daemon=True)
        thread.start()
    finally:
        threading.stack_size(before)
    return thread


def _locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock
