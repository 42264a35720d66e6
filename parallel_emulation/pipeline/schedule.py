"""A pipeline schedule as data: rank -> what it computes, in order, and which messages it waits for before each step.

One object drives the numeric run, the checker, the time model and the drawing. The notation is one line a rank,
`F0.1|B1.0 I1.2 W1.2 ...`: kind, direction, chunk. Kinds: F forward, B full backward, I backward for the input only
(its weight part goes on a first-in-first-out queue), W the oldest queued weight part. `F...|B...` is one forward and
one backward of different micro-batches executed together, their communication overlapped (R 3.2.1). `direction` names
the model chunk of the rank: the flow (DualPipe), the way down or up (DualPipeV), or the virtual stage (interleaved).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from refimpl.autograd.errors import SpecError, require

Kind = Literal["F", "B", "I", "W"]
Place = tuple[int, int]  # (rank, direction): where one stage lives


class Op(NamedTuple):
    """One chunk's forward, backward, input gradient or weight gradient."""

    kind: Kind
    direction: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind}{self.direction}.{self.chunk}"


Step = tuple[Op, ...]  # one op, or a forward and a backward executed together


class Message(NamedTuple):
    """`sF0.3@2`: send the output of F0.3 to rank 2. `rB1.0@2`: receive what B1.0 or I1.0 needs, from rank 2.

    A message names the op on its own side: what a rank sends as `sF0.3` another may receive as `rF1.3` (interleaved).
    """

    verb: Literal["s", "r"]
    kind: Literal["F", "B"]  # F an activation, B a gradient
    direction: int
    chunk: int
    peer: int

    def __str__(self) -> str:
        return f"{self.verb}{self.kind}{self.direction}.{self.chunk}@{self.peer}"


Batch = tuple[Message, ...]  # posted together and waited for together (batched isend/irecv)


@dataclass(frozen=True)
class Layout:
    """Which stage a rank runs in which direction, and what the micro-batches are.

    With two streams (DualPipe) every stage lives on two ranks, once per direction, and each direction has half of the
    micro-batches; with one stream every stage lives once and a chunk's number is its micro-batch.
    """

    stages: tuple[tuple[int, ...], ...]  # rank -> stage of each direction
    micro_batches: int  # all directions together
    streams: int = 1

    @property
    def n_ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.stages)

    @cached_property
    def n_stages(self) -> int:
        """Stages a micro-batch goes through: the PP of the bubble formulas."""
        return 1 + max(stage for row in self.stages for stage in row)

    @property
    def chunks(self) -> int:
        """Micro-batches of one stream."""
        return self.micro_batches // self.streams

    @cached_property
    def _homes(self) -> dict[tuple[int, int], Place]:
        places = [(r, d) for r, row in enumerate(self.stages) for d in range(len(row))]
        return {(self.stream(d), self.stages[r][d]): (r, d) for r, d in places}

    def stream(self, direction: int) -> int:
        """Index of the flow of micro-batches that a direction belongs to."""
        return direction if self.streams > 1 else 0

    def micro_batch(self, op: Op | Message) -> int:
        """Number of the micro-batch among all of the step: direction 0's first, then direction 1's."""
        return self.stream(op.direction) * self.chunks + op.chunk

    def stage(self, rank: int, op: Op | Message) -> int:
        """The stage that `rank` applies in the op's direction."""
        return self.stages[rank][op.direction]

    def beside(self, rank: int, direction: int, offset: int) -> Place | None:
        """Where the micro-batch is `offset` stages later (+1) or earlier (-1); None past either end."""
        return self._homes.get((self.stream(direction), self.stages[rank][direction] + offset))

    def source(self, rank: int, op: Op) -> Place | None:
        """Where the op's input is computed: the stage before for F, the stage after for B and I; None if here."""
        return None if op.kind == "W" else self.beside(rank, op.direction, -1 if op.kind == "F" else 1)

    def target(self, rank: int, op: Op) -> Place | None:
        """Where the op's output is needed."""
        return None if op.kind == "W" else self.beside(rank, op.direction, 1 if op.kind == "F" else -1)

    def message(self, verb: Literal["s", "r"], rank: int, op: Op) -> Message | None:
        """The message that brings the op's input ("r") or takes its output ("s"); None where none is needed."""
        place = self.source(rank, op) if verb == "r" else self.target(rank, op)
        if place is None or place[0] == rank:
            return None
        return Message(verb, "F" if op.kind == "F" else "B", op.direction, op.chunk, place[0])


