"""DualPipe and DualPipeV (R 3.2.1; deepseek-ai/DualPipe 3da1bbe): the eight steps, with the reference's messages.

The two differ in one number, the distance of a rank from the nearer end of the pipe. `near` is the direction that
enters at that end, `far` the other one; `n` is the largest distance + 1.
"""

from __future__ import annotations

from collections import Counter

from refimpl.autograd.errors import require

from .schedule import Kind, Layout, Op, RankWriter, Schedule, assemble


def dualpipe(pp: int, micro_batches: int) -> Schedule:
    """Micro-batches enter from both ends; rank r holds stages r and pp-1-r: 2x parameters, pp+1 live chunks.

    `micro_batches` counts both directions. Raises SpecError unless pp and micro_batches are even and
    micro_batches >= 2 pp (what the reference asserts).
    """
    require(pp >= 2 and pp % 2 == 0, f"DualPipe with {pp} ranks; it pairs rank r with pp-1-r, so pp must be even")
    require(micro_batches % 2 == 0, f"DualPipe with {micro_batches} micro-batches; each direction takes half of them")
    _enough("DualPipe", micro_batches, pp)
    layout = Layout(tuple((r, pp - 1 - r) for r in range(pp)), micro_batches, streams=2)
    writers = [RankWriter(layout, r) for r in range(pp)]
    for r, writer in enumerate(writers):
        near = 0 if r < pp // 2 else 1
        _Rank(writer, min(r, pp - 1 - r), pp // 2, near).write(micro_batches // 2 - pp)
    return assemble("dualpipe", layout, writers)


def dualpipev(pp: int, micro_batches: int) -> Schedule:
    """DualPipe cut in half: rank r holds stages r (direction 0, down) and 2 pp-1-r (direction 1, up).

    Half the devices for the same number of stages. Raises SpecError if micro_batches < 2 pp.
    """
    require(pp >= 1, f"DualPipeV with {pp} ranks; at least 1")
    _enough("DualPipeV", micro_batches, pp)
    layout = Layout(tuple((r, 2 * pp - 1 - r) for r in range(pp)), micro_batches)
    writers = [RankWriter(layout, r) for r in range(pp)]
    for r, writer in enumerate(writers):
        _Rank(writer, r, pp, near=0).write(micro_batches - 2 * pp)
    return assemble("dualpipev", layout, writers)


def _enough(name: str, micro_batches: int, pp: int) -> None:
    least = 2 * pp
    require(micro_batches >= least, f"{name} with {micro_batches} micro-batches on {pp} ranks; at least {least}")


class _Rank:
    """One rank's eight steps. Chunks count up separately per direction for forward and for backward."""

    def __init__(self, writer: RankWriter, h: int, n: int, near: int) -> None:
        self.w, self.h, self.n = writer, h, n
        self.near, self.far = near, 1 - near
        self.middle = h == n - 1
        self._next: Counter[tuple[bool, int]] = Counter()  # (is forward, direction) -> next chunk

    def _op(self, kind: Kind, direction: int) -> Op:
        op = self._peek(kind, direction)
        self._next[kind == "F", direction] += 1
        return op

    def _peek(self, kind: Kind, direction: int) -> Op:
        return Op(kind, direction, self._next[kind == "F", direction])

    def _run(self, *ops: tuple[Kind, int]) -> None:
        self.w.compute(*(self._op(*op) for op in ops))

    def write(self, spare: int) -> None:
        """All steps; `spare` is how many chunks a direction has beyond the fewest possible."""
        h, n, near, far = self.h, self.n, self.near, self.far
        for _ in range(2 * (n - h - 1)):  # Step 1: nF0
            self._run(("F", near))
        held = self._step_2()
        for _ in range(n - h - 1):  # Step 3: nB1W1F1, the backward for input only
            self._run(("I", far))
            self.w.receive(self._peek("F", far))  # in flight while the weight part is computed
            self.w.weight()
            self._run(("F", far))
        self._step_4(spare + h + 1, held)
        for _ in range(n - h - 1):  # Step 5: nB1F1B0
            self._run(("B", far))
            self._run(("F", far), ("B", near))
        for i in range(2 * (h + 1)):  # Step 6: nB1B0, the second half for input only
            self._run(("B" if i < h + 1 else "I", near if i % 2 else far))
        for _ in range(n - h - 1):  # Step 7: nWB0
            self.w.weight()
            self._run(("I", near))
        for _ in range(h + 1):  # Step 8: nW
            self.w.weight()

    def _step_2(self) -> Op | None:
        """nF0F1: the next near receive is posted before the far forward.

        The middle ranks send the near output at once, since their partner waits for it; they return the last far
        forward, whose output they hold back until step 4.
        """
        self.w.receive(self._peek("F", self.near))
        for i in range(self.h + 1):
            near = self._op("F", self.near)
            self.w.compute(near, send=self.middle)
            self.w.receive(self._peek("F", self.near))
            far, last = self._op("F", self.far), i == self.h
            self.w.compute(far, send=not (self.middle and last))
            if not self.middle:
                self.w.send(near)
        return far if self.middle else None

    def _step_4(self, repeat: int, held: Op | None) -> None:
        """Main step, nF0B1F1B0: F&B, F&B. The first pair of a middle rank is not overlapped: less bubble."""
        for i in range(repeat):
            if i == 0 and held is not None:
                f, b = self._op("F", self.near), self._op("B", self.far)
                self.w.compute(f, send=False)
                self.w.send(held)
                self.w.compute(b, send=False)
                self.w.send(f)
                self.w.send(b)
            else:
                self._run(("F", self.near), ("B", self.far))
            self._run(("F", self.far), ("B", self.near))
