"""Is a schedule right? Complete, in a possible order, first-in-first-out between every two ranks, free of circles."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from itertools import zip_longest
from typing import get_args

from refimpl.autograd.errors import require, where

from .schedule import Kind, Layout, Message, Op, Schedule, step_text
from .timeline import Times, simulate


@dataclass(frozen=True)
class Facts:
    """What a right schedule costs, rank by rank."""

    peak_live: tuple[int, ...]  # most chunks whose forward is done and whose (input) backward is not
    peak_until_weight: tuple[int, ...]  # the same, a chunk staying alive until its weight part is done
    peak_queue: tuple[int, ...]  # most weight parts waiting
    sent: tuple[int, ...]  # messages


def check(schedule: Schedule, *, rendezvous: bool = True) -> Facts:
    """Raise SpecError, naming rank and op, unless the schedule can run and computes everything once.

    Checked: every chunk has one forward and one backward (B, or I and W) on each of its stages; every F before its
    B or I, every I before its W, W's in the order of the I's, none left at the end; receives come no later and
    sends no earlier than their op; what a sends to b is what b receives from a, in that order; no circular wait,
    with buffered sends and (`rendezvous`) with batches that end together on both sides.
    """
    layout = schedule.layout
    for rank in range(layout.n_ranks):
        with where(f"on rank {rank} of {schedule.name}"):
            _complete(layout, rank, list(schedule.ops(rank)))
            _ordered(schedule, rank)
            _weights_in_turn(schedule, rank)
            _messages_in_time(schedule, rank)
    _first_in_first_out(schedule)
    with where(f"with buffered sends, in {schedule.name}"):
        simulate(schedule, Times())
    if rendezvous:
        with where(f"with batches as rendezvous, in {schedule.name}"):
            simulate(schedule, Times(), synchronous=True)
    return facts(schedule)


def _complete(layout: Layout, rank: int, ops: list[Op]) -> None:
    for op in ops:
        known = op.direction < len(layout.stages[rank]) and op.chunk < layout.chunks
        require(known, f"{op}: there are {len(layout.stages[rank])} directions and {layout.chunks} chunks in each")
    found, kinds = Counter(ops), get_args(Kind)
    for direction in range(len(layout.stages[rank])):
        for chunk in range(layout.chunks):
            f, b, i, w = (found[Op(kind, direction, chunk)] for kind in kinds)
            name = f"chunk {direction}.{chunk}"
            require(f == 1, f"{name} has {f} forwards; expected 1")
            require(b + i == 1, f"{name} has {b} full backwards and {i} for the input only; expected one of them")
            require(w == i, f"{name} has {w} weight parts and {i} backwards for the input only")


def _ordered(schedule: Schedule, rank: int) -> None:
    done: set[Op] = set()
    before: dict[Kind, Kind] = {"B": "F", "I": "F", "W": "I"}
    for step in schedule.ranks[rank]:
        for op in (op for op in step if op.kind != "F"):
            needed = Op(before[op.kind], op.direction, op.chunk)
            require(needed in done, f"{step_text(step)} needs {needed} in a step before it")
        done.update(step)


def _weights_in_turn(schedule: Schedule, rank: int) -> None:
    queue: deque[Op] = deque()
    for op in schedule.ops(rank):
        if op.kind == "I":
            queue.append(Op("W", op.direction, op.chunk))
        elif op.kind == "W":
            oldest = queue.popleft()
            require(op == oldest, f"{op} is computed while {oldest} is the oldest of the queue")


def _messages_in_time(schedule: Schedule, rank: int) -> None:
    """Every receive in a batch before its op, every send in one after it, each once, and no other messages."""
    layout = schedule.layout
    posted: Counter[Message] = Counter()
    due: Counter[Message] = Counter()  # what the ops so far have needed and produced
    for batch, step in schedule.program(rank):
        for m in batch:
            require(m.verb == "r" or m in due, f"{m} is posted before it is computed")
        posted.update(batch)
        for op in step:
            needed, produced = layout.message("r", rank, op), layout.message("s", rank, op)
            require(needed is None or needed in posted, f"{op} is computed before {needed} is posted")
            due.update(m for m in (needed, produced) if m)
    for m in posted | due:
        require(posted[m] == due[m], f"{m} is posted {posted[m]} times; expected {due[m]}")


def _first_in_first_out(schedule: Schedule) -> None:
    layout = schedule.layout
    channels: dict[tuple[int, int], tuple[list[str], list[str]]] = {}
    for rank in range(layout.n_ranks):
        for m in (m for batch in schedule.batches[rank] for m in batch):
            pair = (rank, m.peer) if m.verb == "s" else (m.peer, rank)
            back = 0 if m.verb == "s" else 1 if m.kind == "F" else -1  # the receiver is one stage further
            what = f"{m.kind} of stage {layout.stage(rank, m) - back}, micro-batch {layout.micro_batch(m)}"
            channels.setdefault(pair, ([], []))[m.verb == "r"].append(what)
    for (a, b), (sent, received) in sorted(channels.items()):
        for i, (x, y) in enumerate(zip_longest(sent, received, fillvalue="nothing")):
            require(x == y, f"message {i} from rank {a} to rank {b}: sent is {x}, received is {y} ({schedule.name})")


def facts(schedule: Schedule) -> Facts:
    """The peaks of a schedule that has passed the check."""
    ranks = range(schedule.layout.n_ranks)
    count = [Counter(m.verb for batch in schedule.batches[r] for m in batch) for r in ranks]
    return Facts(
        tuple(_peak(schedule, r, {"F": 1, "B": -1, "I": -1}) for r in ranks),
        tuple(_peak(schedule, r, {"F": 1, "B": -1, "W": -1}) for r in ranks),
        tuple(_peak(schedule, r, {"I": 1, "W": -1}) for r in ranks),
        tuple(c["s"] for c in count),
    )


def _peak(schedule: Schedule, rank: int, change: dict[str, int]) -> int:
    """Largest running sum of `change` over the ops; in an overlapped pair the forward comes first."""
    live = most = 0
    for op in schedule.ops(rank):
        live += change.get(op.kind, 0)
        most = max(most, live)
    return most