@dataclass(frozen=True)
class Schedule:
    """rank -> steps; `batches[rank][i]` is exchanged before step i, the last one after all steps."""

    name: str
    layout: Layout
    ranks: tuple[tuple[Step, ...], ...]
    batches: tuple[tuple[Batch, ...], ...]

    def program(self, rank: int) -> Iterator[tuple[Batch, Step]]:
        """What a rank does: exchange a batch (maybe empty), then compute a step; the last step may be empty."""
        return zip(self.batches[rank], (*self.ranks[rank], ()), strict=True)

    def ops(self, rank: int) -> Iterator[Op]:
        """The rank's ops, overlapped pairs opened up."""
        return (op for step in self.ranks[rank] for op in step)

    def __str__(self) -> str:
        return "\n".join(" ".join(map(step_text, steps)) for steps in self.ranks)


def step_text(step: Step) -> str:
    """`F0.1` or `F0.1|B1.0`."""
    return "|".join(map(str, step))


_OP = re.compile(r"([FBIW])(\d+)\.(\d+)")


def parse_steps(line: str) -> list[Step]:
    """One rank's line in the notation -> its steps. Raises SpecError for anything else."""
    steps: list[Step] = []
    for word in line.split():
        found = [_OP.fullmatch(part) for part in word.split("|")]
        ops = tuple(Op(m[1], int(m[2]), int(m[3])) for m in found if m)  # type: ignore[arg-type]
        well_formed = len(ops) == len(found) and (len(ops) == 1 or "".join(op.kind for op in ops) == "FB")
        require(well_formed, f"{word!r} is not a step; expected kind, direction, chunk as in F0.1, or F0.1|B1.0")
        steps.append(ops)
    return steps


class RankWriter:
    """Writes one rank's program: keeps the queue of weight parts, and batches messages as DualPipe's reference does.

    A receive is posted when its op comes up (or earlier, by `receive`), a send when its op is done (or later, by
    `send`); whatever has been posted when a computation comes up is one batch, waited for before it.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        self.layout, self.rank = layout, rank
        self.steps: list[Step] = []
        self.batches: list[Batch] = []
        self._pending: list[Message] = []
        self._received: set[Op] = set()
        self._weights: deque[Op] = deque()

    def receive(self, op: Op) -> None:
        """Post the receive of what `op` needs, unless that is local or already posted."""
        if op not in self._received:
            self._received.add(op)
            self._post(self.layout.message("r", self.rank, op))

    def send(self, op: Op) -> None:
        """Post the send of what `op` computed, unless it is needed here or nowhere."""
        self._post(self.layout.message("s", self.rank, op))

    def _post(self, message: Message | None) -> None:
        self._pending.extend([message] if message else [])

    def compute(self, *ops: Op, send: bool = True) -> None:
        """Receive, compute `ops` together, send."""
        for op in ops:
            self.receive(op)
        self._flush()
        self.steps.append(ops)
        self._weights.extend(Op("W", op.direction, op.chunk) for op in ops if op.kind == "I")
        for op in ops if send else ():
            self.send(op)

    def weight(self) -> None:
        """Compute the oldest queued weight part."""
        self.compute(self._weights.popleft())

    def _flush(self) -> None:
        self.batches.append(tuple(self._pending))
        self._pending.clear()

    def finish(self) -> tuple[tuple[Step, ...], tuple[Batch, ...]]:
        """(steps, batches); what is still posted becomes the last batch."""
        self._flush()
        return tuple(self.steps), tuple(self.batches)


def assemble(name: str, layout: Layout, writers: Iterable[RankWriter]) -> Schedule:
    """One schedule from the ranks' finished programs."""
    ranks, batches = zip(*(w.finish() for w in writers), strict=True)
    return Schedule(name, layout, ranks, batches)


def from_steps(name: str, layout: Layout, ranks: Sequence[Iterable[Step]]) -> Schedule:
    """A schedule from steps alone: every message is posted when its op comes up or is done."""
    require(len(ranks) == layout.n_ranks, f"{len(ranks)} lines of ops for {layout.n_ranks} ranks")
    writers = [RankWriter(layout, r) for r in range(layout.n_ranks)]
    for writer, steps in zip(writers, ranks, strict=True):
        for step in steps:
            for op in step:
                known = op.direction < len(layout.stages[writer.rank])
                require(known, f"rank {writer.rank}, {op}: it has {len(layout.stages[writer.rank])} directions")
            writer.compute(*step)
    return assemble(name, layout, writers)


def parse(text: str, layout: Layout, name: str = "given") -> Schedule:
    """One line a rank in the notation -> Schedule. Raises SpecError naming the rank of a malformed line."""
    ranks = []
    for rank, line in enumerate(text.strip().splitlines()):
        try:
            ranks.append(parse_steps(line))
        except SpecError as error:
            raise SpecError(f"rank {rank}: {error}") from None
    return from_steps(name, layout, ranks)
