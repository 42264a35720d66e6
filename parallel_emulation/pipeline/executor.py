"""A schedule run with real numbers: forwards, input gradients, deferred weight gradients, messages (R 3.2.1).

Every rank walks its own line of the schedule: exchange a batch of messages, compute a step, and so on. What a stage
computes comes in as a function; the executor knows the order and keeps what a backward will need. I runs the vjps that
lead to the stage's input and queues those that lead to a Parameter; W runs the oldest of the queue; B runs both at
once. An overlapped pair runs as F, then B: on GPUs the two share the time (R fig. 4), no number depends on it.

Sums: a weight's gradient adds up in the order in which the rank computes its B and W, for every schedule here the
order of micro-batches within a direction. So a weight that a stage uses once has the bits of a sequential run that
adds up the same micro-batches, direction by direction. What is used twice (an embedding or a head shared with MTP) is
added up in another order: B adds the uses of one micro-batch first, W adds each to the total.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from refimpl.autograd import Array, Gradients, Tensor, backward, data_of, primitive, require, where
from refimpl.autograd.tensor import Vjp
from refimpl.parallel_emulation.comm import Comm, Recv, Send

from .schedule import Batch, Message, Op, Schedule

Part = Callable[[Tensor | None, int], tuple[Tensor | None, Tensor | None]]
"""One stage: (input, None in the first stage; number of the micro-batch) -> (output, None in the last stage; the loss
that arises here (), or None). Losses of all stages and micro-batches count alike, so each carries its own weight."""
Slot = tuple[Literal["F", "B"], int, int]
"""An activation or a gradient, direction, chunk: named by the op that needs it (inbox) or made it (outbox)."""


@dataclass(frozen=True)
class Outcome:
    """What one rank has after a step of the pipeline."""

    losses: dict[int, Array]  # micro-batch -> sum of the losses () that arose on this rank
    grads: Gradients  # leaf of this rank's stages -> gradient of the sum of all losses
    peak_live: int  # most chunks whose forward was done and whose backward for the input was not
    peak_until_weight: int  # the same, a chunk staying until its weight part was done
    peak_queue: int  # most weight parts waiting


def run(pp: Comm, schedule: Schedule, parts: Sequence[Part], *, label: str = "pp") -> Outcome:
    """My line of the schedule. parts[d] is the stage that I hold in direction d.

    Messages are those of the schedule, batch by batch, labelled with the sending stage and the micro-batch. SpecError
    where ranks or parts are not those of the schedule, and where a part does not fit its place.
    """
    layout = schedule.layout
    require(pp.size == layout.n_ranks, f"{schedule.name} is for {layout.n_ranks} ranks, the group has {pp.size}")
    held = layout.stages[pp.rank]
    require(len(parts) == len(held), f"rank {pp.rank} holds {len(held)} stages in {schedule.name}, not {len(parts)}")
    rank = _Rank(pp, schedule, parts, label)
    for batch, step in schedule.program(pp.rank):
        rank.exchange(batch)
        for op in step:
            with where(f"in {op}, stage {layout.stage(pp.rank, op)} on rank {pp.rank} of {schedule.name}"):
                rank.compute(op)
    return rank.outcome()


@primitive
def carrying(y: Array, loss: Array) -> tuple[Array, tuple[Vjp, Vjp]]:
    """y itself, and a loss that is counted with weight 1 when y is differentiated.  y (*), loss () -> (*).

    How a stage in the middle contributes to the loss without sending it on.
    """
    return y, (lambda dy: dy, lambda dy: np.ones_like(loss))


class _Rank:
    """What a rank holds between two steps."""

    def __init__(self, pp: Comm, schedule: Schedule, parts: Sequence[Part], label: str) -> None:
        self._pp, self._layout, self._parts, self._label = pp, schedule.layout, parts, label
        self._inbox: dict[Slot, Array] = {}  # by the op that needs it
        self._outbox: dict[Slot, Array] = {}  # by the op that made it
        self._live: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}  # chunk -> input, root of its graph
        self._queue: deque[tuple[Op, list[Callable[[], None]]]] = deque()
        self._losses: dict[int, Array] = {}
        self._grads = Gradients()
        self._peaks = [0, 0, 0]

    def outcome(self) -> Outcome:
        """The result; SpecError if the schedule has left something undone."""
        left = [len(x) for x in (self._live, self._queue, self._inbox, self._outbox)]
        require(not any(left), "left at the end: {} backwards, {} weight parts, {} + {} messages".format(*left))
        return Outcome(self._losses, self._grads, *self._peaks)

    # ---- Messages

    def exchange(self, batch: Batch) -> None:
        """Post all messages of a batch and wait for them."""
        if not batch:
            return
        sends = [Send(m.peer, self._outbox.pop(_slot(m)), self._name(m)) for m in batch if m.verb == "s"]
        received = [m for m in batch if m.verb == "r"]
        recvs = [Recv(m.peer, self._name(m), self._like(m)) for m in received]
        for m, x in zip(received, self._pp.exchange(sends, recvs, self._label), strict=True):
            self._inbox[_slot(m)] = x

    def _name(self, m: Message) -> str:
        """Both ends say which stage the message comes from."""
        ahead = 0 if m.verb == "s" else 1 if m.kind == "F" else -1
        stage = self._layout.stage(self._pp.rank, m) - ahead
        return f"{self._label}.{m.kind} of stage {stage}, micro-batch {self._layout.micro_batch(m)}"

    def _like(self, m: Message) -> Array | None:
        """A gradient must look like the output it belongs to."""
        live = self._live.get((m.direction, m.chunk))
        return live[1].data if m.kind == "B" and live else None

    def _deliver(self, op: Op, x: Array) -> None:
        """Keep what op made for the next batch of messages, or for this rank's own next stage."""
        place = self._layout.target(self._pp.rank, op)
        assert place is not None
        kind = _kind(op)
        if place[0] == self._pp.rank:
            self._inbox[kind, place[1], op.chunk] = x
        else:
            self._outbox[kind, op.direction, op.chunk] = x

    def _needed(self, op: Op) -> Array | None:
        """What op starts from: None at the end of the pipe at which it enters."""
        if self._layout.source(self._pp.rank, op) is None:
            return None
        require(_slot(op) in self._inbox, "its input has not come in")
        return self._inbox.pop(_slot(op))

    # ---- Computation

    def compute(self, op: Op) -> None:
        """One op."""
        match op.kind:
            case "F":
                self._forward(op)
            case "W":
                self._weight(op)
            case _:
                self._backward(op)
        counts = (len(self._live), len(self._live) + len(self._queue), len(self._queue))
        self._peaks = [max(pair) for pair in zip(self._peaks, counts, strict=True)]

    def _forward(self, op: Op) -> None:
        came = self._needed(op)
        x, j = None if came is None else Tensor(came), self._layout.micro_batch(op)
        y, loss = self._parts[op.direction](x, j)
        if loss is not None:
            self._losses[j] = self._losses[j] + data_of(loss) if j in self._losses else data_of(loss)
        last = self._layout.target(self._pp.rank, op) is None
        root = loss if y is None else y if loss is None else carrying(y, loss)
        require((y is None) == last, "the last stage gives a loss and no output, every other one an output")
        require(isinstance(root, Tensor), "a stage gives Tensors; this one depends on no leaf")
        assert root is not None
        self._live[op.direction, op.chunk] = x, root
        if not last:
            self._deliver(op, root.data)

    def _backward(self, op: Op) -> None:
        require((op.direction, op.chunk) in self._live, "its forward has not been computed")
        x, root = self._live.pop((op.direction, op.chunk))
        later: list[Callable[[], None]] | None = [] if op.kind == "I" else None
        backward(root, self._needed(op), into=self._grads, later=later)
        if later is not None:
            self._queue.append((op, later))
        if x is not None:
            require(x in self._grads, "the stage does not depend on its input")
            self._deliver(op, self._grads.pop(x))

    def _weight(self, op: Op) -> None:
        require(self._queue, "no weight part is waiting")
        oldest, thunks = self._queue.popleft()
        require(oldest[1:] == op[1:], f"the oldest weight part is that of {oldest}")
        for thunk in thunks:
            thunk()


def _kind(op: Op | Message) -> Literal["F", "B"]:
    return "F" if op.kind == "F" else "B"


def _slot(op: Op | Message) -> Slot:
    return _kind(op), op.direction, op.chunk
